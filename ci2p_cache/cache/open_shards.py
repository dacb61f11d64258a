"""Which shards of a split are open: few files at a time, however many shards there are.

Random order meets another shard with nearly every sample. ImageNet has 1,252 of them and a process
may often have no more than 1,024 files open, so shards are closed again. What is kept of a closed
one is its index: where commit record and index were checked anew, a read took five times as long
(932 against 183 us, 1,252 shards, a busy core).
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable

from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.errors import ShardError

__all__ = ["ForkedLock", "OpenShards"]

_OPEN_SHARE = 4
"""One split keeps a quarter of the files that the process may open: 256 of the common 1,024."""

_MAX_INDEX_BYTES = 256 * 2**20
"""Of the indexes one split keeps of closed shards: 8 million rows with two views."""


class ForkedLock:
    """A lock between threads; in a forked process no one holds it, whoever held it at the fork."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class OpenShards:
    """The open shards of one split; safe to use from many threads and forked processes.

    Args:
        open_shard: Opens a shard by its number, checked against its commit record.
    """

    def __init__(self, open_shard: Callable[[int], ShardReader]) -> None:
        self._open_shard = open_shard
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._known: dict[int, tuple[Callable[[], ShardReader], int]] = {}
        self._index_bytes = 0
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
        if shard in self._known:
            reopen, size = self._known[shard]
            try:
                return reopen()
            except ShardError:
                # Another file is there by now: what its own commit record says decides.
                del self._known[shard]
                self._index_bytes -= size
        file = self._open_shard(shard)
        size = file.known_bytes
        if self._index_bytes + size <= _MAX_INDEX_BYTES:
            self._known[shard] = file.reopener(), size
            self._index_bytes += size
        return file


def _max_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel's own ceiling stands in for "no limit".
    return max(1, min(2**20, soft if soft >= 0 else 2**20) // _OPEN_SHARE)
