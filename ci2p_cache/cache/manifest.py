"""`cache.json`: what a cache folder is, written when encoding starts and completed last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ci2p_cache.cache.commit import FileRecord, read_sealed
from ci2p_cache.errors import FingerprintMismatchError, ManifestError, NotACacheError, UsageError
from ci2p_cache.record import Record
from ci2p_cache.specs import (
    FORMAT_VERSION,
    Fingerprint,
    LatentSpec,
    LayoutSpec,
    differing_fields,
)

__all__ = [
    "MANIFEST",
    "MAX_SHARD_BYTES",
    "Manifest",
    "SplitRecord",
    "array_path",
    "index_path",
    "read_manifest",
    "refuse_difference",
    "shard_path",
    "shard_rows",
]

MANIFEST = "cache.json"

MAX_SHARD_BYTES = 128 * 2**20
"""Raw latents of one shard at most: it is built in memory, and lost whole when a run is killed."""

_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRecord(Record):
    """The shape of one split."""

    rows: int
    """Planned samples, N."""
    views: int
    """Views per sample, V."""
    shard_rows: int
    """Rows per shard, S."""
    valid_rows: int | None = None
    """Rows that hold a latent; None until encoding has finished."""
    bytes: int | None = None
    """Bytes of the committed shard files; None until encoding has finished."""
    source_bytes: int | None = None
    """Bytes of the source files of valid rows; None until encoding has finished."""
    clipped: int | None = None
    """Symbols saturated at the dtype's limit; None until encoding has finished."""
    exif_turned: int | None = None
    """Images whose EXIF orientation is not 1; None until encoding has finished."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows", 0, 2**40),
            ("views", 1, 1024),
            ("shard_rows", 1, 2**20),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"split `{name}` is {value}; {low} to {high} are possible")

    @property
    def num_shards(self) -> int:
        """Number of shards, the last one perhaps part-filled."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Returns the rows of a shard."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest(Record):
    """The content of `cache.json`."""

    format_version: int = FORMAT_VERSION
    """Version of the disk format."""
    software: str
    """Name and version of what wrote it; information only."""
    state: Literal["encoding", "complete"]
    """complete is written last, after everything that it vouches for."""
    fingerprint: Fingerprint
    """Every field that changes a value."""
    layout: LayoutSpec
    """Every field that changes which sample lies where."""
    source: str
    """Where the images were read from; information only."""
    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    class_titles: tuple[str, ...]
    """Names for humans, in the order of `classes`."""
    splits: dict[str, SplitRecord]
    """Shape of each split, in the order train, val, test."""
    plan: FileRecord
    """plan.parquet."""
    encoder: FileRecord
    """encoder.safetensors."""
    offset: tuple[float, ...]
    """y = stored * scale + offset[channel]; the codec's medians for symbols, zeros for floats."""
    files: tuple[FileRecord, ...] = ()
    """Everything that finalising wrote: metadata, labels, valid, statistics, errors."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise UsageError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        for name in self.splits:
            if not _SPLIT_NAME.fullmatch(name):
                raise UsageError(f"split name {name!r} is not of the form {_SPLIT_NAME.pattern}")
        if len(self.class_titles) != len(self.classes):
            raise UsageError(
                f"{len(self.class_titles)} class titles for {len(self.classes)} classes"
            )
        if len(self.offset) != self.fingerprint.latent.channels:
            raise UsageError(
                f"{len(self.offset)} offsets for {self.fingerprint.latent.channels} channels"
            )

    @property
    def scale(self) -> float:
        """Y = stored * scale + offset[channel]; the step for symbols, 1.0 for floats."""
        return self.fingerprint.latent.step

    @property
    def is_complete(self) -> bool:
        """Whether encoding has finished."""
        return self.state == "complete"


def read_manifest(root: Path) -> Manifest:
    """Reads `cache.json` of a cache folder.

    Raises:
        NotACacheError: the folder is missing or holds no `cache.json`.
        ManifestError: it is damaged, or of another format version.
    """
    path = root / MANIFEST
    try:
        data, intact = read_sealed(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACacheError(
            f"{root} is no latent cache: it has no {MANIFEST}",
            hint=f"ci2p-cache encode IMAGES --out {root}",
        ) from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path} has format version {version!r}; this ci2p-cache reads version "
            f"{FORMAT_VERSION}",
            hint=f"encode again: ci2p-cache encode IMAGES --out NEW_FOLDER (or use the ci2p-cache "
            f"that wrote it: {data.get('software', 'unknown')})",
        )
    if not intact:
        raise ManifestError(f"{path} is damaged: its own sha256 does not fit it")
    try:
        return Manifest.from_dict(data)
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}") from error


def refuse_difference(
    root: Path, manifest: Manifest, fingerprint: Fingerprint, layout: LayoutSpec
) -> None:
    """Holds the wanted settings against those that the folder was made with.

    Raises:
        FingerprintMismatchError: a field differs; the message lists each, and nothing is changed.
    """
    differences: list[tuple[str, Any, Any]] = [
        *differing_fields(manifest.fingerprint, fingerprint),
        *differing_fields(manifest.layout, layout),
    ]
    if differences:
        lines = [
            f"  {name}: {made!r} in the folder, {asked!r} asked for"
            for name, made, asked in differences
        ]
        raise FingerprintMismatchError(
            f"{root} was made with other settings; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --out folder, or repeat the command with the folder's settings",
        )


def shard_rows(layout: LayoutSpec, latent: LatentSpec, views: int) -> int:
    """Returns S: `shard_samples`, or what fits MAX_SHARD_BYTES raw, whichever is less."""
    return max(1, min(layout.shard_samples, MAX_SHARD_BYTES // (views * latent.num_bytes)))


def array_path(split: str, name: str = "latents") -> str:
    """Returns an array's folder relative to the cache folder."""
    return f"latents.zarr/{split}/{name}"


def shard_path(split: str, shard: int) -> str:
    """Returns a shard's path relative to the cache folder: zarr's chunk key with "." between."""
    return f"{array_path(split)}/c.{shard}.0.0.0.0"


def index_path(split: str, shard: int) -> str:
    """Returns an index part's path relative to the cache folder."""
    return f"index/{split}-{shard:06d}.parquet"
