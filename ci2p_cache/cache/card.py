"""Cards: what a cache and its folder are, as values that any front end shows.

Nothing here needs the encoder; a cache whose encoding has not finished is described as far as it
is committed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.traces import shard_of
from ci2p_cache.errors import ManifestError
from ci2p_cache.record import Record
from ci2p_cache.specs import Fingerprint, LayoutSpec

__all__ = [
    "CacheCard",
    "SplitCard",
    "TreeEntry",
    "describe",
    "folder_tree",
    "index_parts",
    "stored_rows",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCard(Record):
    """One split; of a cache that is not complete, its committed shards."""

    name: str
    """train, val or test."""
    rows: int
    """Planned samples."""
    valid_rows: int
    """Samples that hold a latent."""
    bad_rows: int
    """Samples whose image could not be decoded."""
    views: int
    """Views per sample."""
    shape: tuple[int, ...]
    """(N, V, M, h, w) of the latents' array."""
    shards: int
    """Planned shards."""
    committed_shards: int
    """Shards that have a commit record."""
    shard_rows: int
    """Rows per shard."""
    class_counts: tuple[int, ...]
    """Valid rows of each class, in the order of the classes."""
    stored_bytes: int
    """Bytes of the shards and their index parts."""
    source_bytes: int
    """Bytes of the source files of valid rows."""
    clipped: int
    """Symbols saturated at the dtype's limit."""
    exif_turned: int
    """Valid images whose EXIF orientation asks for a turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCard(Record):
    """What a cache is; totals are over all splits."""

    path: str
    """The folder."""
    software: str
    """What wrote it."""
    complete: bool
    """Whether encoding has finished."""
    committed_shards: int
    """Shards that have a commit record."""
    shards: int
    """Planned shards."""
    images: int
    """Samples that hold a latent."""
    bad_images: int
    """Samples whose image could not be decoded."""
    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    class_titles: tuple[str, ...]
    """Names for humans, in the same order."""
    splits: tuple[SplitCard, ...]
    """In the order train, val, test."""
    scale: float
    """y = stored * scale + offset[channel]."""
    stored_bytes: int
    """Bytes of shards and index parts."""
    disk_bytes: int
    """Bytes of everything in the folder."""
    bytes_per_image: float | None
    """`stored_bytes` per image, all its views together; None without images."""
    source_ratio: float | None
    """`stored_bytes` over the bytes of the source files; None without images."""
    clipped: int
    """Symbols saturated at the dtype's limit."""
    clipped_share: float
    """Their share of all stored values."""
    source: str
    """Where the images were read from."""
    fingerprint_digest: str
    """sha256 of the fingerprint, 64 hex digits."""
    fingerprint: Fingerprint
    """Image settings, views, encoder with its weights' digest, and latents."""
    layout: LayoutSpec
    """Validation share, seed, codec and the like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeEntry(Record):
    """One line of a folder's tree: a file at the top, or all files of one folder together."""

    path: str
    """Posix path relative to the cache folder; a folder's ends in a slash."""
    files: int
    """Number of files."""
    bytes: int
    """Their bytes."""
    shards: int
    """How many of them are shards."""


def describe(cache: Cache) -> CacheCard:
    """Describes a cache; opened with `partial=True` it may be one that is still being encoded.

    Raises:
        ManifestError: the small arrays or a commit record are damaged.
        ShardError: an index part of an incomplete cache is damaged.
    """
    manifest, fingerprint = cache.manifest, cache.fingerprint
    splits = tuple(_split_card(split) for split in cache.values())
    images = sum(split.valid_rows for split in splits)
    stored = sum(split.stored_bytes for split in splits)
    source_bytes = sum(split.source_bytes for split in splits)
    clipped = sum(split.clipped for split in splits)
    values = int(np.prod(fingerprint.latent.shape)) * sum(
        split.valid_rows * split.views for split in splits
    )
    return CacheCard(
        path=str(cache.path),
        software=manifest.software,
        complete=cache.is_complete,
        committed_shards=sum(split.committed_shards for split in splits),
        shards=sum(split.shards for split in splits),
        images=images,
        bad_images=sum(split.bad_rows for split in splits),
        classes=cache.classes,
        class_titles=cache.class_titles,
        splits=splits,
        scale=manifest.scale,
        stored_bytes=stored,
        disk_bytes=sum(entry.bytes for entry in folder_tree(cache.path)),
        bytes_per_image=stored / images if images else None,
        source_ratio=stored / source_bytes if source_bytes else None,
        clipped=clipped,
        clipped_share=clipped / max(values, 1),
        source=manifest.source,
        fingerprint_digest=fingerprint.digest,
        fingerprint=fingerprint,
        layout=manifest.layout,
    )


