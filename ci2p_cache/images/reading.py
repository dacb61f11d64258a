"""Reading a file of a source, again where a failure may pass; what it holds is not known here."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.names import for_display, join

__all__ = ["MAX_FILE_BYTES", "persistently", "place_below", "read_file"]

_T = TypeVar("_T")

MAX_FILE_BYTES = 512 * 2**20
"""Of one image file; the default `max_pixels` as uncompressed 16-bit RGB still fits."""

_WAITS_SECONDS = (0.1, 0.5)
"""Pauses between three tries: long enough for a network file system to find its server again."""

_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL}
)
"""Errors that say something about the file; all others may be the machine's, and are retried."""


def place_below(root: bytes, path: bytes) -> bytes:
    """Returns the absolute path of a file below `root`.

    Raises:
        SourceError: the path leads out of it.
    """
    if path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
        raise SourceError(f"{for_display(path)} is no path below {for_display(root)}")
    return join(root, path)


def read_file(root: bytes, path: bytes) -> bytes:
    """Returns the content of a regular file below `root`; errors as `ImageSource.read` has them."""
    full = place_below(root, path)
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
    # Without O_NONBLOCK a pipe in the file's place would wait for a writer for ever.
    descriptor = os.open(full, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ImageDecodeError("it is no regular file any more")
        if found.st_size > MAX_FILE_BYTES:
            raise ImageDecodeError(
                f"the file has {found.st_size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _has_entries(root: bytes) -> bool:
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def persistently(action: Callable[[], _T], path: bytes) -> _T:
    """Calls `action`, again where it fails for a reason that may pass.

    Args:
        action: What to do; it starts from the beginning each time.
        path: What it reads, for messages.

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
