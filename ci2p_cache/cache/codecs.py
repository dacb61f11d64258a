"""Storage codecs: the bytes of one inner chunk, its checksum included; `CODECS` has them all.

A flipped bit is found when the chunk is read: `zstd` frames carry zstd's own checksum, chunks of
`none` end in their crc32c (zarr's codec of that name). A new codec is a class here, an entry in
`CODECS`, and its name in `specs.CodecName`.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs.zstd import Zstd

from ci2p_cache.specs import CodecName, LatentSpec, LayoutSpec

__all__ = ["CODECS", "CRC_BYTES", "ChunkCodec", "codec_of"]

CRC_BYTES = 4
"""What a crc32c takes at the end of a raw chunk, and of a shard's index."""

_MAX_WINDOW_BYTES = 2**23
"""What RFC 8878 asks of every decoder; a frame that wants more is refused, not given memory."""


class ChunkCodec(ABC):
    """The byte codec of inner chunks of one size; safe to use from many threads.

    Args:
        level: Compression level, where the codec has one.
        chunk_bytes: Raw size of every chunk.
    """

    has_level: ClassVar[bool]
    """Whether `level` changes the stored bytes."""
    is_raw: ClassVar[bool]
    """Whether a stored chunk is its raw values, then their crc32c: such chunks can be mapped."""
    expected_share: ClassVar[dict[str, float]]
    """dtype -> stored over raw bytes: measured for int8 and float16, a cautious guess otherwise."""

    def __init__(self, *, level: int, chunk_bytes: int) -> None:
        self.level = level
        self.chunk_bytes = chunk_bytes
        # zstd's own bound for data that does not compress is 0.4 % and 64 bytes.
        self.max_stored_bytes = chunk_bytes + chunk_bytes // 128 + 1024

    @property
    @abstractmethod
    def zarr_metadata(self) -> dict[str, Any]:
        """The codec as zarr.json has it."""

    @abstractmethod
    def encode(self, raw: memoryview) -> bytes:
        """Returns the stored bytes of a raw chunk."""

    @abstractmethod
    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        """Decodes into `out`, uint8 (chunk_bytes,); ValueError where checksum or size is wrong."""


class _Raw(ChunkCodec):
    """`none`: the raw chunk and its crc32c."""

    has_level = False
    is_raw = True
    expected_share: ClassVar = dict.fromkeys(("int8", "int16", "float16", "float32"), 1.0)

    @property
    def zarr_metadata(self) -> dict[str, Any]:
        return {"name": "crc32c"}

    def encode(self, raw: memoryview) -> bytes:
        data = bytes(raw)
        return data + struct.pack("<I", google_crc32c.value(data))

    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        if len(stored) != self.chunk_bytes + CRC_BYTES:
            raise ValueError(f"{len(stored)} bytes, wanted {self.chunk_bytes + CRC_BYTES}")
        checksum = int.from_bytes(stored[-CRC_BYTES:], "little")
        if google_crc32c.value(stored[: self.chunk_bytes]) != checksum:
            raise ValueError("crc32c is wrong")
        out[:] = np.frombuffer(stored, np.uint8, self.chunk_bytes)


class _Zstd(ChunkCodec):
    """`zstd`: one frame (RFC 8878) with its checksum.

    Frames are written by numcodecs, as zarr writes them, and read by zstandard: one context for
    each thread instead of one for each frame saves 10 of 68 us for 49 kB.
    """

    has_level = True
    is_raw = False
    expected_share: ClassVar = {"int8": 0.22, "int16": 0.12, "float16": 0.95, "float32": 0.92}

    def __init__(self, *, level: int, chunk_bytes: int) -> None:
        super().__init__(level=level, chunk_bytes=chunk_bytes)
        self._zstd = Zstd(level=level, checksum=True)
        self._local = threading.local()

    @property
    def zarr_metadata(self) -> dict[str, Any]:
        return {"name": "zstd", "configuration": {"level": self.level, "checksum": True}}

    def encode(self, raw: memoryview) -> bytes:
        return bytes(self._zstd.encode(raw))

    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        try:
            decompressor = self._local.decompressor
        except AttributeError:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
            self._local.decompressor = decompressor
        try:
            # A short frame would leave the buffer's old tail, a long one is a bomb: both end here.
            size = zstandard.frame_content_size(stored)
            if size != self.chunk_bytes:
                raise ValueError(f"the frame holds {size} bytes, wanted {self.chunk_bytes}")
            with decompressor.stream_reader(stored) as reader:
                size = reader.readinto(out)
                # Reads to the end of the frame, where the checksum is, and sees what comes after.
                is_whole = not reader.read(1)
        except zstandard.ZstdError as error:
            text = str(error)
            raise ValueError(text if text.startswith("zstd") else f"zstd: {text}") from error
        if size != self.chunk_bytes or not is_whole:
            raise ValueError(f"the frame does not end after {self.chunk_bytes} bytes")


CODECS: dict[CodecName, type[ChunkCodec]] = {"zstd": _Zstd, "none": _Raw}


def codec_of(layout: LayoutSpec, latent: LatentSpec) -> ChunkCodec:
    """Returns the codec of a cache's latents."""
    return CODECS[layout.codec](level=layout.level, chunk_bytes=latent.num_bytes)
