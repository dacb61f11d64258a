"""The card of one sample: what was read, and what is stored of it."""

from __future__ import annotations

import difflib
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow.compute as pc

from ci2p_cache.cache.card import index_parts
from ci2p_cache.cache.index import INDEX_SCHEMA, IndexRow, index_rows
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import IncompleteCacheError, ShardError, UsageError, command
from ci2p_cache.record import Record

__all__ = ["BoxCard", "LatentCard", "SampleCard", "describe_row", "describe_sample", "read_row"]

_MAX_COMPARED_KEYS = 20_000
"""A missing key is held against that many others at most: about half a second of difflib."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxCard(Record):
    """Where a view was cut, in pixels of the decoded image."""

    top: int
    """First row."""
    left: int
    """First column."""
    height: int
    """Rows."""
    width: int
    """Columns."""
    flip: bool
    """Whether the cut was mirrored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCard(Record):
    """One stored latent; the statistics are of the stored values: symbols, or y for floats."""

    stored_bytes: int
    """Bytes on disk."""
    raw_bytes: int
    """Bytes before compression."""
    minimum: float
    """Least value."""
    maximum: float
    """Greatest value."""
    mean: float
    """Mean value."""
    zero_share: float
    """Share of zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCard(Record):
    """One sample: what was read, and what is stored of it."""

    split: str
    """Its split."""
    row: int
    """Its row in the split."""
    shard: int
    """The shard that holds it."""
    key: str
    """Its name within the split."""
    label: int
    """Index of its class; -1 where not known."""
    class_name: str
    """Name of its class."""
    class_title: str
    """The class's name for humans."""
    source_file: str
    """Where it was read from: a file, or what in an archive or list."""
    source_bytes: int | None
    """Size of that file; None if it could not be read."""
    source_sha256: str | None
    """Digest of that file."""
    width: int | None
    """Pixels per row in the file; None where it could not be decoded, as below."""
    height: int | None
    """Rows in the file."""
    mode: str | None
    """Pixel kind, such as RGB or L."""
    format: str | None
    """JPEG, PNG, ..."""
    exif_orientation: int | None
    """1-8; 1 is upright."""
    boxes: tuple[BoxCard, ...]
    """One per view."""
    status: str
    """ok or invalid."""
    error: str | None
    """Why it is invalid."""
    clipped: int | None
    """Saturated symbols, over all views."""
    latents: tuple[LatentCard, ...]
    """One per view; empty where the image could not be decoded."""


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
    """Describes the sample in a row.

    Raises:
        UsageError: there is no such row.
        IncompleteCacheError: its shard is not committed yet.
        ShardError: its shard or index part is missing or damaged.
    """
    entry = read_row(split, row)
    return SampleCard(
        split=split.name,
        row=row,
        shard=row // split.record.shard_rows,
        key=entry.key,
        label=entry.label,
        class_name=entry.class_name,
        class_title=split.cache.class_titles[entry.label] if entry.label >= 0 else "",
        source_file=_source_file(split.cache.manifest.source, entry.path),
        source_bytes=entry.source_bytes,
        source_sha256=entry.source_sha256,
        width=entry.width,
        height=entry.height,
        mode=entry.mode,
        format=entry.format,
        exif_orientation=entry.exif_orientation,
        boxes=tuple(BoxCard.from_dict(box) for box in entry.boxes or ()),
        status=entry.status,
        error=entry.error,
        clipped=entry.clipped,
        latents=_latent_cards(split, row) if entry.status == "ok" else (),
    )


def _source_file(source: str, path: str) -> str:
    """Returns where an image is: a path below a source folder, else its place in the archives."""
    file = Path(source) / path
    with suppress(OSError, ValueError):  # names that no file system takes
        # `#` parts an archive from a place in it; a file's name may hold one too.
        if file.exists() or (Path(source).is_dir() and "#" not in path):
            return str(file)
    return f"{path} in {source}"


def read_row(split: Split, row: int) -> IndexRow:
    """Reads what the index says of one row.

    Raises:
        UsageError: there is no such row.
        IncompleteCacheError: its shard is not committed yet.
        ShardError: its index part is missing or damaged.
    """
    if not 0 <= row < split.num_rows:
        raise UsageError(
            f"row {row} is not in split {split.name!r} of {split.cache.path}; it has rows 0 to "
            f"{split.num_rows - 1}"
        )
    shard, offset = divmod(row, split.record.shard_rows)
    if split.read_commit(shard) is None:
        raise IncompleteCacheError(
            f"row {row} of split {split.name!r} is in shard {shard}, which is not encoded yet",
            hint=command(
                "encode",
                split.cache.manifest.source,
                "--out",
                split.cache.path,
                note="with the options that it was started with",
            ),
        )
    table = split.read_index(shard, INDEX_SCHEMA.names)
    if table.num_rows != len(split.record.rows_of(shard)) or table["row"][offset].as_py() != row:
        raise _index_damage(split, shard, f"row {row} is not where the plan puts it")
    values = table.slice(offset, 1).to_pylist()[0]
    classes = len(split.cache.classes)
    if not -1 <= values["label"] < classes:
        raise _index_damage(
            split, shard, f"row {row} has label {values['label']}; there are {classes} classes"
        )
    if values["status"] == "ok" and len(values["boxes"] or ()) != split.num_views:
        raise _index_damage(split, shard, f"row {row} has not one box per view")
    return index_rows(table.slice(offset, 1))[0]


def _index_damage(split: Split, shard: int, problem: str) -> ShardError:
    return ShardError(
        f"{split.index_file(shard)} is damaged: {problem}",
        hint=split.cache.repair_hint,
    )


def _find_key(split: Split, key: str) -> int:
    """Returns the row of a key."""
    others: list[str] = []
    for table in index_parts(split, ["row", "key"]):
        place = pc.index(table["key"], key).as_py()
        if place >= 0:
            return int(table["row"][place].as_py())
        if len(others) < _MAX_COMPARED_KEYS:
            others += table["key"].to_pylist()
    near = _near_key(others, key)
    raise UsageError(
        f"no sample of split {split.name!r} of {split.cache.path} has the key {key!r}"
        + (
            "" if split.cache.is_complete else "; shards that are not encoded yet were not searched"
        ),
        hint=f"did you mean {shlex.quote(near)}?" if near else None,
    )


def _near_key(keys: list[str], key: str) -> str | None:
    """Returns a key of the same file name, else one that contains the text, else one like it."""
    name, text = PurePosixPath(key).stem, key.lower()
    same = (other for other in keys if PurePosixPath(other).stem == name)
    containing = (other for other in keys if text in other.lower())
    near = next(same, None) or next(containing, None)
    if near is None:
        near = next(iter(difflib.get_close_matches(key, keys[:_MAX_COMPARED_KEYS], n=1)), None)
    return near


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
