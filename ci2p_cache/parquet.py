"""Parquet files: written as the same bytes by every pyarrow, and read with bounded memory.

A page says in its header how large it becomes, and pyarrow allocates that at once: a file of a few
kilobytes can ask for gigabytes. So footer and page headers are read here before any page. pyarrow's
own view of the footer is not used: asked for a column whose statistics do not fit, it aborts the
process. Layout: parquet-format 2.10, "File format" and "Column chunks"; footer and headers are
structs of thrift's compact protocol (thrift/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["RowGroup", "parquet_bytes", "read_parquet", "require_small_pages"]

_MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 2**20
"""Ours have 23 kB, most of it the channel sums; parsed, a hostile one takes 64 times its size."""
_MAX_HEADER_BYTES = 2**16
_MAX_DEPTH = 12

_FREE_BYTES, _MAX_RATIO = 64 * 2**20, 64
"""A file may unpack to 64 MiB and 64 times its size: ours do to about 5 times."""

_FREE_VALUES, _MAX_VALUES_PER_BYTE = 2**18, 16
"""Values of one column: each of our rows has its own key, hence at least a byte."""

_MAX_TEXT_RATIO = 256
"""Bytes of one text column over those of the file: our keys take about twice the file."""

_WRITER = b"parquet-cpp-arrow version "
_CREATED_BY = _WRITER + b"25.0.1"
"""What every footer says in `created_by`; the other bytes are the same from pyarrow 22 to 26."""


def parquet_bytes(table: pa.Table) -> bytes:
    """Serialises a table to parquet with page checksums.

    The same table gives the same bytes with every pyarrow that is allowed: `created_by` would name
    its version, and no option of pyarrow's sets it.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    # In thrift's compact protocol a text of up to 127 bytes follows one byte, its length. The
    # footer's length and a magic number end the file (parquet-format 2.10, "File format").
    start = data.rindex(_WRITER)
    end = start + data[start - 1]
    length = int.from_bytes(data[-8:-4], "little") + len(_CREATED_BY) - (end - start)
    return b"".join(
        (
            *(data[: start - 1], bytes([len(_CREATED_BY)]), _CREATED_BY, data[end:-8]),
            *(length.to_bytes(4, "little"), data[-4:]),
        )
    )


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, *, schemas: Sequence[pa.Schema] = ()
) -> pa.Table:
    """Reads a parquet file with every page's checksum verified; it may come from a stranger.

    Args:
        path: The file.
        columns: The columns wanted; None for all.
        schemas: The schemas it may have; none given: any.

    Raises:
        OSError: the file is missing, is a link or no file, unpacks to far more than it has, has
            another schema, or a checksum or the structure is wrong (pyarrow's ArrowException is
            re-raised as OSError).
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is a link or no regular file")
    opened = partial(
        pq.ParquetFile,
        path,
        page_checksum_verification=True,
        thrift_string_size_limit=2**24,
        thrift_container_size_limit=2**16,
    )
    try:
        require_small_pages(path)
        with opened() as file:
            known, metadata = file.schema_arrow, file.metadata
        if schemas and known not in schemas:
            raise OSError(f"{path} has another schema than ci2p-cache writes")  # noqa: TRY301
        # Kept as dictionaries: one long text that many rows refer to would be copied for each.
        texts = [field.name for field in known if field.type in (pa.string(), pa.binary())]
        with opened(read_dictionary=texts, metadata=metadata) as file:
            table = file.read(columns=None if columns is None else list(columns))
        return _without_dictionaries(table, texts, _MAX_TEXT_RATIO * max(found.st_size, 2**16))
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def _without_dictionaries(table: pa.Table, texts: Sequence[str], max_bytes: int) -> pa.Table:
    """Returns the table with plain text columns, none of more than `max_bytes`."""
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if name not in texts or not pa.types.is_dictionary(column.type):
            continue
        lengths = (pc.binary_length(part.dictionary).take(part.indices) for part in column.chunks)
        total = sum(pc.sum(part).as_py() or 0 for part in lengths)
        if total > max_bytes:
            raise ValueError(f"column {name} would unpack to {total} bytes")
        field = table.schema.field(number).with_type(column.type.value_type)
        table = table.set_column(number, field, column.cast(column.type.value_type))
    return table


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A part of a parquet file that is read as a whole."""

    rows: int
    """Rows, as the footer says."""
    unpacked_bytes: int
    """What its pages unpack to, as their headers say."""


