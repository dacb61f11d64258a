"""One writer at a time per folder: a lock file that names its holder, and dies with it.

::

    .lock              all of the folder: a run over every shard, a repair; and, for a moment, a
                       range that starts, plans or finalises
    .lock.2-2-of-4     that range of the shards, as long as its process runs

Who creates the file has the lock. A file that is there already is judged by two things:

- flock. The kernel drops it with its process, so on one machine a killed one is followed at once.
- Its age, where flock proves nothing: the holder is on another machine, or sees the folder through
  another mount, and the file system carries no flock between the two (NFS mounted with `nolock` or
  `local_lock`, Lustre with `localflock`, most FUSE file systems) or has none at all. The holder
  writes the file again every `_BEAT_SECONDS`; after `_SILENT_SECONDS` without that it counts as
  dead. Both times are the file system's, so the clocks of the machines may differ.

A holder that was suspended for that long may wake after its lock was taken over. Its staging
folder is gone then, so nothing of it gets into the cache any more (`cache/staging.py`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
"""Six beats: a server may be slow, and a process may be stopped for a moment."""
_UNNAMED_SECONDS = 1.0
"""Between creating the file and writing the name; a killed process may leave it so."""
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_GONE = (errno.ENOENT, errno.ESTALE)
"""Said of an open file too, where another machine has removed it."""
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
    scope: str = ""
    """Where its flock counts: the running kernel, and the file system as it is mounted there."""

    def __str__(self) -> str:
        if not self.pid:
            return "an unnamed process"
        return f"{self.what} on host {self.host}, process {self.pid}"


def range_lock(root: Path, part: ShardRange) -> Path:
    """Returns the path of a range's lock file."""
    return root / f"{LOCK}.{part.label}"


@contextmanager
def locked(
    path: Path,
    *,
    what: str,
    waits_for: Callable[[LockHolder], bool] = lambda _: False,
    is_kept: bool = True,
) -> Iterator[Callable[[], None]]:
    """Holds the lock file `path` while the block runs; a thread writes it again and again.

    Yields the function that starts the thread, for `is_kept` False.

    Args:
        path: The lock file; its folder exists. Removed when the block ends.
        what: What the holder does, for the loser's message, for example "encode".
        waits_for: Says of a holder whether to wait for its end.
        is_kept: Whether the thread starts at once; if not, it is wanted within seconds.

    Raises:
        LockedError: another process holds it; the message names its host and process id.
        ResourceError: the lock file cannot be written or removed.
    """
    with disk_errors(path):
        descriptor = _acquire(path, what, waits_for)
        scope = _scope(descriptor)
    ended, beats = threading.Event(), None
    holder = LockHolder(host=socket.gethostname(), pid=os.getpid(), what=what, scope=scope)
    try:
        text = json.dumps(holder.to_dict()).encode()
        with disk_errors(path):
            _write(descriptor, text)
        beats = threading.Thread(target=_beat, args=(descriptor, text, ended), daemon=True)
        if is_kept:
            beats.start()
        yield beats.start
    finally:
        try:
            ended.set()
            if beats is not None and beats.ident is not None:
                beats.join()
            # Unlinked while still held: whoever opened it meanwhile sees another inode and retries.
            with disk_errors(path):
                if _named_in(path) in (holder, LockHolder()):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def lock_holder(path: Path) -> LockHolder | None:
    """Returns who holds a lock, or None; the lock file may be missing.

    It is looked at by locking it for an instant, shared; `locked` waits meanwhile. A lock file that
    a killed process left behind is free.
    """
    try:
        descriptor = _open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        holder, lives = _judge(descriptor, path, fcntl.LOCK_SH)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return holder if lives else None


def live_ranges(root: Path) -> list[tuple[ShardRange, LockHolder]]:
    """Returns the ranges that are being encoded now, in their order, with who does it."""
    found = []
    for path in root.glob(f"{LOCK}.*"):
        part = ShardRange.of_label(path.name.removeprefix(f"{LOCK}."))
        if part is not None and (holder := lock_holder(path)) is not None:
            found.append((part, holder))
    return sorted(found, key=lambda item: (item[0].first / item[0].of, str(item[0])))


def _acquire(path: Path, what: str, waits_for: Callable[[LockHolder], bool]) -> int:
    """Creates the lock file, which names no holder yet, and locks it; returns its descriptor."""
    started = time.monotonic()
    while True:
        try:
            # A link there is not followed.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o644)
        except FileExistsError:
            holder = _cleared(path)
            if holder is None:
                continue
            patience = _PATIENCE_SECONDS + (0 if holder.pid else _UNNAMED_SECONDS)
            if waits_for(holder) or time.monotonic() < started + patience:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise LockedError(
                f"another process works on {path.parent}: {holder}; this {what} changed nothing",
                hint="wait for it to end, or stop it, then run the same command again. If its "
                f"machine was lost, its lock is free after {_SILENT_SECONDS:.0f} seconds.",
            ) from None
        try:
            # Others lock it for an instant, to look at it.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _cleared(path: Path) -> LockHolder | None:
    """Returns who holds a lock file that is there; one without a live holder is removed."""
    try:
        descriptor = _open(path, os.O_RDWR)
        try:
            holder, lives = _judge(descriptor, path, fcntl.LOCK_EX)
            if lives:
                return holder
            # Another may have removed it, and made its own: a new file, with another name in it. On
            # some file systems an open file seems to be whatever has its name by now.
            if _is_at(path, descriptor) and _named_in(path) == holder:
                path.unlink()
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _GONE:
            raise
    return None


def _open(path: Path, how: int) -> int:
    return os.open(path, how | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _judge(descriptor: int, path: Path, how: int) -> tuple[LockHolder, bool]:
    """Returns whom an open lock file names, and whether that process lives; may lock the file."""
    scope = ""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        scope = _scope(descriptor)
    except BlockingIOError:
        return _read_holder(descriptor), True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    holder = _read_holder(descriptor)
    if holder.pid and holder.scope == scope:
        return holder, False
    silent = abs(_now(path.parent) - os.fstat(descriptor).st_mtime)
    return holder, silent < (_SILENT_SECONDS if holder.pid else _UNNAMED_SECONDS)


def _now(folder: Path) -> float:
    """Returns the time by the clock of a folder's file system."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"now")
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        # Of a user who may only read, or on a full disk.
        return time.time()


def _scope(descriptor: int) -> str:
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = socket.gethostname()
    return f"{kernel}/{os.fstat(descriptor).st_dev}"


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False


def _write(descriptor: int, text: bytes) -> None:
    """Writes a small file through to the disk, or to the server, which notes the time."""
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def _beat(descriptor: int, text: bytes, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):
            _write(descriptor, text)


def _named_in(path: Path) -> LockHolder | None:
    """Returns whom a lock file names, opened anew; None where it is missing."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read_holder(descriptor)
    finally:
        os.close(descriptor)


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
