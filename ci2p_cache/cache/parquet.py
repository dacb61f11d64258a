"""A cache's parquet files: written as the same bytes by every pyarrow, and read with care."""

from __future__ import annotations

import io
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ci2p_cache.parquet_pages import require_small_pages

__all__ = ["parquet_bytes", "read_parquet"]

_MAX_TEXT_RATIO = 256
"""Bytes of one text column over those of the file: keys of ours take about twice the file."""

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
    try:
        require_small_pages(path)
        with _open_parquet(path) as file:
            known = file.schema_arrow
        if schemas and known not in schemas:
            raise OSError(f"{path} has another schema than ci2p-cache writes")  # noqa: TRY301
        # Kept as dictionaries: one long text that many rows refer to would be copied for each.
        texts = [name for name in known.names if _is_text(known.field(name).type)]
        with _open_parquet(path, read_dictionary=texts) as file:
            table = file.read(columns=None if columns is None else list(columns))
        return _without_dictionaries(table, texts, _MAX_TEXT_RATIO * max(found.st_size, 2**16))
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def _open_parquet(path: Path, **options: Any) -> pq.ParquetFile:
    return pq.ParquetFile(
        path,
        page_checksum_verification=True,
        thrift_string_size_limit=2**24,
        thrift_container_size_limit=2**16,
        **options,
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


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