def require_small_pages(
    path: str | os.PathLike[str], *, max_footer_bytes: int = MAX_FOOTER_BYTES
) -> list[RowGroup]:
    """Refuses a parquet file that would unpack to far more than it has.

    Args:
        path: The file.
        max_footer_bytes: A longer footer is not parsed; parsing takes up to 64 times its size.

    Returns:
        Its row groups, in order.

    Raises:
        ValueError: it would, or its pages are not where the footer says.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        footer = _footer(descriptor, size, max_footer_bytes)
        total = 0
        groups = []
        for group in _items(footer, 4):
            before = total
            for column in _items(group, 1):
                # ColumnMetaData, by field number.
                (chunk,) = _items({3: [column.get(3)]}, 3)
                unpacked, values = _sum_pages(descriptor, chunk, size)
                total += unpacked
                if total > _FREE_BYTES + _MAX_RATIO * size:
                    raise ValueError(f"it would unpack from {size} to more than {total} bytes")
                if max(values, _number(footer, 3)) > _FREE_VALUES + _MAX_VALUES_PER_BYTE * size:
                    raise ValueError(f"it says {values} values in {size} bytes")
            groups.append(RowGroup(_number(group, 3), total - before))
        return groups
    finally:
        os.close(descriptor)


def _footer(descriptor: int, size: int, max_bytes: int) -> dict[int, Any]:
    """Returns FileMetaData by field number."""
    tail = os.pread(descriptor, 8, max(size - 8, 0))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 12:
        raise ValueError("it does not end as a parquet file does")
    if length > max_bytes:
        raise ValueError(f"its footer has {length} bytes; at most {max_bytes} are read")
    return _struct(os.pread(descriptor, length, size - 8 - length), "its footer")[0]


def _items(fields: dict[int, Any], number: int) -> list[dict[int, Any]]:
    found = fields.get(number)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("its footer is damaged")
    return found


def _number(fields: dict[int, Any], number: int, default: int | None = None) -> int:
    found = fields.get(number, default)
    if not isinstance(found, int) or found < 0:
        raise ValueError("its footer is damaged")
    return found


def _sum_pages(descriptor: int, chunk: dict[int, Any], size: int) -> tuple[int, int]:
    """Returns the unpacked bytes of a column chunk's pages, and the values they speak of."""
    # A dictionary page, where there is one, comes first; files exist that say it is at 0.
    position = min(filter(None, (_number(chunk, 11, 0), _number(chunk, 9))), default=0)
    end = position + _number(chunk, 7)
    if not 0 < position <= end <= size:
        raise ValueError("a column is outside the file")
    unpacked = values = 0
    while position < end:
        data = os.pread(descriptor, min(_MAX_HEADER_BYTES, end - position), position)
        fields, header_bytes = _struct(data, "a page header")
        page, packed = fields.get(2), fields.get(3)
        if not (isinstance(page, int) and isinstance(packed, int) and page >= 0 and packed >= 0):
            raise ValueError("a page header is damaged")
        unpacked += page
        # Data page, dictionary page and data page of version 2, each with its count first.
        counts = [
            fields[kind].get(1, 0) for kind in (5, 7, 8) if isinstance(fields.get(kind), dict)
        ]
        values += sum(count for count in counts if isinstance(count, int))
        position += header_bytes + packed
    return unpacked, values


def _struct(data: bytes, name: str) -> tuple[dict[int, Any], int]:
    """Parses a struct; returns its fields by number, and its length in bytes."""
    reader = _Compact(data)
    try:
        return reader.struct(), reader.position
    except IndexError as error:
        raise ValueError(f"{name} is damaged") from error


@dataclass(slots=True)
class _Compact:
    """A reader of thrift's compact protocol; IndexError where the bytes end."""

    data: bytes
    position: int = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Returns the fields of a struct by number; texts, floats and booleans are None."""
        fields: dict[int, Any] = {}
        data, number = self.data, 0
        while head := data[self.position]:
            self.position += 1
            step = head >> 4
            number = number + step if step else self._zigzag()
            fields[number] = self._value(head & 15, depth)
        self.position += 1
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise IndexError(depth)
        if 4 <= kind <= 6:
            return self._zigzag()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 8:
            length = self._varint()
            self.position += length
        elif kind in (9, 10):
            head = self.data[self.position]
            self.position += 1
            count = head >> 4 if head >> 4 < 15 else self._varint()
            # In a list a boolean takes a byte, in a struct it is its own type.
            item = 3 if head & 15 in (1, 2) else head & 15
            return [self._value(item, depth + 1) for _ in range(min(count, len(self.data)))]
        elif kind in (3, 7):
            self.position += 1 if kind == 3 else 8
        elif kind not in (1, 2):
            raise IndexError(kind)
        return None

    def _varint(self) -> int:
        data, position = self.data, self.position
        value = data[position] & 0x7F
        shift = 0
        while data[position] >= 0x80:
            position, shift = position + 1, shift + 7
            if shift == 70:
                raise IndexError(position)
            value |= (data[position] & 0x7F) << shift
        self.position = position + 1
        return value

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
