"""Index parts: one parquet file per shard that says, row by row, what was encoded from what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ci2p_cache.cache.commit import CommitRecord, sha256_file
from ci2p_cache.cache.paths import index_path
from ci2p_cache.errors import ManifestError, ShardError, command
from ci2p_cache.parquet import parquet_bytes, read_parquet

__all__ = [
    "INDEX_SCHEMA", "ChannelSums", "IndexRow", "index_bytes", "index_rows", "read_index",
    "read_sums", "require_intact",
]  # fmt: skip

_BOX_SIDES = [(name, pa.int32()) for name in ("top", "left", "height", "width")]
_REQUIRED = {"split", "row", "key", "label", "class", "path", "path_bytes", "status"}
_COLUMNS = {
    "split": pa.string(), "row": pa.int64(), "key": pa.string(), "label": pa.int32(),
    "class": pa.string(), "path": pa.string(), "path_bytes": pa.binary(),
    "source_bytes": pa.int64(), "source_sha256": pa.string(), "width": pa.int32(),
    "height": pa.int32(), "mode": pa.string(), "format": pa.string(), "exif_orientation": pa.int8(),
    "boxes": pa.list_(pa.struct([*_BOX_SIDES, ("flip", pa.bool_())])), "status": pa.string(),
    "error": pa.string(), "clipped": pa.int32(), "latent_crc32c": pa.list_(pa.uint32()),
    "tar_offset": pa.list_(pa.int64()),
}  # fmt: skip

INDEX_SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=name not in _REQUIRED) for name, kind in _COLUMNS.items()]
)
"""Columns of an index part; cache/README.md gives their meaning."""

_OLD_SCHEMA = INDEX_SCHEMA.remove(0)
"""Columns of the parts of caches made before there was `split`."""

_SUMS_KEY = b"ci2p_channel_sums"


@dataclass(slots=True)
class IndexRow:
    """One sample as it was encoded; fields as in `INDEX_SCHEMA` but `split`, None if not known."""

    row: int
    key: str
    label: int
    class_name: str
    path: str
    path_bytes: bytes
    source_bytes: int | None = None
    source_sha256: str | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    format: str | None = None
    exif_orientation: int | None = None
    boxes: list[dict[str, Any]] | None = None
    status: str = "ok"
    error: str | None = None
    clipped: int | None = None
    latent_crc32c: list[int] | None = None
    tar_offset: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """Per-channel sums over the stored values of one shard; adding two gives the sums of both.

    All arrays are float64 (M,). Integers add up exactly, so any order gives the same sums.
    """

    count: int
    total: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    zeros: npt.NDArray[np.float64]
    clipped: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> ChannelSums:
        """Returns the sums over nothing."""
        zero = np.zeros(channels)
        return cls(0, zero, zero, np.full(channels, np.inf), np.full(channels, -np.inf), zero, zero)

    @classmethod
    def of(cls, stored: npt.NDArray[np.float64], clipped: npt.NDArray[np.float64]) -> ChannelSums:
        """Sums over stored values (B, M, h, w) and clip counts (M,)."""
        if stored.size == 0:
            return cls.empty(stored.shape[1])
        axes = (0, 2, 3)
        return cls(
            count=stored.size // stored.shape[1],
            total=stored.sum(axis=axes, dtype=np.float64),
            squares=np.einsum("bchw,bchw->c", stored, stored, dtype=np.float64, casting="safe"),
            low=stored.min(axis=axes).astype(np.float64),
            high=stored.max(axis=axes).astype(np.float64),
            zeros=(stored == 0).sum(axis=axes).astype(np.float64),
            clipped=clipped.astype(np.float64),
        )

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.zeros + other.zeros,
            self.clipped + other.clipped,
        )


def index_bytes(rows: Sequence[IndexRow], sums: ChannelSums, *, split: str | None) -> bytes:
    """Serialises a shard's index part, its channel sums in the schema's metadata.

    Args:
        rows: Its rows, in order.
        sums: Its channel sums.
        split: For the column `split`; None leaves it out, as older caches have it.
    """
    columns = {
        name: [getattr(row, "class_name" if name == "class" else name) for row in rows]
        for name in _OLD_SCHEMA.names
    }
    table = pa.table(columns, schema=_OLD_SCHEMA)
    if split is not None:
        table = _with_split(table, split)
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(sums).items()}
    metadata = {_SUMS_KEY: json.dumps(values).encode()}
    return parquet_bytes(table.replace_schema_metadata(metadata))


def require_intact(root: Path, commit: CommitRecord) -> None:
    """Refuses an index part that is not what was committed, as where few of its pages are read."""
    path = index_path(commit.split, commit.shard)
    listed = commit.file(path).sha256
    try:
        intact = sha256_file(root / path) == listed
    except (OSError, ManifestError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{root / path} cannot be read: {reason}") from error
    if not intact:
        raise ShardError(
            f"{root / path} is damaged: its sha256 is not that in its commit record",
            hint=command("verify", root, "--repair"),
        )


def read_index(
    root: Path, split: str, shard: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads the index part of a shard: `columns` of `INDEX_SCHEMA`, None for all, in its order.

    Parts of older caches have no column `split`; it is added here.

    Raises:
        ShardError: it is missing or damaged.
    """
    wanted = [name for name in INDEX_SCHEMA.names if columns is None or name in columns]
    # With `row`, because a table without columns has no length.
    names = wanted if wanted != ["split"] else ["split", "row"]
    try:
        table = read_parquet(
            root / index_path(split, shard), names, schemas=(INDEX_SCHEMA, _OLD_SCHEMA)
        )
    except OSError as error:
        raise ShardError(
            f"index of {split} shard {shard}: {error}",
            hint=command("verify", root, "--repair"),
        ) from error
    if "split" in wanted and "split" not in table.column_names:
        table = _with_split(table, split)
    return table.select(wanted)


def _with_split(table: pa.Table, split: str) -> pa.Table:
    return table.add_column(0, INDEX_SCHEMA.field("split"), pa.repeat(split, table.num_rows))


def index_rows(table: pa.Table) -> list[IndexRow]:
    """Returns the rows of a whole index part; `index_bytes` gives the same part from them again."""
    table = table.select(_OLD_SCHEMA.names).replace_schema_metadata(None)
    return [IndexRow(class_name=values.pop("class"), **values) for values in table.to_pylist()]


def read_sums(table: pa.Table) -> ChannelSums:
    """Returns the channel sums that an index part carries; ShardError where it has none."""
    try:
        values = json.loads(table.schema.metadata[_SUMS_KEY])
        count = int(values.pop("count"))
        arrays = {name: np.array(value, np.float64) for name, value in values.items()}
        return ChannelSums(count, **arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"the channel sums of an index part are damaged: {error!r}") from error
