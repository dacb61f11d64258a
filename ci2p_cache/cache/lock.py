"""One writer at a time per folder: an advisory lock that names its holder and dies with it.

::

    .lock              all of the folder: a run over every shard, a repair; and, for a moment, a
                       range that starts, plans or finalises
    .lock.2-2-of-4     that range of the shards, as long as its process runs

Locks are flock's. On one machine the kernel drops them with their process. On a folder that
machines share they hold between machines where the file system carries flock from one to another:
NFS (Linux since 2.6.12; not mounted with `nolock` or `local_lock`), Lustre mounted with `-o flock`,
CephFS, GPFS. Where it does not, two machines do not notice each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.errors import LockedError, ManifestError
from ci2p_cache.record import Record

__all__ = [
    "LOCK", "ForkedLock", "LockHolder", "live_ranges", "lock_holder", "locked", "range_lock",
]  # fmt: skip

LOCK = ".lock"

_PATIENCE_SECONDS = 0.3
"""A lock is tried again that long: `status` holds it for an instant to see whether it is held."""
_PAUSE_SECONDS = 0.05
_MAX_HOLDER_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder(Record):
    """Who holds a lock, as it says itself; with the defaults one that gives no name."""

    host: str = ""
    """Name of its machine."""
    pid: int = 0
    """Process id there."""
    what: str = ""
    """What it does: encode, repair, range 2/4."""

    def __str__(self) -> str:
        if not self.pid:
            return "an unnamed process"
        return f"{self.what} on host {self.host}, process {self.pid}"


def range_lock(root: Path, part: ShardRange) -> Path:
    """Returns the path of a range's lock file."""
    return root / f"{LOCK}.{part.label}"


@contextmanager
def locked(
    path: Path, *, what: str, waits_for: Callable[[LockHolder], bool] = lambda _: False
) -> Iterator[None]:
    """Holds the lock file `path` while the block runs.

    The kernel drops the lock when the process ends, however it ends, so a lock is never stale.

    Args:
        path: The lock file; its folder exists. Removed when the block ends.
        what: What the holder does, for the loser's message, for example "encode".
        waits_for: Says of a holder whether to wait for its end.

    Raises:
        LockedError: another process holds it; the message names its host and process id.
        ResourceError: the lock file cannot be written or removed.
    """
    with disk_errors(path):
        descriptor = _acquire(path, what, waits_for)
    try:
        holder = LockHolder(host=socket.gethostname(), pid=os.getpid(), what=what)
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder.to_dict()).encode(), 0)
        yield
    finally:
        try:
            # Unlinked while still held: whoever opened it meanwhile sees another inode and retries.
            with disk_errors(path):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def lock_holder(path: Path) -> LockHolder | None:
    """Returns who holds a lock, or None; the lock file may be missing.

    It is looked at by locking it for an instant, shared; `locked` tries again meanwhile. A lock
    file that a killed process left behind is free.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def live_ranges(root: Path) -> list[tuple[ShardRange, LockHolder]]:
    """Returns the ranges that are being encoded now, in their order, with who does it."""
    found = []
    for path in root.glob(f"{LOCK}.*"):
        part = ShardRange.of_label(path.name.removeprefix(f"{LOCK}."))
        if part is not None and (holder := lock_holder(path)) is not None:
            found.append((part, holder))
    return sorted(found, key=lambda item: (item[0].first / item[0].of, str(item[0])))


def _acquire(path: Path, what: str, waits_for: Callable[[LockHolder], bool]) -> int:
    given_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        # A link there would be followed and its target written to.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if waits_for(holder) or time.monotonic() < given_up:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise LockedError(
                f"another process works on {path.parent}: {holder}; this {what} changed nothing",
                hint="wait for it to end, or stop it, then run the same command again",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise


def _read_holder(descriptor: int) -> LockHolder:
    try:
        return LockHolder.from_dict(json.loads(os.pread(descriptor, _MAX_HOLDER_BYTES, 0)))
    except (OSError, ValueError, ManifestError, RecursionError):
        return LockHolder()


class ForkedLock:
    """A lock between threads; in a forked process it is free, even if it was held at the fork."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
