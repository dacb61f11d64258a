"""Reading safetensors files of ours: checked whole, and in no more memory than the file has bytes.

The layout is that of the safetensors format: the header's length as little-endian uint64, the
header as JSON (name -> dtype, shape, data_offsets), then the tensors one after another.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import CheckpointError
from ci2p_cache.record import regular_file

__all__ = ["read_tensors"]

_MAX_HEADER_BYTES = 4 * 2**20
"""About 100 bytes per tensor; hostile JSON takes about 25 times its size when parsed."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensors(path: Path, record: FileRecord) -> dict[str, Tensor]:
    """Reads a safetensors file whose size and sha256 are known.

    The header is held against the size before the rest is read, so memory follows from what is
    on disk and not from what the header says; what is parsed is what the digest was checked of.

    Args:
        path: The file.
        record: Its size and digest.

    Returns:
        Tensors on CPU that share one buffer of the file's size; writable, they do not overlap.

    Raises:
        CheckpointError: the file is not the recorded one, or its tensors do not fill it exactly.
        ManifestError: it is a link or no regular file.
        OSError: it cannot be read.
    """
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path.name} is not what was written: {record.bytes} bytes, now {size} bytes"
            )
        entries, start = _layout(path.name, file, size)
        file.seek(0)
        try:
            content = bytearray(size)
        except MemoryError as error:
            raise CheckpointError(f"{path.name} has {size} bytes, more than memory") from error
        file.readinto(content)
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(
            f"{path.name} is not what was written: sha256 {record.sha256[:12]}..., now "
            f"{digest[:12]}..."
        )
    return {
        name: _view(content, dtype, shape, start + begin)
        for name, (dtype, shape, begin) in entries.items()
    }


def _layout(
    name: str, file: io.BufferedReader, size: int
) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], int]:
    """Returns dtype, shape and place of each tensor, and where the first one begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{name} has a header of {length} bytes in {size}")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {key: _entry(value) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged header: {error!r}") from error
    position = 0
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != position:
            raise CheckpointError(f"{name} has tensors that overlap or leave a gap at {begin}")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{name} holds {size - 8 - length} bytes of tensors, its header speaks of {position}"
        )
    found = {key: (dtype, shape, begin) for key, (dtype, shape, begin, _) in entries.items()}
    return found, 8 + length


def _entry(value: Any) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape = _DTYPES[value["dtype"]], value["shape"]
    begin, end = value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"{value['dtype']} of shape {shape} at {begin} to {end}")
    return dtype, list(shape), begin, end


def _view(content: bytearray, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).reshape(shape)
