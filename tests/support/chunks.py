"""Every codec of chunks that a cache may have, ours and zarr's own words for it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from ci2p_cache.cache.codecs import CODECS, FRAMES, ChunkCodec

__all__ = ["KINDS", "chunk_codec", "compressors"]

KINDS = ("frames", *CODECS)
"""`frames` are those of format 1."""


def chunk_codec(
    kind: str, shape: tuple[int, ...], dtype: str = "int8", *, level: int = 1, fold: bool = False
) -> ChunkCodec:
    """Our codec of chunks of that shape."""
    item = np.dtype(dtype).itemsize
    made = FRAMES if kind == "frames" else CODECS[kind]  # type: ignore[index]  # one of KINDS
    return made(level=level, chunk_bytes=math.prod(shape) * item, item_bytes=item, fold=fold)


def compressors(
    kind: str, shape: tuple[int, ...], dtype: str = "int8", *, level: int = 1
) -> list[Any]:
    """The same as zarr has it."""
    item = np.dtype(dtype).itemsize
    if kind == "frames":
        return [ZstdCodec(level=level, checksum=True)]
    if kind == "none":
        return [Crc32cCodec()]
    names: dict[str, Literal["zstd", "lz4hc"]] = {"zstd": "zstd", "lz4": "lz4hc"}
    blosc = BloscCodec(
        typesize=max(2, item), cname=names[kind], clevel=level,
        shuffle="bitshuffle", blocksize=math.prod(shape) * item,
    )  # fmt: skip
    return [blosc, Crc32cCodec()]
