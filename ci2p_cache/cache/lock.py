"""One writer at a time per folder: an advisory lock that names its holder and dies with it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ci2p_cache.cache.commit import disk_errors
from ci2p_cache.errors import LockedError

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the block runs.

    The kernel drops the lock when the process ends, however it ends, so a lock is never stale.

    Args:
        path: The lock file; its folder exists. Removed when the block ends.
        what: What the holder does, for the loser's message, for example "encode".

    Raises:
        LockedError: another process holds it; the message names its host and process id.
        ResourceError: the lock file cannot be written or removed.
    """
    with disk_errors(path):
        descriptor = _acquire(path, what)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "what": what}
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        try:
            # Unlinked while still held: whoever opened it meanwhile sees another inode and retries.
            with disk_errors(path):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    while True:
        with disk_errors(path):
            # A link there would be followed and its target written to.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise LockedError(
                f"another process works on {path.parent}: {holder}; this {what} changed nothing",
                hint="wait for it to end, or stop it, then run the same command again",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        try:
            same = path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            same = False
        if same:
            return descriptor
        os.close(descriptor)


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"{holder['what']} on host {holder['host']}, process {holder['pid']}"
    except (ValueError, KeyError, TypeError):
        return "an unnamed process"
