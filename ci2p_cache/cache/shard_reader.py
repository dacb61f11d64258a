"""Shards opened for reading: by position, whatever their container, or all of a split mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from ci2p_cache.cache.codecs import CRC_BYTES, ChunkCodec
from ci2p_cache.cache.lock import ForkedLock
from ci2p_cache.errors import ShardError

__all__ = ["MISSING", "OpenShards", "RawShards", "ShardIndex", "ShardReader"]

MISSING = 2**64 - 1
"""Offset and size of a latent that is not stored, as zarr has it."""

_OPEN_SHARE = 4
"""One split keeps a quarter of the files that the process may open: 256 of the common 1,024."""

_MAX_INDEX_BYTES = 256 * 2**20
"""Limit for the indexes that one split remembers: 8 million rows with two views."""

_INDEX_ENTRY_BYTES = 16
# Linux's numbers; Python does not name them.
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A shard's index as it was checked, and which file it belongs to."""

    entries: npt.NDArray[Any]
    """Offset and size of every inner chunk, little-endian uint64 (num_chunks, 2)."""
    crc32c: int
    """The checksum of `entries`."""
    file_bytes: int
    """Size of the file."""
    identity: tuple[int, int, int]
    """Device, inode and time of the last change in ns of the file: another one differs."""
    checksums: npt.NDArray[np.uint32] | None = None
    """crc32c of each raw chunk (num_chunks,) where the file itself has none: in tars."""


class ShardReader:
    """One shard opened for reading; safe to read from many threads.

    Args:
        path: The shard's file.
        file_bytes: Size of the file as committed.
        codec: The codec of its chunks; None for raw values that the index has the checksums of.
        index: Its index, where it was open before; else `set_index` is called with it.

    Raises:
        ShardError: the file is missing, no regular file, has another size, or is not the file
            that `index` belongs to.
    """

    index: ShardIndex

    def __init__(
        self,
        path: Path,
        *,
        file_bytes: int,
        codec: ChunkCodec | None,
        index: ShardIndex | None = None,
    ) -> None:
        self.path = path
        self._codec = codec
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
        if found.st_size != file_bytes:
            raise ShardError(f"{path} has {found.st_size} bytes, {file_bytes} were committed")
        self.file_bytes = file_bytes
        self._identity = (found.st_dev, found.st_ino, found.st_ctime_ns)
        if index is not None:
            if index.identity != self._identity:
                raise ShardError(f"{path} has been replaced")
            self._use(index)

    def set_index(
        self, entries: npt.NDArray[Any], checksums: npt.NDArray[np.uint32] | None = None
    ) -> None:
        """Sets the index of a file that is opened for the first time; it was checked."""
        crc32c = int(google_crc32c.value(entries.tobytes()))
        self._use(ShardIndex(entries, crc32c, self.file_bytes, self._identity, checksums))

    def _use(self, index: ShardIndex) -> None:
        self.index = index
        # They give Python's integers at a fraction of numpy's price.
        self._places = memoryview(index.entries.reshape(-1).data).cast("B").cast("Q")
        self._checksums = memoryview(b"" if index.checksums is None else index.checksums.data)

    def reopener(self) -> Callable[[], ShardReader]:
        """Returns what opens the file again, without reading its index, while it is the same one.

        It does not keep the file open.
        """
        size, codec, index = self.file_bytes, self._codec, self.index
        return partial(ShardReader, self.path, file_bytes=size, codec=codec, index=index)

    @property
    def stored(self) -> npt.NDArray[Any]:
        """Which inner chunks exist, bool (num_chunks,)."""
        return np.not_equal(self.index.entries[:, 0], MISSING)

    def stored_bytes(self, chunk: int) -> int:
        """Returns the size of a stored inner chunk in the file."""
        return self._places[2 * chunk + 1]

    def last_bytes(self, chunk: int, size: int) -> bytes:
        """Returns the last bytes of a stored inner chunk, unchecked."""
        return self.read(size, self._places[2 * chunk] + self._places[2 * chunk + 1] - size)

    def fileno(self) -> int:
        """Returns the descriptor, open for as long as this object is held."""
        return self._descriptor

    def read_into(self, chunk: int, out: npt.NDArray[Any]) -> None:
        """Reads one inner chunk into `out`, uint8 (chunk_bytes,).

        Raises:
            ShardError: the chunk is not stored, its checksum is wrong, or reading failed.
        """
        offset, size = self._places[2 * chunk], self._places[2 * chunk + 1]
        if offset == MISSING:
            raise ShardError(f"{self.path}: chunk {chunk} holds no data")
        stored = self.read(size, offset)
        if len(stored) != size:
            raise ShardError(f"{self.path}: chunk {chunk} ends after {len(stored)} of {size} bytes")
        try:
            if self._codec is not None:
                self._codec.decode_into(stored, out)
            elif google_crc32c.value(stored) == self._checksums[chunk]:
                out[:] = np.frombuffer(stored, np.uint8)
            else:
                raise ValueError("crc32c is wrong")  # noqa: TRY301
        except ValueError as error:
            raise ShardError(f"{self.path}: chunk {chunk} is damaged: {error}") from error

    def read(self, size: int, offset: int) -> bytes:
        """Returns bytes of the file, fewer where it ends; ShardError where reading failed."""
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read: {error.strerror}") from error


