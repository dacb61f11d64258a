"""`EncodeOptions`: everything one can ask of stage one, with where each default comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.errors import UsageError
from ci2p_cache.fields import check_options, option
from ci2p_cache.images.source import Labels, SourceOptions
from ci2p_cache.record import Record
from ci2p_cache.specs import (
    FORMAT_VERSION,
    AugmentSpec,
    CodecName,
    DType,
    FormatName,
    ImageSpec,
    LayoutSpec,
    Precision,
    ViewSpec,
    default_level,
)

if TYPE_CHECKING:
    from ci2p_cache.cache.manifest import Manifest

__all__ = ["BATCH_SIZES", "EncodeOptions"]

BATCH_SIZES = {"cpu": 8, "cuda": 256}
"""Views per encoder call where `batch_size` is None."""

# Panels of the help; what has none is for every day.
_IMAGES, _ENCODER, _VIEWS = "Images", "Encoder", "Views"
_STORAGE, _MACHINES = "Storage", "Machines"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions(Record):
    """What to encode with, into what, and how; from `batch_size` on no stored byte changes.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    root: Path | None = option(
        None, "Folder that the paths of a list start from [default: the list's own].", panel=_IMAGES
    )
    image_column: str | None = option(
        None,
        "Column of the images, or of their paths in a list; in tars their extension.",
        panel=_IMAGES,
    )
    label_column: str | None = option(
        None,
        "Column of the labels; in tars an extension, or a field of the .json.",
        panel=_IMAGES,
    )
    encoder: Literal["official", "bundled"] = option(
        "official", "official: CompressAI's weights, fetched once. bundled: those shipped."
    )
    weights: Path | None = option(
        None,
        "A weights file instead: CompressAI's .pth.tar, or .safetensors.",
        panel=_ENCODER,
    )
    arch: str = option("bmshj2018-factorized", "CompressAI zoo name; the paper's.", panel=_ENCODER)
    quality: int = option(
        5, "CompressAI quality, 1 to 8; the paper's.", low=1, high=8, panel=_ENCODER
    )
    metric: Literal["mse", "ms-ssim"] = option(
        "mse", "What the encoder was trained for.", panel=_ENCODER
    )
    size: int = option(
        256, "Side of the square in pixels, a multiple of 32; the paper's.", panel=_VIEWS
    )
    resize_side: int | None = option(
        None, "Shorter side before the centre crop, in pixels [default: size].", panel=_VIEWS
    )
    interpolation: Literal["bilinear", "bicubic"] = option(
        "bilinear", "Resize filter, antialiased; torchvision's default.", panel=_VIEWS
    )
    exif: Literal["ignore", "apply"] = option(
        "ignore",
        "What to do with EXIF orientation; torchvision's loader ignores it.",
        panel=_VIEWS,
    )
    max_pixels: int = option(89_000_000, "Larger images count as bad.", panel=_IMAGES)
    views: str = option(
        "flip", "Views of a training image: none, flip or crops:K; flip is the paper's."
    )
    augment: str | None = option(
        None,
        "What happens to each crop: authors, rand, trivial, or a YAML file (docs/encoders.md).",
        metavar="NAME|FILE",
        panel=_VIEWS,
    )
    dtype: DType = option("int8", "int8, int16: the codec's symbols. float16, float32: y itself.")
    step: float = option(
        1.0, "Quantisation step of the symbols; the codec's own is 1.", panel=_ENCODER
    )
    precision: Precision = option(
        "float32", "Arithmetic of the encoder; float32 is the reference.", panel=_ENCODER
    )
    format: FormatName = option(
        "zarr",
        "Container of the latents: zarr shards (smallest), WebDataset tars, or both.",
        panel=_STORAGE,
    )
    codec: CodecName = option(
        "zstd",
        "Byte compressor of the zarr chunks; lz4 and none are larger and read faster.",
        panel=_STORAGE,
    )
    level: int | None = option(
        None,
        "Compression level, 1 to 9 [default: zstd 2, or 1 with --fold; lz4 3].",
        panel=_STORAGE,
    )
    fold: bool = option(
        False,
        "Store symbols as 0, 1, 2, ... for 0, -1, 1, ...: the smallest cache.",
        panel=_STORAGE,
    )
    shard_samples: int = option(
        1024,
        "Images per shard; fewer where 128 MiB of raw latents would be exceeded.",
        panel=_STORAGE,
    )
    labels: Labels = option(
        "auto", "none: encode images without labels; train refuses such a cache.", panel=_IMAGES
    )
    val_fraction: float = option(
        0.1, "Validation share of each class where SRC has no split folders; 0 for none."
    )
    split: Literal["auto", "stratified", "hashed"] = option(
        "auto",
        "How val is drawn: stratified, an exact share of each class; or hashed, each image for "
        "itself; auto: a cache keeps its own, a new one is stratified.",
        panel=_IMAGES,
    )
    seed: int = option(0, "Seed of row order, drawn split and crops.", panel=_IMAGES)
    limit: int | None = option(
        None, "Only that many images, spread over the source.", panel=_IMAGES
    )
    batch_size: int | None = option(
        None,
        f"Views per encoder call [default: {BATCH_SIZES['cpu']} on CPU (fastest measured), "
        f"{BATCH_SIZES['cuda']} on CUDA].",
        low=1,
        panel=_MACHINES,
    )
    workers: int | None = option(
        None, "Threads that read and decode [default: one per core].", low=1, panel=_MACHINES
    )
    devices: str = option(
        "auto",
        "auto, cpu, cpu:N (N threads), cuda, or several: cuda:0,1.",
        flag="device",
        pattern=r"auto|cpu(:[1-9]\d*)?|cuda(:\d+(,\d+)*)?",
    )
    max_errors: str = option(
        "0.1%",
        "Images that may fail: a share (at least one image) or a count.",
        panel=_IMAGES,
    )
    retry_failed: bool = option(False, "Read images again that failed.", panel=_IMAGES)
    rescan: bool = option(
        False,
        "List SRC again and append new images; committed rows stay as they are.",
        panel=_IMAGES,
    )
    reencode_changed: bool = option(
        False, "With --rescan: encode changed images again.", panel=_IMAGES
    )
    add_views: bool = option(
        False,
        "With --views crops:K: encode the crops that a cache of fewer lacks, and keep the others.",
        panel=_VIEWS,
    )
    plan_only: bool = option(False, "List SRC and write the plan; encode nothing.", panel=_MACHINES)
    shard_range: str | None = option(
        None,
        "Encode only part i of n of the shards, from 1/n to n/n; auto: this task's part of a Slurm "
        "array or an indexed Kubernetes job.",
        metavar="i/n",
        panel=_MACHINES,
    )
    finalise: bool = option(
        False, "Complete a folder whose shards are all committed.", panel=_MACHINES
    )
    executor: Literal["local", "processes", "ray"] = option(
        "local",
        "Who encodes: this process, one per device, or a Ray cluster.",
        panel=_MACHINES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.augment is not None:
            # A file may change, or not be on another machine.
            object.__setattr__(self, "augment", str(AugmentSpec.parse(self.augment)))
        self.image_spec("unknown")
        self.view_spec()
        self.layout_spec()
        chosen = [name for name in ("plan_only", "shard_range", "finalise") if getattr(self, name)]
        if len(chosen) > 1:
            raise UsageError(f"`{chosen[0]}` and `{chosen[1]}` do not go together")
        if self.shard_range is not None:
            if self.shard_range != "auto":
                self.part()
            for name in ("rescan", "retry_failed", "add_views"):
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise UsageError(
                        f"`{name}` changes the plan, which the ranges of a folder share",
                        hint=f"once: --plan-only --{flag}; then each range without --{flag}",
                    )
        if self.executor == "ray" and ":" in self.devices:
            raise UsageError(
                f"`device` is {self.devices!r}; with ray it is auto, cpu or cuda: the cluster says "
                "how many there are"
            )
        if self.reencode_changed and not self.rescan:
            raise UsageError(
                "`reencode_changed` compares the originals with the cache, which `rescan` does",
                hint="repeat the command with --rescan",
            )

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns the options that bind a cache; where its encoder came from is not recorded."""
        made, known = manifest.fingerprint, {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for record in (made.image, made.encoder, made.latent, manifest.layout):
            values |= {name: value for name, value in record.to_dict().items() if name in known}
        if made.image.resize_side == made.image.size:
            values["resize_side"] = None
        if values["split"] == "stratified":
            # What a new cache has, and this one keeps; so no command has to say it.
            values["split"] = "auto"
        layout, version = manifest.layout, manifest.format_version
        if layout.level == default_level(version, layout.codec, fold=layout.fold):
            values["level"] = None
        labels: Labels = "auto" if manifest.classes else "none"
        if made.views.augment is not None:
            values["augment"] = str(made.views.augment)
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
        augment = None if self.augment is None else AugmentSpec.parse(self.augment)
        return ViewSpec.parse(self.views, seed=self.seed, augment=augment)

    def layout_spec(self, format_version: int = FORMAT_VERSION) -> LayoutSpec:
        """Returns the fields that decide which sample is where, for a cache of that format."""
        level = self.level
        if level is None:
            level = default_level(format_version, self.codec, fold=self.fold)
        split = "stratified" if self.split == "auto" else self.split
        return LayoutSpec(**self._shared(LayoutSpec) | {"level": level, "split": split})

    def _shared(self, spec: type[ImageSpec | LayoutSpec | SourceOptions]) -> dict[str, Any]:
        """Returns the options that a spec has a field of the same name for."""
        names = [field.name for field in fields(spec) if hasattr(self, field.name)]
        return {name: getattr(self, name) for name in names}
