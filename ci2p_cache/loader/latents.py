"""`LatentLoader`: batches from the cache, read ahead by threads into buffers that are used again.

::

    order(seed, epoch, step) -> one positioned read and one zstd call per sample, in threads,
        straight into the batch's buffer -> device -> dequantised there
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.order import Rows

__all__ = ["LatentLoader"]


class LatentLoader(BatchLoader):
    """Loads batches from a cache; checksums are verified as chunks are read.

    Compressed chunks are verified each time, raw ones (`--codec none`) when first touched.
    Arguments and errors are those of `BatchLoader`.

    Raises:
        ShardError: while iterating: a shard is missing, damaged or not committed.
    """

    def _prepare(self) -> None:
        self._free: list[_Buffer] = []
        self._used: _Buffer | None = None

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        buffer = self._free.pop() if self._free else self._new_buffer()
        array = buffer.array[: len(rows)]
        share = max(1, -(-len(rows) // self._threads))
        parts = [slice(i, i + share) for i in range(0, len(rows), share)]
        read = self.split.read_batch_into
        futures = [self._pool.submit(read, rows[part], views[part], array[part]) for part in parts]
        self._futures.update(futures)

        def finish() -> Tensor:
            self._give_back()
            for future in futures:
                future.result()
            self._futures.difference_update(futures)
            return self._hand_out(buffer, len(rows))

        return finish

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
