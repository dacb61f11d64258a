"""What a cache, its folder and its samples are, as values that any front end shows.

Nothing here needs the encoder; a cache whose encoding has not finished is described as far as it
is committed.
"""

from __future__ import annotations

import difflib
import shlex
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.index import IndexRow, index_rows
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import shard_of
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import (
    IncompleteCacheError,
    ManifestError,
    ShardError,
    UsageError,
    command,
    size,
)
from ci2p_cache.record import Record
from ci2p_cache.specs import Fingerprint, LayoutSpec

__all__ = [
    "CacheCard", "LatentCard", "SampleCard", "SplitCard", "StoredSize", "TreeEntry", "describe",
    "describe_row", "describe_sample", "folder_tree", "index_parts", "read_row", "stored_size",
]  # fmt: skip

_MAX_COMPARED_KEYS = 20_000
"""A missing key is compared with that many others at most: about half a second of difflib."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCard(Record):
    """One split: what is planned, and of a cache that is not complete, what is committed."""

    name: str
    rows: int
    valid_rows: int
    """Samples that hold a latent."""
    bad_rows: int
    """Samples whose image could not be decoded."""
    views: int
    """Views per sample."""
    shape: tuple[int, ...]
    """(N, V, M, h, w) of the latents' array."""
    shards: int
    committed_shards: int
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
class StoredSize(Record):
    """What shards and index parts take, over what they hold; fields are None without images."""

    bytes_per_view: float | None
    bytes_per_image: float | None
    """All views of an image together."""
    views_per_image: float | None
    """The mean: splits may have different numbers of views."""
    source_ratio: float | None
    """Over the bytes of the source files; None where these are not known."""

    @property
    def size_words(self) -> tuple[str, ...]:
        """What to show of it, a phrase each."""
        if self.bytes_per_view is None or self.bytes_per_image is None:
            return ()
        phrases = (
            f"{size(self.bytes_per_view)} per view",
            f"{size(self.bytes_per_image)} per image with {self.views_per_image:.3g} views",
            f"{self.source_ratio:.2f} x the source files" if self.source_ratio else "",
        )
        return tuple(filter(None, phrases))


