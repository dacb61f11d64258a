"""The bytes of a tar file, packed or not: read in sequence, and by position.

A plain tar is read by position. A packed one (gzip, zstandard) can only be read in sequence: a
`Window` keeps the last bytes that were unpacked, goes forward for what is ahead and begins again
for what is behind. No file stays open between two calls.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116

from __future__ import annotations

import gzip
import os
import stat
import threading
import zlib
from collections import deque
from typing import Protocol

import zstandard

from ci2p_cache.errors import SourceError
from ci2p_cache.images.names import for_display

__all__ = ["TarStream", "Window", "is_packed", "open_stream", "read_at"]

_GZIP_SUFFIXES = (b".gz", b".tgz")
_ZSTD_SUFFIXES = (b".zst", b".zstd", b".tzst")

_BLOCK_BYTES = 2**20
_WINDOW_BYTES = 32 * 2**20
"""Kept behind the place that is read: images that several threads ask for out of order."""

_FREE_BYTES, _MAX_RATIO = 2**29, 200
"""A packed tar may unpack to 512 MiB and 200 times its size. Compressed images hardly shrink; a
bitmap of one colour shrinks a thousandfold, but not a whole data set."""

_MAX_ZSTD_WINDOW_BYTES = 2**27
"""Memory that one stream may ask for: what `zstd --long` uses unless told otherwise."""


class TarStream(Protocol):
    """Bytes in sequence."""

    position: int
    """Of the next byte, from the start of the (unpacked) tar."""

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes; fewer only where the archive ends.

        Raises:
            SourceError: the archive is damaged, or unpacks to far more than it has.
            OSError: it cannot be read.
        """

    def skip(self, count: int) -> None:
        """Goes on by `count` bytes, or to the end; errors as `read` has them."""


def is_packed(path: bytes) -> bool:
    """Whether the name is one of a packed tar."""
    return path.lower().endswith(_GZIP_SUFFIXES + _ZSTD_SUFFIXES)


def open_stream(path: bytes) -> TarStream:
    """Opens an archive by the kind its name announces.

    Raises:
        SourceError: it is no regular file.
        OSError: it cannot be opened.
    """
    file = _File(path)
    return _Unpacked(file) if is_packed(path) else _Plain(file)


def read_at(path: bytes, start: int, stop: int) -> bytes:
    """Returns a range of a plain tar; fewer bytes where it ends before.

    Raises:
        SourceError: it is no regular file.
        OSError: it cannot be read.
    """
    file = _File(path)
    file.position = start
    return file.read(stop - start)


class _File:
    """Reads a regular file, opened anew for each read: nothing is left to close.

    It must stay the file it was when it was first opened.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.position = 0
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise SourceError(f"{for_display(path)} is no regular file")
        self.size = found.st_size
        self._identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def read(self, count: int) -> bytes:
        count = min(count, self.size - self.position)
        if count <= 0:
            return b""
        # Without O_NONBLOCK a pipe in the file's place would wait for a writer for ever.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if identity != self._identity:
                raise SourceError(
                    f"{for_display(self.path)} was changed while it was read",
                    hint="run the same command when nothing writes to the images any more",
                )
            parts = []
            while count > 0 and (part := os.pread(descriptor, count, self.position)):
                parts.append(part)
                self.position += len(part)
                count -= len(part)
        finally:
            os.close(descriptor)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Plain:
    """A `TarStream` over a plain tar; what is skipped is not read."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._ahead = b""
        self._start = 0
        self.position = 0

    def read(self, count: int) -> bytes:
        offset = self.position - self._start
        if not 0 <= offset <= len(self._ahead) - count:
            # Headers of small members are close to each other.
            self._file.position = self._start = self.position
            self._ahead, offset = self._file.read(max(count, 2**14)), 0
        data = self._ahead[offset : offset + count]
        self.position += len(data)
        return data

    def skip(self, count: int) -> None:
        self.position = min(self.position + count, self._file.size)


class _Unpacked:
    """A `TarStream` that unpacks; bounded, whatever the archive says."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._max_bytes = _FREE_BYTES + _MAX_RATIO * file.size
        self.position = 0
        if file.path.lower().endswith(_GZIP_SUFFIXES):
            self._read = gzip.GzipFile(fileobj=file, mode="rb").read  # type: ignore[call-overload]
        else:
            unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
            reader = unpacker.stream_reader(file, read_across_frames=True, closefd=False)  # type: ignore[arg-type]
            self._read = reader.read

    def read(self, count: int) -> bytes:
        shown = for_display(self._file.path)
        parts = []
        try:
            while count > 0 and (part := self._read(min(count, _BLOCK_BYTES))):
                parts.append(part)
                self.position += len(part)
                count -= len(part)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise SourceError(
                f"{shown} is damaged after {self.position} unpacked bytes: {error}",
                hint="get the archive again, or leave it out",
            ) from error
        if self.position > self._max_bytes:
            raise SourceError(
                f"{shown} unpacks from {self._file.size} to more than {self._max_bytes} bytes; "
                "at that ratio it is taken for an attack",
                hint="unpack it yourself if you trust it, and name the plain .tar",
            )
        return b"".join(parts)

    def skip(self, count: int) -> None:
        while count > 0 and (data := self.read(min(count, _BLOCK_BYTES))):
            count -= len(data)


class Window:
    """Reads a packed tar by position, best from front to back; any number of threads may call it.

    Args:
        path: The archive.
    """

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stream: TarStream | None = None
        self._blocks: deque[tuple[int, bytes]] = deque()

    def read(self, start: int, stop: int) -> bytes:
        """Returns a range of the unpacked tar; fewer bytes where it ends before.

        Raises:
            SourceError: the archive is damaged, was changed, or unpacks to far more than it has.
            OSError: it cannot be read.
        """
        with self._lock:
            try:
                return self._range(start, stop)
            except BaseException:
                # What is kept may have a gap; the next call begins again.
                self._stream = None
                raise

    def _range(self, start: int, stop: int) -> bytes:
        if self._stream is None or (start < (self._blocks[0][0] if self._blocks else 0)):
            self._stream = open_stream(self._path)
            self._blocks.clear()
        while self._stream.position < stop:
            first = self._stream.position
            data = self._stream.read(_BLOCK_BYTES)
            if not data:
                break
            self._blocks.append((first, data))
            # Blocks in front of the range and out of the window go.
            while (
                self._blocks[0][0] + len(self._blocks[0][1]) <= start
                and self._stream.position - self._blocks[0][0] > _WINDOW_BYTES
            ):
                self._blocks.popleft()
        parts = [
            data[max(start - first, 0) : stop - first]
            for first, data in self._blocks
            if first < stop and first + len(data) > start
        ]
        return b"".join(parts)
