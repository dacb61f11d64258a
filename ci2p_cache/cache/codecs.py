"""Storage codecs: the bytes of one inner chunk, its checksum included.

::

    symbols --fold?--> bits of one weight side by side, compressed: Blosc --> crc32c     zstd, lz4
    values ---------------------------------------------------------------> crc32c     none

`CODECS` has those of format 2, `FRAMES` beside them the plain zstd frames of format 1 and of the
small arrays. A flipped bit is found before a chunk is decoded: it ends in its crc32c (zarr's codec
of that name), and frames carry zstd's own checksum. A new codec is a class here, an entry in
`CODECS`, and its name in `specs.CodecName`.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs.zstd import Zstd

from ci2p_cache.specs import CodecName, LatentSpec, LayoutSpec

__all__ = ["CODECS", "CRC_BYTES", "FRAMES", "ChunkCodec", "codec_of", "unfolded"]

CRC_BYTES = 4
"""What a crc32c takes at the end of a chunk, and of a shard's index."""

_BITSHUFFLE = 2
_HEADER = struct.Struct("<BBBBIII")
"""Of a Blosc buffer: versions, flags, item size; raw size, block size, size with this header."""

_ONE_BLOCK = struct.Struct("<BBBBIIIII")
"""A header, and before the only block its offset and size."""

_KINDS, _COMPRESSED_WHOLE = 0b0001_0010, 0b0001_0000
"""Of the flags: a block of one stream, not one for each byte of a value; and not a plain copy."""

_MAX_WINDOW_BYTES = 2**23
"""What RFC 8878 asks of every decoder; a frame that wants more is refused, not given memory."""

_local = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """Returns the thread's own."""
    try:
        made: zstandard.ZstdDecompressor = _local.decompressor
    except AttributeError:
        made = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        _local.decompressor = made
    return made


class ChunkCodec(ABC):
    """The byte codec of inner chunks of one size; safe to use from many threads.

    Args:
        level: Compression level, where the codec has one.
        chunk_bytes: Raw size of every chunk.
        item_bytes: Size of one value.
        fold: Whether chunks hold folded symbols; only `zstd` and `lz4` can.
    """

    is_raw: ClassVar[bool]
    """Whether a stored chunk is its raw values, then their crc32c: such chunks can be mapped."""
    expected_share: ClassVar[dict[str, float]]
    """dtype -> stored over raw bytes: measured for int8 and float16, a cautious guess otherwise."""

    def __init__(
        self, *, level: int, chunk_bytes: int, item_bytes: int = 1, fold: bool = False
    ) -> None:
        self.level = level
        self.chunk_bytes = chunk_bytes
        self.item_bytes = item_bytes
        self.fold = fold
        # zstd's own bound for data that does not compress is 0.4 % and 64 bytes.
        self.max_stored_bytes = chunk_bytes + chunk_bytes // 128 + 1024

    @property
    @abstractmethod
    def zarr_metadata(self) -> list[dict[str, Any]]:
        """The codecs as zarr.json has them."""

    @abstractmethod
    def encode(self, raw: memoryview) -> bytes:
        """Returns the stored bytes of a raw chunk."""

    @abstractmethod
    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        """Decodes into `out`, uint8 (chunk_bytes,), C-contiguous.

        Raises:
            ValueError: checksum, header or size are wrong; `out` may then hold anything.
        """


def _sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _unsealed(stored: bytes) -> bytes:
    """Returns a chunk without its crc32c; ValueError where that is wrong."""
    data = stored[:-CRC_BYTES]
    if google_crc32c.value(data) != int.from_bytes(stored[-CRC_BYTES:], "little"):
        raise ValueError("crc32c is wrong")
    return data


class _Raw(ChunkCodec):
    """`none`: the raw chunk and its crc32c."""

    is_raw = True
    expected_share: ClassVar = dict.fromkeys(("int8", "int16", "float16", "float32"), 1.0)

    @property
    def zarr_metadata(self) -> list[dict[str, Any]]:
        return [{"name": "crc32c"}]

    def encode(self, raw: memoryview) -> bytes:
        return _sealed(bytes(raw))

    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        if len(stored) != self.chunk_bytes + CRC_BYTES:
            raise ValueError(f"{len(stored)} bytes, wanted {self.chunk_bytes + CRC_BYTES}")
        out[:] = np.frombuffer(_unsealed(stored), np.uint8)