class OpenShards:
    """The open shards of one split; safe to use from many threads and forked processes.

    Random order meets another shard with nearly every sample. ImageNet has 1,252 of them and a
    process may often have no more than 1,024 files open, so shards are closed again. The index of a
    closed one is remembered: where commit record and index were checked again, a read took five
    times as long (932 against 183 us, 1,252 shards, a busy core).

    Args:
        open_shard: Opens a shard by its number, checked against its commit record.
    """

    def __init__(self, open_shard: Callable[[int], ShardReader]) -> None:
        self._open_shard = open_shard
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._known: dict[int, Callable[[], ShardReader]] = {}
        self._lock = ForkedLock()
        self._max_open = _max_open()

    def get(self, shard: int) -> ShardReader:
        """Returns a shard, opened if it is not; it stays open for as long as it is held.

        Raises:
            ShardError: it is missing, damaged or not committed.
        """
        file = self._open.get(shard)
        if file is not None and len(self._open) < self._max_open:
            # None has been closed so far: which was used last does not matter yet.
            return file
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                # Dropped files close when their last reader lets go of them.
                if len(self._open) >= self._max_open:
                    self._open.popitem(last=False)
                file = self._open[shard] = self._opened(shard)
            else:
                self._open.move_to_end(shard)
        return file

    def _opened(self, shard: int) -> ShardReader:
        known = self._known.pop(shard, None)
        if known is not None:
            try:
                file = known()
            except ShardError:
                # Another file is there by now: what its own commit record says decides.
                known = None
        if known is None:
            file = self._open_shard(shard)
        # All shards of a split have an index of one size.
        if (len(self._known) + 1) * file.index.entries.nbytes <= _MAX_INDEX_BYTES:
            self._known[shard] = known or file.reopener()
        return file


