"""Shards of a zarr v3 array, written and read by position.

The layout is that of zarr's published `sharding_indexed` codec (zarr-specs, v3, "sharding codec"
version 1.0): the inner chunks one after another, then the index of (offset, size) pairs as
little-endian uint64, then the index's crc32c; a missing chunk has both set to 2^64 - 1. Shards are
packed here because zarr-python writes in place by reading first; they are read here because its
indexing reads 1.2 k samples/s where one positioned read and one zstd call give 29 k. zarr-python is
the oracle in the tests.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from ci2p_cache.cache.chunk_codec import CRC_BYTES, ChunkCodec
from ci2p_cache.errors import ShardError

__all__ = ["ShardFile", "ShardIndex", "index_crc32c", "pack_shard"]

_MISSING = 2**64 - 1
_MAX_CHUNKS = 2**22
"""Of one shard: a 64 MiB index. Ours have 128 MiB of latents of at least 768 bytes: 2**18."""


def pack_shard(chunks: Sequence[bytes | None]) -> Iterator[bytes]:
    """Yields the bytes of a shard piece by piece, the index last.

    Args:
        chunks: Encoded inner chunks in C order, None for one that is not stored.
    """
    entries = np.full((len(chunks), 2), _MISSING, "<u8")
    position = 0
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            entries[number] = position, len(chunk)
            position += len(chunk)
            yield chunk
    index = entries.tobytes()
    yield index + struct.pack("<I", google_crc32c.value(index))


def index_crc32c(last_part: bytes) -> int:
    """Returns the index's checksum from the last piece that `pack_shard` yields."""
    return int(struct.unpack("<I", last_part[-CRC_BYTES:])[0])


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A shard's index as it was checked, and which file it was read from."""

    entries: npt.NDArray[Any]
    """Offset and size of every inner chunk, uint64 (num_chunks, 2)."""
    crc32c: int
    """Its checksum, the one that was committed."""
    file_bytes: int
    """Size of the file."""
    identity: tuple[int, int, int]
    """Device, inode and time of the last change in ns of the file: another one differs."""


class ShardFile:
    """One shard opened for reading; safe to read from many threads.

    Args:
        path: The shard's file.
        num_chunks: Number of inner chunks, stored or not.
        codec: The codec of its chunks.
        file_bytes: Size of the file as committed.
        index_crc: crc32c of its index as committed; it tells swapped shards apart.
        known: Its index, where it was open before: not read again if the file is still the same.

    Raises:
        ShardError: the file is missing, has another size, or its index is damaged.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_chunks: int,
        codec: ChunkCodec,
        file_bytes: int,
        index_crc: int,
        known: ShardIndex | None = None,
    ) -> None:
        self.path = path
        self._codec = codec
        if num_chunks > _MAX_CHUNKS:
            raise ShardError(f"{path}: a shard of {num_chunks} chunks; at most {_MAX_CHUNKS} fit")
        try:
            # Links are not followed, pipes not waited for: the folder may come from a stranger.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise ShardError(f"{path} cannot be opened: {error.strerror}") from error
        # Closed when the last reader lets go: a descriptor closed under a reader could be reused
        # for another file, and the reader would get that file's bytes.
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{path} is no regular file")
        size = found.st_size
        if size != file_bytes:
            raise ShardError(f"{path} has {size} bytes, {file_bytes} were committed")
        identity = (found.st_dev, found.st_ino, found.st_ctime_ns)
        if known is None or known.identity != identity:
            entries = self._read_index(num_chunks, size, index_crc)
            known = ShardIndex(entries, index_crc, size, identity)
        self.index = known
        # Gives Python's integers at a fraction of numpy's price.
        self._places = memoryview(known.entries.reshape(-1).data).cast("B").cast("Q")

    def _read_index(self, num_chunks: int, size: int, index_crc: int) -> npt.NDArray[Any]:
        index_bytes = 16 * num_chunks
        start = size - index_bytes - CRC_BYTES
        tail = self._read(index_bytes + CRC_BYTES, start) if start >= 0 else b""
        if len(tail) != index_bytes + CRC_BYTES:
            raise ShardError(f"{self.path} is too short for an index of {num_chunks} chunks")
        index, stored_crc = tail[:index_bytes], struct.unpack("<I", tail[index_bytes:])[0]
        if google_crc32c.value(index) != stored_crc:
            raise ShardError(f"{self.path}: the checksum of its index is wrong")
        if stored_crc != index_crc:
            raise ShardError(f"{self.path} is intact but is not the shard that was committed here")
        entries = np.frombuffer(index, "<u8").reshape(num_chunks, 2)
        offsets, sizes = entries[:, 0], entries[:, 1]
        missing = (offsets == _MISSING) & (sizes == _MISSING)
        inside = (offsets <= start) & (sizes <= start) & (offsets + sizes <= start)
        if not np.all(missing | inside):
            raise ShardError(f"{self.path}: its index points outside the file")
        if np.any(sizes[~missing] > self._codec.max_stored_bytes):
            raise ShardError(f"{self.path}: its index has chunks that are larger than raw ones")
        order = np.argsort(offsets[~missing], kind="stable")
        starts, lengths = offsets[~missing][order], sizes[~missing][order]
        if np.any(starts[:-1] + lengths[:-1] > starts[1:]):
            raise ShardError(f"{self.path}: its index has chunks that overlap")
        return entries

    @property
    def stored(self) -> npt.NDArray[Any]:
        """Which inner chunks exist, bool (num_chunks,)."""
        return np.not_equal(self.index.entries[:, 0], _MISSING)

    def stored_bytes(self, chunk: int) -> int:
        """Returns the size of a stored inner chunk in the file."""
        return self._places[2 * chunk + 1]

    def stored_crc32c(self, chunk: int) -> int:
        """Returns the checksum that a stored chunk of codec `none` ends in, unchecked."""
        offset, size = self._place(chunk)
        return int.from_bytes(self._read(CRC_BYTES, offset + size - CRC_BYTES), "little")

    def read_into(self, chunk: int, out: npt.NDArray[Any]) -> None:
        """Reads one inner chunk into `out`, uint8 (chunk_bytes,).

        Raises:
            ShardError: the chunk is not stored, its checksum is wrong, or reading failed.
        """
        stored = self._stored(chunk)
        try:
            self._codec.decode_into(stored, out)
        except ValueError as error:
            raise ShardError(f"{self.path}: chunk {chunk} is damaged: {error}") from error

    def fileno(self) -> int:
        """Returns the descriptor, open for as long as this object is held."""
        return self._descriptor

    def _place(self, chunk: int) -> tuple[int, int]:
        offset, size = self._places[2 * chunk], self._places[2 * chunk + 1]
        if offset == _MISSING:
            raise ShardError(f"{self.path}: chunk {chunk} holds no data")
        return offset, size

    def _stored(self, chunk: int) -> bytes:
        offset, size = self._place(chunk)
        stored = self._read(size, offset)
        if len(stored) != size:
            raise ShardError(f"{self.path}: chunk {chunk} ends after {len(stored)} of {size} bytes")
        return stored

    def _read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read: {error.strerror}") from error