class _Blosc(ChunkCodec):
    """A Blosc buffer, as c-blosc 1 has it, of one block with its bits shuffled; and its crc32c.

    Bit 0 of all values, then bit 1 and so on: the high bits of small symbols hold little. Symbols
    of one byte are shuffled in pairs: c-blosc 1.21 puts those back in order in 8 instead of 17 us
    for 49 kB. That costs no bytes with zstd and 1.5 % with lz4, of symbols without spatial
    correlation 3 and 6 %. Folded ones are not, since they are for small caches. One block, because
    several cost bytes and, with zstd, a decoder for each; lz4hc has several above 256 KiB.
    """

    is_raw = False
    expected_share: ClassVar = {"int8": 0.22, "int16": 0.12, "float16": 0.95, "float32": 0.92}
    cname: ClassVar[str]
    """Name of the compressor in Blosc."""
    _code: ClassVar[int]
    """Its number in the header."""

    @property
    def _type_bytes(self) -> int:
        """Returns what Blosc takes for the size of a value."""
        return self.item_bytes if self.fold else max(2, self.item_bytes)

    @property
    def zarr_metadata(self) -> list[dict[str, Any]]:
        options = {
            "typesize": self._type_bytes,
            "cname": self.cname,
            "clevel": self.level,
            "shuffle": "bitshuffle",
            "blocksize": self.chunk_bytes,
        }
        return [{"name": "blosc", "configuration": options}, {"name": "crc32c"}]

    def encode(self, raw: memoryview) -> bytes:
        values = np.frombuffer(raw, f"<i{self.item_bytes}")
        source = np.ascontiguousarray(_folded(values) if self.fold else values)
        stored = np.empty(source.nbytes + _HEADER.size, np.uint8)
        size = _blosc().blosc_compress_ctx(
            self.level, _BITSHUFFLE, self._type_bytes, source.nbytes, source.ctypes.data,
            stored.ctypes.data, stored.nbytes, self.cname.encode(), self.chunk_bytes, 1,
        )  # fmt: skip
        assert size > 0, "it fits with the overhead, and the compressors are built in"
        return _sealed(stored[:size].tobytes())

    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        data = _unsealed(stored)
        self._check_header(data)
        # Refuses an array that is smaller, or not contiguous: Blosc would write past its end.
        target = (ctypes.c_char * self.chunk_bytes).from_buffer(out.data)
        data = self._inflated(data)
        size = _blosc().blosc_decompress_ctx(data, target, self.chunk_bytes, 1)
        if size != self.chunk_bytes:
            raise ValueError(f"Blosc gives {size}, wanted {self.chunk_bytes} bytes")
        if self.fold:
            unfolded(out.view(f"<u{self.item_bytes}"), out=out.view(f"<i{self.item_bytes}"))

    def _inflated(self, data: bytes) -> bytes:
        """Returns the buffer, or one that has the same content and is decoded faster."""
        return data

    def _check_header(self, data: bytes) -> None:
        """Checks what Blosc believes of a buffer: its sizes, and which decoder it is for."""
        if len(data) < _HEADER.size:
            raise ValueError(f"a Blosc buffer of {len(data)} bytes")
        version, _, flags, type_bytes, size, _, stored_bytes = _HEADER.unpack_from(data)
        if size != self.chunk_bytes:
            raise ValueError(f"the Blosc buffer holds {size} bytes, wanted {self.chunk_bytes}")
        is_ours = type_bytes in (self.item_bytes, self._type_bytes)  # the former until 2026-11-30
        if not is_ours or (version, stored_bytes) != (2, len(data)):
            raise ValueError("the Blosc buffer has another header than ours")
        if flags >> 5 != self._code:
            raise ValueError("the Blosc buffer is not of this codec")


class _BloscZstd(_Blosc):
    """`zstd`: the default."""

    cname = "zstd"
    _code = 4

    def _inflated(self, data: bytes) -> bytes:
        """Decompresses the frame of a single block, and leaves Blosc to put the bits in order.

        Blosc makes a decompressor for every frame, and a slower one.
        """
        if len(data) < _ONE_BLOCK.size:
            return data
        *head, size, block, _, start, block_bytes = _ONE_BLOCK.unpack_from(data)
        sizes = size, _HEADER.size + 4, len(data) - _ONE_BLOCK.size
        if (block, start, block_bytes) != sizes or head[2] & _KINDS != _COMPRESSED_WHOLE:
            return data
        frame = memoryview(data)[_ONE_BLOCK.size :]
        try:
            if zstandard.frame_content_size(frame) != size:
                raise ValueError("the frame in the Blosc buffer has another size")
            plain = _decompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd in Blosc: {error}") from error
        # A block that takes as much as its values is one that would not compress.
        return _ONE_BLOCK.pack(*head, size, size, _ONE_BLOCK.size + size, start, size) + plain


