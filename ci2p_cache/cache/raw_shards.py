"""All raw shards of a split as one range of addresses, from which a batch is gathered in one call.

::

    | shard 0 | shard 1 | ... |     reserved at once, each file mapped there when needed
      ^ ^^  ^       ^               a batch: one torch.index_select over every possible chunk

For caches of codec `none`. Reading 49 kB by position takes 2.3 times as long as copying it from a
mapping, and a call for each sample half as long again; in one call the copy runs at 0.8 of a gather
in memory (busy core, page cache warm). Each chunk's crc32c is verified when it is first touched.

A file that is cut short while it is mapped ends the process by SIGBUS, as with any mapping.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.chunk_codec import CRC_BYTES
from ci2p_cache.cache.open_shards import ForkedLock
from ci2p_cache.cache.zarr_shards import ShardFile
from ci2p_cache.errors import ShardError

__all__ = ["RawShards"]

_INDEX_ENTRY_BYTES = 16
# Linux's numbers; Python does not name them.
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RawShards:
    """The mapped shards of a split; safe to use from many threads and forked processes.

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
        open_shard: Callable[[int], ShardFile],
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
            # Pages of zeros that no one writes to take no memory. Offset 0 means "nothing there".
            self._ends = np.zeros(num_shards * shard_chunks, np.int64)
            self._is_checked = np.zeros(num_shards * shard_chunks, np.bool_)
            self._base = _map(0, size, _PROT_NONE, mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        except (OSError, OverflowError, ValueError, MemoryError, ctypes.ArgumentError) as error:
            raise damage(0, f"{num_shards} shards cannot be mapped: {error}") from error
        # Not at exit, where a thread may still be reading: there the kernel does it.
        weakref.finalize(self, _libc.munmap, self._base, size).atexit = False
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._base))
        # Every place where a chunk may begin, as a row: they overlap, nothing is copied.
        self._places = torch.from_numpy(self._bytes).as_strided(
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
        if not self._is_mapped[shards].all():
            for shard in np.unique(shards[~self._is_mapped[shards]]).tolist():
                self._map_shard(shard)
        numbers = shards * self._shard_chunks + chunks
        if not self._is_checked[numbers].all():
            for number in numbers[~self._is_checked[numbers]].tolist():
                self._check(number)
        starts = self._ends[numbers] - self._chunk_bytes
        torch.index_select(self._places, 0, torch.from_numpy(starts), out=torch.from_numpy(out))

    def _map_shard(self, shard: int) -> None:
        with self._lock:
            if self._is_mapped[shard]:
                return
            try:
                file = self._open_shard(shard)
            except ShardError as error:
                raise self._damage(shard, str(error)) from error
            size = file.index.file_bytes
            if size > self._stride:
                raise self._damage(shard, f"{file.path} has {size} bytes, over {self._stride}")
            place = shard * self._stride
            try:
                flags = _MAP_FIXED | mmap.MAP_SHARED
                _map(self._base + place, size, mmap.PROT_READ, flags, file.fileno())
            except OSError as error:
                reason = f"{file.path} cannot be mapped: {error.strerror}"
                raise self._damage(shard, reason) from error
            offsets = file.index.entries[:, 0].astype(np.int64)
            has_size = file.index.entries[:, 1] == self._chunk_bytes + CRC_BYTES
            ends = np.where(file.stored & has_size, place + offsets + self._chunk_bytes, 0)
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
    """Calls mmap; private where nothing else is said.

    Raises:
        OSError: the kernel refuses.
    """
    if not flags & mmap.MAP_SHARED:
        flags |= mmap.MAP_PRIVATE
    found = _libc.mmap(address or None, size, protection, flags, descriptor, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
