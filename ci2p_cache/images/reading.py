"""Reading files of a source, again where a failure may pass."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.names import for_display, join

__all__ = ["MAX_FILE_BYTES", "about", "changed", "identity", "opened", "path_below",
           "persistently", "pread", "read_archive", "read_file", "too_large"]  # fmt: skip

_T = TypeVar("_T")

MAX_FILE_BYTES = 512 * 2**20
"""Largest image file; the default `max_pixels` as uncompressed 16-bit RGB still fits."""

_WAITS_SECONDS = (0.1, 0.5)
"""Pauses between three tries: long enough for a network file system to find its server again."""

_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL}
)
"""Errors that say something about the file; all others may be the machine's, and are retried."""


def path_below(root: bytes, path: bytes) -> bytes:
    """Returns the absolute path of a file below `root`; a path that leads out is refused."""
    if path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
        raise SourceError(f"{for_display(path)} is no path below {for_display(root)}")
    return join(root, path)


def read_file(root: bytes, path: bytes) -> bytes:
    """Returns the content of a regular file below `root`; errors as `ImageSource.read` has them."""
    full = path_below(root, path)
    try:
        return persistently(lambda: _read_regular(full), full)
    except ResourceError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        # An unmounted disk must not turn every image into a bad one.
        if not _has_entries(root):
            raise ResourceError(
                f"the source {for_display(root)} is empty or gone; {for_display(path)} was wanted",
                hint="mount it again and run the same command",
            ) from error
        raise ImageDecodeError("the file has vanished since the plan was made") from error
    except PermissionError as error:
        raise ImageDecodeError("permission to read the file is denied") from error
    except OSError as error:
        raise ImageDecodeError(f"the file cannot be opened: {error.strerror}") from error


def _read_regular(full: bytes) -> bytes:
    with opened(full) as descriptor:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ImageDecodeError("it is no regular file any more")
        if found.st_size > MAX_FILE_BYTES:
            raise too_large(found.st_size)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()


def too_large(num_bytes: int) -> ImageDecodeError:
    """Returns the error of an image file with more than `MAX_FILE_BYTES`."""
    return ImageDecodeError(f"the file has {num_bytes} bytes; at most {MAX_FILE_BYTES} are read")


def _has_entries(root: bytes) -> bool:
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


@contextmanager
def opened(path: bytes) -> Iterator[int]:
    """Opens a file for reading; gives its descriptor."""
    # Without O_NONBLOCK a pipe there would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pread(descriptor: int, count: int, offset: int) -> bytes:
    """Returns `count` bytes from `offset` on; fewer only where the file ends."""
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)


def identity(path: bytes, found: os.stat_result | None = None) -> tuple[int, int, int, int]:
    """Returns device, inode, bytes and time of a file, which must be a regular one.

    Others show later that it was changed. `found` is what is known of it; None: look.
    """
    found = found or os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{for_display(path)} is no regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: bytes) -> SourceError:
    """Returns the error of a file that is not what it was when it was first opened."""
    return SourceError(
        f"{for_display(path)} was changed while it was read",
        hint="run the same command when nothing writes to the images any more",
    )


@contextmanager
def about(where: str) -> Iterator[None]:
    """Puts `where` in front of a `SourceError` whose message does without."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{where}{error}", hint=error.hint) from error


def persistently(action: Callable[[], _T], path: bytes) -> _T:
    """Calls `action`, again from the beginning where it fails for a reason that may pass.

    Raises:
        ResourceError: it failed three times; the message names `path`.
        OSError: it failed for a reason that is in the file itself.
    """
    for wait_seconds in (*_WAITS_SECONDS, None):
        try:
            return action()
        except OSError as error:
            if error.errno in _LASTING:
                raise
            if wait_seconds is None:
                raise ResourceError(
                    f"{for_display(path)} cannot be read after {len(_WAITS_SECONDS) + 1} tries: "
                    f"{error.strerror or error}",
                    hint="when the disk or network is well again, run the same command",
                ) from error
            time.sleep(wait_seconds)
    raise AssertionError("the last try returns or raises")


def read_archive(action: Callable[[], _T], path: bytes) -> _T:
    """Calls `action`, which reads an archive, as `persistently` does.

    An archive that is missing or may not be read is never the trouble of one image: it is a
    `ResourceError` that it has gone, a `SourceError` that it cannot be opened.
    """
    try:
        return persistently(action, path)
    except ResourceError:
        raise
    except FileNotFoundError as error:
        raise ResourceError(
            f"{for_display(path)} has gone", hint="put it back and run the same command"
        ) from error
    except OSError as error:
        raise SourceError(
            f"{for_display(path)} cannot be read: {error.strerror or error}",
            hint="make it readable, or leave it out of the source",
        ) from error
