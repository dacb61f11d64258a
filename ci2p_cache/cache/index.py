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

from ci2p_cache.cache.parquet import parquet_bytes, read_parquet
from ci2p_cache.cache.paths import index_path
from ci2p_cache.errors import ShardError, command

__all__ = [
    "INDEX_SCHEMA",
    "ChannelSums",
    "IndexRow",
    "index_bytes",
    "index_rows",
    "read_index",
    "read_sums",
]

_BOX = pa.struct(
    [
        ("top", pa.int32()),
        ("left", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("flip", pa.bool_()),
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("path_bytes", pa.binary(), nullable=False),
        pa.field("source_bytes", pa.int64()),
        pa.field("source_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("mode", pa.string()),
        pa.field("format", pa.string()),
        pa.field("exif_orientation", pa.int8()),
        pa.field("boxes", pa.list_(_BOX)),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("clipped", pa.int32()),
        pa.field("latent_crc32c", pa.list_(pa.uint32())),
        pa.field("tar_offset", pa.list_(pa.int64())),
    ]
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
    attributes = {name: name for name in _OLD_SCHEMA.names} | {"class": "class_name"}
    columns = {
        name: [getattr(row, attribute) for row in rows] for name, attribute in attributes.items()
    }
    table = pa.table(columns, schema=_OLD_SCHEMA)
    if split is not None:
        table = _with_split(table, split)
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(sums).items()}
    metadata = {_SUMS_KEY: json.dumps(values).encode()}
    return parquet_bytes(table.replace_schema_metadata(metadata))


def read_index(
    root: Path, split: str, shard: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads the index part of a shard, or some of its columns.

    Parts of older caches have no column `split`; it is added here.

    Args:
        root: The cache folder.
        split: The split.
        shard: Number of the shard.
        columns: Columns of `INDEX_SCHEMA`; None for all. They come in its order.

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
    """Returns the channel sums that an index part carries.

    Raises:
        ShardError: it carries none, or not in their form.
    """
    try:
        values = json.loads(table.schema.metadata[_SUMS_KEY])
        count = int(values.pop("count"))
        arrays = {name: np.array(value, np.float64) for name, value in values.items()}
        return ChannelSums(count, **arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"the channel sums of an index part are damaged: {error!r}") from error
