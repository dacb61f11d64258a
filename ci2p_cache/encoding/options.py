"""`EncodeOptions`: everything one can ask of stage one, with where each default comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.errors import UsageError
from ci2p_cache.images.source import Labels, SourceOptions
from ci2p_cache.record import Record
from ci2p_cache.specs import (
    CodecName,
    DType,
    FormatName,
    ImageSpec,
    LayoutSpec,
    Precision,
    ViewSpec,
)

__all__ = ["EncodeOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions(Record):
    """What to encode with, into what, and how; from `batch_size` on no stored byte changes.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    root: Path | None = None
    """Folder that the paths of a list of images start from; None: the list's own."""
    image_column: str | None = None
    """Column of the images, or of their paths in a list; see `SourceOptions`."""
    label_column: str | None = None
    """Column or field of the labels; see `SourceOptions`."""
    encoder: Literal["official", "bundled"] = "official"
    """CompressAI's published weights, fetched once, or the ones in this package."""
    weights: Path | None = None
    """A weights file instead: CompressAI .pth.tar or safetensors; `encoder` is then not used."""
    arch: str = "bmshj2018-factorized"
    """CompressAI zoo name; the paper's encoder."""
    quality: int = 5
    """CompressAI quality, 1-8; the paper's is 5."""
    metric: Literal["mse", "ms-ssim"] = "mse"
    """Which of CompressAI's two trainings."""
    size: int = 256
    """Side of the encoded square in pixels, a multiple of 32; the paper's is 256."""
    resize_side: int | None = None
    """Shorter side before the centre crop, in pixels; None: `size`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resize filter; torchvision's default."""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation; torchvision's loader ignores it."""
    max_pixels: int = 89_000_000
    """Larger images count as bad."""
    views: str = "flip"
    """Views of a training image: none, flip or crops:K; flip is the paper's augmentation."""
    dtype: DType = "int8"
    """What is stored: symbols (int8, int16) or y itself (float16, float32)."""
    step: float = 1.0
    """Quantisation step of symbols; the codec's own is 1."""
    precision: Precision = "float32"
    """Arithmetic of g_a; float32 is the reference."""
    format: FormatName = "zarr"
    """Container of the latents: zarr shards, WebDataset tars, or both; zarr is the smallest."""
    codec: CodecName = "zstd"
    """Byte compressor of the zarr chunks; none for reading at RAM speed."""
    level: int = 1
    """zstd level."""
    shard_samples: int = 1024
    """Rows per shard, fewer where 128 MiB of raw latents would be exceeded."""
    labels: Labels = "auto"
    """Where labels come from: auto, the source; none, nowhere: rows have -1, there are no classes,
    and all images below the source or its splits count."""
    val_fraction: float = 0.1
    """Share of each class drawn as `val` where the source has no split folders; 0 for none."""
    seed: int = 0
    """Seed of the row order, the drawn validation split and the crops."""
    limit: int | None = None
    """Only that many images, spread over the source."""
    batch_size: int | None = None
    """Views per call of g_a; None: 8 on CPU (fastest measured), 256 on CUDA."""
    workers: int | None = None
    """Threads that read and decode; None: one per core."""
    devices: str = "auto"
    """auto, cpu, cpu:N, cuda, cuda:0,1."""
    max_errors: str = "0.1%"
    """Images that may fail before the run stops: a share or a count."""
    retry_failed: bool = False
    """Read images anew that failed."""
    rescan: bool = False
    """List the source again and append new images; every committed row stays as it is."""
    reencode_changed: bool = False
    """With `rescan`: encode images again whose originals have changed."""
    plan_only: bool = False
    """Write plan, encoder and manifest, and encode nothing."""
    shard_range: str | None = None
    """Only that part of the shards: i/n, i-j/n or auto (see `ShardRange.parse`); None: all."""
    finalise: bool = False
    """Complete a folder whose shards are all committed, and encode nothing."""
    executor: Literal["local", "processes", "ray"] = "local"
    """Who encodes: this process, one process per device, or actors in a Ray cluster."""

    def __post_init__(self) -> None:
        self.image_spec("unknown")
        self.view_spec()
        self.layout_spec()
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` is {value}; it must be at least 1")
        if not 1 <= self.quality <= 8:
            raise UsageError(f"`quality` is {self.quality}; 1 to 8 are possible")
        if self.executor not in ("local", "processes", "ray"):
            raise UsageError(f"`executor` is {self.executor!r}; wanted local, processes or ray")
        if self.labels not in ("auto", "none"):
            raise UsageError(f"`labels` is {self.labels!r}; wanted auto or none")
        chosen = [name for name in ("plan_only", "shard_range", "finalise") if getattr(self, name)]
        if len(chosen) > 1:
            raise UsageError(f"`{chosen[0]}` and `{chosen[1]}` do not go together")
        if self.shard_range is not None:
            if self.shard_range != "auto":
                self.part()
            for name in ("rescan", "retry_failed"):
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise UsageError(
                        f"`{name}` changes the plan, which the ranges of a folder share",
                        hint=f"once: --plan-only --{flag}; then each range without --{flag}",
                    )
        if self.reencode_changed and not self.rescan:
            raise UsageError(
                "`reencode_changed` compares the originals with the cache, which `rescan` does",
                hint="repeat the command with --rescan",
            )

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns the options that bind a cache; whence its encoder came is not recorded."""
        made, known = manifest.fingerprint, {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for record in (made.image, made.encoder, made.latent, manifest.layout):
            values |= {name: value for name, value in record.to_dict().items() if name in known}
        if made.image.resize_side == made.image.size:
            values["resize_side"] = None
        labels: Labels = "auto" if manifest.classes else "none"
        return cls(**values, views=str(made.views), labels=labels)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, paths as str."""
        values = Record.to_dict(self)
        return {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}

    def source_options(self) -> SourceOptions:
        """Returns what the user says of the source."""
        root = None if self.root is None else str(self.root)
        return SourceOptions(**self._shared(SourceOptions) | {"root": root})

    def part(self) -> ShardRange | None:
        """Returns the range of shards that is asked for; auto is read from the environment.

        Raises:
            UsageError: it is none.
        """
        if self.shard_range is None:
            return None
        return ShardRange.parse(self.shard_range, os.environ)

    def image_spec(self, decoder: str) -> ImageSpec:
        """Returns the part of the fingerprint that speaks of pixels."""
        side = self.size if self.resize_side is None else self.resize_side
        return ImageSpec(**self._shared(ImageSpec) | {"resize_side": side, "decoder": decoder})

    def view_spec(self) -> ViewSpec:
        """Returns the part of the fingerprint that speaks of views."""
        return ViewSpec.parse(self.views, seed=self.seed)

    def layout_spec(self) -> LayoutSpec:
        """Returns the fields that decide which sample is where."""
        return LayoutSpec(**self._shared(LayoutSpec))

    def _shared(self, spec: type[ImageSpec | LayoutSpec | SourceOptions]) -> dict[str, Any]:
        """Returns the options that a spec has a field of the same name for."""
        names = [field.name for field in fields(spec) if hasattr(self, field.name)]
        return {name: getattr(self, name) for name in names}
