"""`ShardReader`: one file of latents opened for reading by position, whatever its container."""

from __future__ import annotations

import os
import stat
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import ShardError

__all__ = ["MISSING", "ShardIndex", "ShardReader"]

MISSING = 2**64 - 1
"""Offset and size of a latent that is not stored, as zarr has it."""


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


class ShardReader(ABC):
    """One shard opened for reading; safe to read from many threads.

    Args:
        path: The shard's file.
        file_bytes: Size of the file as committed.

    Raises:
        ShardError: the file is missing, no regular file, or has another size.
    """

    index: ShardIndex
    """Where every chunk is; set on construction."""

    def __init__(self, path: Path, *, file_bytes: int) -> None:
        self.path = path
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
        self.file_bytes = found.st_size
        self.identity = (found.st_dev, found.st_ino, found.st_ctime_ns)

    def _set_index(self, index: ShardIndex) -> None:
        self.index = index
        # Gives Python's integers at a fraction of numpy's price.
        self._places = memoryview(index.entries.reshape(-1).data).cast("B").cast("Q")

    @property
    def stored(self) -> npt.NDArray[Any]:
        """Which inner chunks exist, bool (num_chunks,)."""
        return np.not_equal(self.index.entries[:, 0], MISSING)

    def stored_bytes(self, chunk: int) -> int:
        """Returns the size of a stored inner chunk in the file."""
        return self._places[2 * chunk + 1]

    def fileno(self) -> int:
        """Returns the descriptor, open for as long as this object is held."""
        return self._descriptor

    @abstractmethod
    def read_into(self, chunk: int, out: npt.NDArray[Any]) -> None:
        """Reads one inner chunk into `out`, uint8 (chunk_bytes,).

        Raises:
            ShardError: the chunk is not stored, its checksum is wrong, or reading failed.
        """

    @property
    @abstractmethod
    def known_bytes(self) -> int:
        """Memory that `reopener` keeps of the file."""

    @abstractmethod
    def reopener(self) -> Callable[[], ShardReader]:
        """Returns what opens the file again without reading its index, while it is the same file.

        It does not keep the file open.
        """

    def _place(self, chunk: int) -> tuple[int, int]:
        offset, size = self._places[2 * chunk], self._places[2 * chunk + 1]
        if offset == MISSING:
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