def stored_rows(split: Split) -> npt.NDArray[np.int64]:
    """Returns the rows that hold a latent, ascending, int64; also of a split half encoded.

    Raises:
        ManifestError: the array of valid rows is damaged.
        ShardError: an index part of an incomplete cache is damaged.
    """
    if split.cache.is_complete:
        return np.asarray(split.valid_rows, np.int64)
    parts = [
        table.filter(pc.equal(table["status"], "ok"))["row"].to_numpy()
        for table in index_parts(split, ["row", "status"])
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


def index_parts(split: Split, columns: list[str]) -> Iterator[pa.Table]:
    """Yields some columns of each committed index part of a split, in row order.

    Raises:
        ShardError: a part is missing or damaged.
    """
    for shard in split.committed():
        yield split.read_index(shard, columns)


def folder_tree(root: str | Path) -> tuple[TreeEntry, ...]:
    """Sums up a cache folder: its own files one by one, then every folder's files together.

    Sizes are as listed, links are not followed; what cannot be listed is left out.
    """
    base = Path(root)
    found: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for path in sorted(base.rglob("*")):
        if path.is_symlink() or path.is_file():
            relative = path.relative_to(base)
            top = relative.parent == Path()
            place = relative.name if top else f"{relative.parent.as_posix()}/"
            found[place].append((relative.name, path.lstat().st_size))
    entries = [
        TreeEntry(
            path=place,
            files=len(files),
            bytes=sum(size for _, size in files),
            shards=sum(shard_of(place + name) is not None for name, _ in files)
            if place.endswith("/latents/") or place == "tar/"
            else 0,
        )
        for place, files in found.items()
    ]
    return tuple(sorted(entries, key=lambda entry: (entry.path.endswith("/"), entry.path)))


def _split_card(split: Split) -> SplitCard:
    record = split.record
    shards = split.committed()
    if record.valid_rows is None:
        counted = _count_committed(split)
    else:
        counted = _Counted(
            valid_rows=record.valid_rows,
            bad_rows=record.rows - record.valid_rows,
            class_counts=_class_counts(split, split.labels[split.valid]),
            stored_bytes=record.bytes or 0,
            source_bytes=record.source_bytes or 0,
            clipped=record.clipped or 0,
            exif_turned=record.exif_turned or 0,
        )
    return SplitCard(
        name=split.name,
        rows=record.rows,
        views=record.views,
        shape=split.shape,
        shards=record.num_shards,
        committed_shards=len(shards),
        shard_rows=record.shard_rows,
        **asdict(counted),
    )


@dataclass(slots=True)
class _Counted:
    """The part of a split's card that a finished manifest knows and a committed index tells."""

    valid_rows: int = 0
    bad_rows: int = 0
    class_counts: tuple[int, ...] = ()
    stored_bytes: int = 0
    source_bytes: int = 0
    clipped: int = 0
    exif_turned: int = 0


def _count_committed(split: Split) -> _Counted:
    """Adds up the committed index parts of a split whose encoding has not finished."""
    counted = _Counted()
    labels: list[int] = []
    columns = ["label", "status", "source_bytes", "clipped", "exif_orientation"]
    for table in index_parts(split, columns):
        good = table.filter(pc.equal(table["status"], "ok"))
        labels += good["label"].to_pylist()
        counted.bad_rows += table.num_rows - good.num_rows
        counted.source_bytes += pc.sum(good["source_bytes"]).as_py() or 0
        counted.clipped += pc.sum(good["clipped"]).as_py() or 0
        counted.exif_turned += pc.sum(pc.not_equal(good["exif_orientation"], 1)).as_py() or 0
    commits = [split.read_commit(shard) for shard in split.committed()]
    counted.valid_rows = len(labels)
    counted.stored_bytes = sum(
        file.bytes for commit in commits if commit is not None for file in commit.files
    )
    counted.class_counts = _class_counts(split, np.array(labels, np.int32))
    return counted


def _class_counts(split: Split, labels: npt.NDArray[Any]) -> tuple[int, ...]:
    classes = split.cache.classes
    outside = labels[labels >= len(classes)]
    if outside.size:
        raise ManifestError(
            f"split {split.name!r} of {split.cache.path} has label {outside[0]}, and there are "
            f"{len(classes)} classes",
            hint=split.cache.repair_hint,
        )
    return tuple(np.bincount(labels[labels >= 0], minlength=len(classes)).tolist())
