"""How much memory a parquet file will take, read from its page headers before any page is.

A page says in its header how large it becomes, and pyarrow allocates that at once: a file of a few
kilobytes can ask for gigabytes. Layout: parquet-format 2.10, "Column chunks"; page headers are
structs of thrift's compact protocol (thrift/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

__all__ = ["require_small_pages"]

_MAX_HEADER_BYTES = 2**16
_MAX_DEPTH = 8

_FREE_BYTES, _MAX_RATIO = 64 * 2**20, 64
"""A file may unpack to 64 MiB and 64 times its size: ours do to about 5 times."""

_FREE_VALUES, _MAX_VALUES_PER_BYTE = 2**18, 16
"""Values of one column: each row of ours has a key of its own, hence at least a byte."""


def require_small_pages(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuses a parquet file that would unpack to far more than it has.

    Args:
        path: The file.
        metadata: Its footer.

    Raises:
        ValueError: it would, or its pages are not where the footer says.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        total = 0
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(number)
                unpacked, values = _sum_pages(descriptor, chunk, size)
                total += unpacked
                if total > _FREE_BYTES + _MAX_RATIO * size:
                    raise ValueError(f"it would unpack from {size} to more than {total} bytes")
                if max(values, metadata.num_rows) > _FREE_VALUES + _MAX_VALUES_PER_BYTE * size:
                    raise ValueError(f"it says {values} values in {size} bytes")
    finally:
        os.close(descriptor)


def _sum_pages(descriptor: int, chunk: pq.ColumnChunkMetaData, size: int) -> tuple[int, int]:
    """Returns the unpacked bytes of a column chunk's pages, and the values they speak of."""
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    position = min(offset for offset in offsets if offset)
    end = position + chunk.total_compressed_size
    if not 0 < position <= end <= size:
        raise ValueError("a column lies outside the file")
    unpacked = values = 0
    while position < end:
        header = _Compact(os.pread(descriptor, _MAX_HEADER_BYTES, position))
        try:
            fields = header.struct()
        except IndexError as error:
            raise ValueError("a page header is damaged") from error
        page, packed = fields.get(2), fields.get(3)
        if not (isinstance(page, int) and isinstance(packed, int) and page >= 0 and packed >= 0):
            raise ValueError("a page header is damaged")
        unpacked += page
        # Data page, dictionary page and data page of version 2, each with its count first.
        counts = [
            fields[kind].get(1, 0) for kind in (5, 7, 8) if isinstance(fields.get(kind), dict)
        ]
        values += sum(count for count in counts if isinstance(count, int))
        position += header.position + packed
    return unpacked, values


@dataclass(slots=True)
class _Compact:
    """A reader of thrift's compact protocol; IndexError where the bytes end."""

    data: bytes
    position: int = field(default=0)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Returns the fields of a struct by number; what is neither integer nor struct is None."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._zigzag()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise IndexError(depth)
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 8:
            length = self._varint()
            self.position += length
        elif kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(min(count, _MAX_HEADER_BYTES)):
                # In a list a boolean takes a byte, in a struct it is its own type.
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
        elif kind in (3, 7):
            self.position += 1 if kind == 3 else 8
        elif kind not in (1, 2):
            raise IndexError(kind)
        return None

    def _byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise IndexError(self.position)

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
