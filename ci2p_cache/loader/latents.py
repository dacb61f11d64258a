"""`LatentLoader`: batches from the cache, read ahead by threads into buffers that are used again.

::

    order(seed, epoch, step) -> one positioned read and one zstd call per sample, in threads,
        straight into the batch's buffer -> device -> dequantised there
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.order import Rows

__all__ = ["LatentLoader"]

_AT_HAND_BYTES_PER_SECOND = 2e9
"""Raw chunks that come this fast are in memory: page cache gives 6 to 10 GB/s, and the first touch,
which checks them, or a disk's random reads 1.5 at most."""
_AT_HAND_BUSY = 0.9
"""Of the time that compressed chunks take, what their thread computes where no disk holds it up."""


class LatentLoader(BatchLoader):
    """Loads batches from a cache; checksums are verified as chunks are read.

    Compressed chunks are verified each time, raw ones (`--codec none`) when first touched. Batches
    for a CPU that have proved to be in memory are read when they are asked for, not ahead of it, if
    the chunks are raw or one thread reads: one buffer stays in the processor's cache and no thread
    has to wake (batches of 128, 49 kB each, one core: raw ones 0.70 instead of 0.54 of a gather in
    memory). Should they become slow to come, they are read ahead again.

    Arguments and errors are those of `__init__`.

    Raises:
        ShardError: while iterating: a shard is missing, damaged or not committed.
    """

    def _prepare(self) -> None:
        self._free: list[_Buffer] = []
        self._used: _Buffer | None = None
        is_simple = self.split.is_mapped or self._threads == 1
        self._may_be_at_hand = is_simple and self.device.type == "cpu"
        self._is_at_hand = False

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        if self._is_at_hand:
            return lambda: self._read_now(rows, views)
        buffer = self._free.pop() if self._free else self._new_buffer()
        array = buffer.array[: len(rows)]
        share = max(1, -(-len(rows) // self._threads))
        parts = [slice(i, i + share) for i in range(0, len(rows), share)]
        futures = [
            self._pool.submit(self._read, rows[part], views[part], array[part]) for part in parts
        ]
        pending = self._futures
        pending.update(futures)

        def finish() -> Tensor:
            self._give_back()
            times = [future.result() for future in futures]
            pending.difference_update(futures)
            self._judge(array.nbytes, times)
            return self._hand_out(buffer, len(rows))

        return finish

    def _read(self, rows: Rows, views: Rows, out: npt.NDArray[Any]) -> tuple[float, float]:
        """Reads some latents; returns the seconds that it took, and those of the processor."""
        started, busy = time.perf_counter(), time.thread_time()
        self.split.read_batch_into(rows, views, out)
        return time.perf_counter() - started, time.thread_time() - busy

    def _read_now(self, rows: Rows, views: Rows) -> Tensor:
        """Reads a batch in the calling thread."""
        self._give_back()
        buffer = self._free.pop() if self._free else self._new_buffer()
        array = buffer.array[: len(rows)]
        self._judge(array.nbytes, [self._read(rows, views, array)])
        return self._hand_out(buffer, len(rows))

    def _judge(self, num_bytes: int, times: list[tuple[float, float]]) -> None:
        if not num_bytes:
            # Of the last batch of an epoch, a rank's slice may be empty.
            return
        seconds, busy = (sum(each) for each in zip(*times, strict=True))
        if self.split.is_mapped:
            is_fast = num_bytes > seconds * _AT_HAND_BYTES_PER_SECOND
        else:
            is_fast = busy > seconds * _AT_HAND_BUSY
        self._is_at_hand = self._may_be_at_hand and is_fast

    def _new_buffer(self) -> _Buffer:
        latent = self.split.latent
        pinned = self.device.type == "cuda"
        shape = (self._largest_slice, *latent.shape)
        stored = torch.empty(shape, dtype=getattr(torch, latent.dtype), pin_memory=pinned)
        return _Buffer(stored, stored.numpy())

    def _hand_out(self, buffer: _Buffer, count: int) -> Tensor:
        if self.device.type == "cuda":
            # The batch is a copy, so that the pinned memory is always used again.
            stored = buffer.stored[:count].to(self.device, non_blocking=True)
            buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch stub
            buffer.copied.record()
            self._used = buffer
            return stored
        if self._recycle:
            self._used = buffer
        return buffer.stored[:count]

    def _give_back(self) -> None:
        """Makes the buffer of the batch handed out last free again, once its copy is done."""
        if self._used is not None:
            if self._used.copied is not None:
                self._used.copied.synchronize()
            self._free.append(self._used)
            self._used = None


@dataclass(slots=True)
class _Buffer:
    """Host memory of one batch as it is stored, and the same memory as numpy sees it."""

    stored: Tensor
    array: npt.NDArray[Any]
    copied: torch.cuda.Event | None = None