def stored_size(
    stored_bytes: int, *, images: int, views: int, source_bytes: int | None
) -> StoredSize:
    """Divides the bytes of shards and index parts by what they hold.

    Args:
        stored_bytes: Of shards and index parts.
        images: Images in them.
        views: Latents in them, of all images together.
        source_bytes: Of the images' source files; None where they are not known.
    """
    return StoredSize(
        bytes_per_view=stored_bytes / views if views else None,
        bytes_per_image=stored_bytes / images if images else None,
        views_per_image=views / images if images else None,
        source_ratio=stored_bytes / source_bytes if source_bytes else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCard(StoredSize):
    """What a cache is: its manifest's fields, and what its splits hold together."""

    path: str
    software: str
    complete: bool
    committed_shards: int
    shards: int
    images: int
    """Samples that hold a latent."""
    bad_images: int
    classes: tuple[str, ...]
    class_titles: tuple[str, ...]
    splits: tuple[SplitCard, ...]
    scale: float
    """y = stored * scale + offset[channel]."""
    stored_bytes: int
    disk_bytes: int
    """Bytes of everything in the folder."""
    clipped: int
    clipped_share: float
    """`clipped` over the number of all stored values."""
    source: str
    fingerprint_digest: str
    fingerprint: Fingerprint
    layout: LayoutSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeEntry(Record):
    """One line of a folder's tree: a file at the top, or all files of one folder together."""

    path: str
    """Posix path relative to the cache folder; a folder's ends in a slash."""
    files: int
    bytes: int
    shards: int
    """How many of the files are shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCard(Record):
    """One stored latent; the statistics are of the stored values: symbols, or y for floats."""

    stored_bytes: int
    """Bytes on disk."""
    raw_bytes: int
    """Bytes before compression."""
    minimum: float
    maximum: float
    mean: float
    zero_share: float


@dataclass(kw_only=True, slots=True)
class SampleCard(IndexRow):
    """One sample: its row of the index, and what is stored of it."""

    split: str
    shard: int
    class_title: str
    """The class's name for humans."""
    source_file: str
    """Where it was read from: a file, or what in an archive or list."""
    latents: tuple[LatentCard, ...]
    """One per view; empty where the image could not be decoded."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, without those that only readers need."""
        fields = asdict(self)
        return {name: fields[name] for name in _SHOWN}


_SHOWN = (
    "split", "row", "shard", "key", "label", "class_name", "class_title", "source_file",
    "source_bytes", "source_sha256", "width", "height", "mode", "format", "exif_orientation",
    "boxes", "status", "error", "clipped", "latents",
)  # fmt: skip


def describe(cache: Cache) -> CacheCard:
    """Describes a cache; opened with `partial=True` it may be one that is still being encoded.

    Raises:
        ManifestError: the small arrays or a commit record are damaged.
        ShardError: an index part of an incomplete cache is damaged.
    """
    manifest, splits = cache.manifest, tuple(map(_split_card, cache.values()))
    copied = ("software", "classes", "class_titles", "scale", "source", "fingerprint", "layout")
    added = ("committed_shards", "shards", "stored_bytes", "clipped", "valid_rows", "bad_rows",
             "source_bytes")  # fmt: skip
    total: dict[str, Any] = {name: sum(getattr(split, name) for split in splits) for name in added}
    images, bad_images = total.pop("valid_rows"), total.pop("bad_rows")
    source_bytes = total.pop("source_bytes")
    latents = sum(split.valid_rows * split.views for split in splits)
    values = latents * int(np.prod(cache.fingerprint.latent.shape))
    return CacheCard(
        path=str(cache.path),
        complete=cache.is_complete,
        images=images,
        bad_images=bad_images,
        splits=splits,
        disk_bytes=sum(entry.bytes for entry in folder_tree(cache.path)),
        clipped_share=total["clipped"] / max(values, 1),
        fingerprint_digest=cache.fingerprint.digest,
        **stored_size(
            total["stored_bytes"], images=images, views=latents, source_bytes=source_bytes
        ).to_dict(),
        **total,
        **{name: getattr(manifest, name) for name in copied},
    )


def _split_card(split: Split) -> SplitCard:
    shards, classes = split.committed(), split.cache.classes
    labels = split.labels[split.valid]
    if labels.size and labels.max() >= len(classes):
        raise ManifestError(
            f"split {split.name!r} of {split.cache.path} has label {labels.max()}, and there are "
            f"{len(classes)} classes",
            hint=split.cache.repair_hint,
        )
    record, rows = split.record, split.num_rows
    if record.valid_rows is None:
        record = _record_so_far(split)
        rows = sum(len(record.rows_of(shard)) for shard in shards)
    return SplitCard(
        name=split.name,
        rows=record.rows,
        valid_rows=len(labels),
        bad_rows=rows - len(labels),
        views=record.views,
        shape=split.shape,
        shards=record.num_shards,
        committed_shards=len(shards),
        shard_rows=record.shard_rows,
        class_counts=tuple(np.bincount(labels[labels >= 0], minlength=len(classes)).tolist()),
        stored_bytes=record.bytes or 0,
        source_bytes=record.source_bytes or 0,
        clipped=record.clipped or 0,
        exif_turned=record.exif_turned or 0,
    )


def _record_so_far(split: Split) -> SplitRecord:
    """Returns the record that finalising would write if the committed shards were all."""
    commits = filter(None, map(split.read_commit, split.committed()))
    source_bytes = clipped = turned = 0
    for table in index_parts(split, ["status", "source_bytes", "clipped", "exif_orientation"]):
        good = table.filter(pc.equal(table["status"], "ok"))
        source_bytes += pc.sum(good["source_bytes"]).as_py() or 0
        clipped += pc.sum(good["clipped"]).as_py() or 0
        turned += pc.sum(pc.not_equal(good["exif_orientation"], 1)).as_py() or 0
    return replace(
        split.record,
        bytes=sum(file.bytes for commit in commits for file in commit.files),
        source_bytes=source_bytes,
        clipped=clipped,
        exif_turned=turned,
    )


def index_parts(split: Split, columns: list[str]) -> Iterator[pa.Table]:
    """Yields some columns of each committed index part of a split, in row order."""
    return (split.read_index(shard, columns) for shard in split.committed())


def folder_tree(root: str | Path) -> tuple[TreeEntry, ...]:
    """Sums up a cache folder: its own files one by one, then every folder's files together.

    Sizes are as listed, links are not followed; what cannot be listed is left out.
    """
    base = Path(root)
    found: defaultdict[str, list[tuple[int, bool]]] = defaultdict(list)
    for path in base.rglob("*"):
        if path.is_symlink() or path.is_file():
            name = path.relative_to(base).as_posix()
            folder = name[: name.rfind("/") + 1]
            holds_shards = folder.endswith("/latents/") or folder == "tar/"
            is_shard = holds_shards and shard_of(name) is not None
            found[folder or name].append((path.lstat().st_size, is_shard))
    names = sorted(found, key=lambda name: (name.endswith("/"), name))
    sums = {name: list(map(sum, zip(*found[name], strict=True))) for name in names}
    return tuple(
        TreeEntry(path=name, files=len(found[name]), bytes=size, shards=shards)
        for name, (size, shards) in sums.items()
    )


def describe_sample(
    cache: Cache, split: str, *, row: int | None = None, key: str | None = None
) -> SampleCard:
    """Describes one sample, found by its row or by its exact key.

    Raises:
        UsageError: not exactly one of `row` and `key` is given, or there is no such sample; the
            message of a key that is not found names one like it.
        IncompleteCacheError: the row's shard is not committed yet.
        ShardError: the sample's shard or index part is missing or damaged.
    """
    part = cache[split]
    if (row is None) == (key is None):
        raise UsageError(f"one of `row` and `key` is wanted, got row {row} and key {key!r}")
    if row is None:
        row = _find_key(part, str(key))
    return describe_row(part, row)


def describe_row(split: Split, row: int) -> SampleCard:
    """Describes the sample in a row; raises what `describe_sample` does."""
    entry, cache = read_row(split, row), split.cache
    fields = {name: getattr(entry, name) for name in IndexRow.__slots__}
    return SampleCard(
        **fields | {"boxes": entry.boxes or []},
        split=split.name,
        shard=row // split.record.shard_rows,
        class_title=cache.class_titles[entry.label] if entry.label >= 0 else "",
        source_file=_source_file(cache.manifest.source, entry.path),
        latents=_latent_cards(split, row) if entry.status == "ok" else (),
    )


def _source_file(source: str, path: str) -> str:
    """Returns where an image is: a path below a source folder, else where in the archives."""
    file = Path(source) / path
    with suppress(OSError, ValueError):  # names that no file system takes
        # `#` parts an archive from a name in it; a file's name may hold one too.
        if file.exists() or (Path(source).is_dir() and "#" not in path):
            return str(file)
    return f"{path} in {source}"


def read_row(split: Split, row: int) -> IndexRow:
    """Reads what the index says of one row; raises what `describe_sample` does."""
    cache = split.cache
    if not 0 <= row < split.num_rows:
        raise UsageError(
            f"row {row} is not in split {split.name!r} of {cache.path}; it has rows 0 to "
            f"{split.num_rows - 1}"
        )
    shard, offset = divmod(row, split.record.shard_rows)
    if split.read_commit(shard) is None:
        note = "with the options that it was started with"
        raise IncompleteCacheError(
            f"row {row} of split {split.name!r} is in shard {shard}, which is not encoded yet",
            hint=command("encode", cache.manifest.source, "--out", cache.path, note=note),
        )
    table, classes = split.read_index(shard), len(cache.classes)
    if table.num_rows == len(split.record.rows_of(shard)) and table["row"][offset].as_py() == row:
        found = index_rows(table.slice(offset, 1))[0]
        if not -1 <= found.label < classes:
            problem = f"row {row} has label {found.label}; there are {classes} classes"
        elif found.status == "ok" and len(found.boxes or ()) != split.num_views:
            problem = f"row {row} has not one box per view"
        else:
            return found
    else:
        problem = f"row {row} is not where the plan puts it"
    raise ShardError(f"{split.index_file(shard)} is damaged: {problem}", hint=cache.repair_hint)


def _find_key(split: Split, key: str) -> int:
    """Returns the row of a key."""
    others: list[str] = []
    for table in index_parts(split, ["row", "key"]):
        at = pc.index(table["key"], key).as_py()
        if at >= 0:
            return int(table["row"][at].as_py())
        if len(others) < _MAX_COMPARED_KEYS:
            others += table["key"].to_pylist()
    near = _near_key(others, key)
    rest = "" if split.cache.is_complete else "; shards that are not encoded yet were not searched"
    raise UsageError(
        f"no sample of split {split.name!r} of {split.cache.path} has the key {key!r}{rest}",
        hint=f"did you mean {shlex.quote(near)}?" if near else None,
    )


def _near_key(keys: list[str], key: str) -> str | None:
    """Returns a key of the same file name, else one that contains the text, else one like it."""
    name, text = PurePosixPath(key).stem, key.lower()
    same = (other for other in keys if PurePosixPath(other).stem == name)
    containing = (other for other in keys if text in other.lower())
    near = next(same, None) or next(containing, None)
    like = [] if near else difflib.get_close_matches(key, keys[:_MAX_COMPARED_KEYS], n=1)
    return next(iter(like), near)


def _latent_cards(split: Split, row: int) -> tuple[LatentCard, ...]:
    shard, offset = divmod(row, split.record.shard_rows)
    file = split.open_shard(shard)
    stored = np.empty(split.latent.shape, split.latent.dtype)
    cards = []
    for view in range(split.num_views):
        split.read_into(row, view, stored)
        values = stored.astype(np.float64)
        cards.append(
            LatentCard(
                stored_bytes=file.stored_bytes(offset * split.num_views + view),
                raw_bytes=split.latent.num_bytes,
                minimum=float(values.min()),
                maximum=float(values.max()),
                mean=float(values.mean()),
                zero_share=float((values == 0).mean()),
            )
        )
    return tuple(cards)