def _max_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel's own ceiling replaces "no limit".
    return max(1, min(2**20, soft if soft >= 0 else 2**20) // _OPEN_SHARE)


class RawShards:
    """All raw shards of a split as one range of addresses, from which a batch is gathered at once.

    ::

        | shard 0 | shard 1 | ... |     reserved at once, each file mapped there when needed
          ^ ^^  ^       ^               a batch: one torch.index_select over every possible chunk

    Safe to use from many threads and forked processes. Reading 49 kB by position takes 2.3 times as
    long as copying it from a mapping, and a call for each sample half as long again; in one call
    the copy runs at 0.8 of a gather in memory (busy core, page cache warm). Each chunk's crc32c is
    verified when it is first touched. A file that is cut short while it is mapped ends the process
    by SIGBUS, as with any mapping.

    Args:
        open_shard: Opens a shard by its number, checked against its commit record.
        damage: Makes the error that names a shard's rows, from its number and a reason.
        num_shards: Shards of the split.
        shard_chunks: Chunks of a shard, stored or not.
        chunk_bytes: Raw size of a chunk.

    Raises:
        ShardError: there are not so many addresses.
    """

    def __init__(
        self,
        open_shard: Callable[[int], ShardReader],
        damage: Callable[[int, str], ShardError],
        *,
        num_shards: int,
        shard_chunks: int,
        chunk_bytes: int,
    ) -> None:
        self._open_shard = open_shard
        self._damage = damage
        self._shard_chunks = shard_chunks
        self._chunk_bytes = chunk_bytes
        longest = shard_chunks * (chunk_bytes + CRC_BYTES + _INDEX_ENTRY_BYTES) + CRC_BYTES
        self._stride = -(-longest // mmap.PAGESIZE) * mmap.PAGESIZE
        size = num_shards * self._stride
        try:
            self._is_mapped = np.zeros(num_shards, np.bool_)
            # Pages of zeros that are never written take no memory. Offset 0 means "nothing there".
            self._ends = np.zeros(num_shards * shard_chunks, np.int64)
            self._is_checked = np.zeros(num_shards * shard_chunks, np.bool_)
            self._base = _map(0, size, _PROT_NONE, _RESERVED, -1)
        except (OSError, OverflowError, ValueError, MemoryError, ctypes.ArgumentError) as error:
            raise damage(0, f"{num_shards} shards cannot be mapped: {error}") from error
        # Not at exit, where a thread may still be reading: there the kernel does it.
        weakref.finalize(self, _libc.munmap, self._base, size).atexit = False
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._base))
        # torch takes seconds to import; who only looks at a cache reads no batch.
        import torch

        # Every offset where a chunk may begin, as a row: they overlap, nothing is copied.
        self._starts = torch.from_numpy(self._bytes).as_strided(
            (size - chunk_bytes + 1, chunk_bytes), (1, 1)
        )
        self._lock = ForkedLock()

    def gather(
        self, shards: npt.NDArray[Any], chunks: npt.NDArray[Any], out: npt.NDArray[Any]
    ) -> None:
        """Copies chunks next to each other.

        Args:
            shards: Shard of each chunk, int64 (B,).
            chunks: Number of each within its shard, int64 (B,).
            out: uint8 (B, chunk_bytes), C-contiguous; overwritten.

        Raises:
            ShardError: a shard is missing or damaged, or a chunk is not stored or is damaged.
        """
        import torch

        if not self._is_mapped[shards].all():
            for shard in np.unique(shards[~self._is_mapped[shards]]).tolist():
                self._map_shard(shard)
        numbers = shards * self._shard_chunks + chunks
        if not self._is_checked[numbers].all():
            for number in numbers[~self._is_checked[numbers]].tolist():
                self._check(number)
        starts = self._ends[numbers] - self._chunk_bytes
        torch.index_select(self._starts, 0, torch.from_numpy(starts), out=torch.from_numpy(out))

    def _map_shard(self, shard: int) -> None:
        with self._lock:
            if self._is_mapped[shard]:
                return
            start, flags = shard * self._stride, _MAP_FIXED | mmap.MAP_SHARED
            try:
                file = self._open_shard(shard)
                size = file.file_bytes
                if size > self._stride:
                    raise ShardError(f"{file.path} has {size} bytes, over {self._stride}")  # noqa: TRY301
                _map(self._base + start, size, mmap.PROT_READ, flags, file.fileno())
            except ShardError as error:
                raise self._damage(shard, str(error)) from error
            except OSError as error:
                reason = f"{file.path} cannot be mapped: {error.strerror}"
                raise self._damage(shard, reason) from error
            offsets = file.index.entries[:, 0].astype(np.int64)
            has_size = file.index.entries[:, 1] == self._chunk_bytes + CRC_BYTES
            ends = np.where(file.stored & has_size, start + offsets + self._chunk_bytes, 0)
            first = shard * self._shard_chunks
            self._ends[first : first + len(ends)] = ends
            self._is_mapped[shard] = True

    def _check(self, number: int) -> None:
        shard, chunk = divmod(number, self._shard_chunks)
        end = int(self._ends[number])
        if not end:
            raise self._damage(shard, f"chunk {chunk} holds no data, or has another size")
        checksum = int.from_bytes(self._bytes[end : end + CRC_BYTES].tobytes(), "little")
        if google_crc32c.value(self._bytes[end - self._chunk_bytes : end].tobytes()) != checksum:
            raise self._damage(shard, f"chunk {chunk} is damaged: crc32c is wrong")
        self._is_checked[number] = True


def _map(address: int, size: int, protection: int, flags: int, descriptor: int) -> int:
    """Calls mmap; OSError where the kernel refuses."""
    found = _libc.mmap(address or None, size, protection, flags, descriptor, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