class _BloscLz4(_Blosc):
    """`lz4`: read 1.6 times as fast as zstd, a fifth larger; packed by lz4hc."""

    cname = "lz4hc"
    _code = 1


class _Frames(ChunkCodec):
    """One zstd frame (RFC 8878) with its checksum.

    Frames are written by numcodecs, as zarr writes them, and read by zstandard: one context for
    each thread instead of one for each frame saves 10 of 68 us for 49 kB.
    """

    is_raw = False
    expected_share: ClassVar = {"int8": 0.22, "int16": 0.12, "float16": 0.95, "float32": 0.92}

    def __init__(
        self, *, level: int, chunk_bytes: int, item_bytes: int = 1, fold: bool = False
    ) -> None:
        super().__init__(level=level, chunk_bytes=chunk_bytes, item_bytes=item_bytes, fold=fold)
        self._zstd = Zstd(level=level, checksum=True)

    @property
    def zarr_metadata(self) -> list[dict[str, Any]]:
        return [{"name": "zstd", "configuration": {"level": self.level, "checksum": True}}]

    def encode(self, raw: memoryview) -> bytes:
        return bytes(self._zstd.encode(raw))

    def decode_into(self, stored: bytes, out: npt.NDArray[Any]) -> None:
        try:
            # A short frame would leave the buffer's old tail, a long one is a bomb: both end here.
            size = zstandard.frame_content_size(stored)
            if size != self.chunk_bytes:
                raise ValueError(f"the frame holds {size} bytes, wanted {self.chunk_bytes}")
            with _decompressor().stream_reader(stored) as reader:
                size = reader.readinto(out)
                # Reads to the end of the frame, where the checksum is, and sees what comes after.
                is_whole = not reader.read(1)
        except zstandard.ZstdError as error:
            text = str(error)
            raise ValueError(text if text.startswith("zstd") else f"zstd: {text}") from error
        if size != self.chunk_bytes or not is_whole:
            raise ValueError(f"the frame does not end after {self.chunk_bytes} bytes")


CODECS: dict[CodecName, type[ChunkCodec]] = {
    "zstd": _BloscZstd,
    "lz4": _BloscLz4,
    "none": _Raw,
}
FRAMES: type[ChunkCodec] = _Frames


def codec_of(format_version: int, layout: LayoutSpec, latent: LatentSpec) -> ChunkCodec:
    """Returns the codec of the latents of a cache of some format version."""
    is_frames = format_version == 1 and layout.codec == "zstd"
    return (FRAMES if is_frames else CODECS[layout.codec])(
        level=layout.level,
        chunk_bytes=latent.num_bytes,
        item_bytes=latent.num_bytes // math.prod(latent.shape),
        fold=layout.fold,
    )


def _folded(symbols: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns 0, 1, 2, 3, 4, ... for 0, -1, 1, -2, 2, ...; the code of a hole is the largest."""
    bits = 8 * symbols.itemsize
    return ((symbols << 1) ^ (symbols >> (bits - 1))).view(f"<u{symbols.itemsize}")


def unfolded(codes: npt.NDArray[Any], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Returns the symbols of unsigned codes, as signed integers of that size.

    Args:
        codes: uint8 or uint16, of any shape.
        out: Where they go, signed; it may be the same memory. None: a new array.
    """
    signs = np.negative(codes & 1).view(f"i{codes.itemsize}")
    # By division, for which numpy has vector instructions.
    found = np.floor_divide(codes, 2, out=None if out is None else out.view(codes.dtype))
    symbols: npt.NDArray[Any] = found.view(signs.dtype)
    symbols ^= signs
    return symbols


@cache
def _blosc() -> ctypes.CDLL:
    """Returns the c-blosc inside numcodecs.

    Called directly: numcodecs' own functions take several threads and a lock when they run in the
    main thread, and there the environment's `BLOSC_CLEVEL` would change the bytes. ctypes lets go
    of the interpreter's lock meanwhile.
    """
    library = ctypes.CDLL(numcodecs.blosc.__file__)
    size = ctypes.c_size_t
    library.blosc_compress_ctx.argtypes = [
        ctypes.c_int, ctypes.c_int, size, size, ctypes.c_void_p, ctypes.c_void_p, size,
        ctypes.c_char_p, size, ctypes.c_int,
    ]  # fmt: skip
    library.blosc_decompress_ctx.argtypes = [ctypes.c_char_p, ctypes.c_void_p, size, ctypes.c_int]
    return library
