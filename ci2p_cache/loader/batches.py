"""`Batch`, and `BatchLoader`: what every loader shares, wherever its latents come from.

::

    order(seed, epoch, step) -> [a loader: stored values, on the device] -> dequantised there

Shapes: B batch, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.errors import InputDataError, UsageError
from ci2p_cache.loader.order import (
    Rows,
    block_order,
    epoch_order,
    epoch_views,
    num_batches,
    rank_slice,
)
from ci2p_cache.machine import num_cores

__all__ = ["Batch", "BatchLoader", "Shuffle"]


@dataclass(slots=True, eq=False, repr=False)
class Batch:
    """One training batch, or this rank's slice of it: B may then be 0.

    Compared by identity, because tensors have no single truth value.
    """

    stored: Tensor
    """What the cache stores, (B, M, h, w) of its dtype on the loader's device."""
    labels: Tensor
    """int64 (B,) on the loader's device."""
    rows: Tensor
    """int64 (B,) on CPU: the samples' rows in the split."""
    global_rows: Tensor
    """int64 (G,) on CPU: the rows of the whole batch, of all ranks in order; alone, `rows`."""
    _dequantise: Callable[[Tensor], Tensor] | None
    _latents: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # With its latents: what makes them belongs to the loader, which cannot be pickled.
        return Batch, (
            self.stored, self.labels, self.rows, self.global_rows, None, self.latents
        )  # fmt: skip

    def __repr__(self) -> str:
        stored = self.stored
        shape, dtype = tuple(stored.shape), str(stored.dtype).removeprefix("torch.")
        return f"Batch(stored={dtype} {shape} on {stored.device}, rows={_few(self.rows)})"

    @property
    def latents(self) -> Tensor:
        """float32 (B, M, h, w) on the loader's device, dequantised when first asked for."""
        if self._latents is None:
            assert self._dequantise is not None, "a copy has its latents"
            self._latents = self._dequantise(self.stored)
        return self._latents


def _few(rows: Tensor) -> str:
    """Returns row numbers as text, of many the first."""
    shown = ", ".join(map(str, rows[:4].tolist()))
    return f"[{shown}]" if len(rows) <= 4 else f"[{shown}, ... {len(rows)}]"


Shuffle = bool | Literal["blocks"]
"""True: any sample may come at any time. blocks: shards come in random order, eight at a time, with
their samples mixed, so that slow storage is read nearly in sequence. False: by row."""

_READ_AHEAD = 3
"""Batches being read while one is used: two would do at even speeds, the third evens out jitter."""
_READ_AHEAD_RAW = 1
"""The same where chunks are just copied: fewer buffers stay in the processor's cache, and loading
runs at 0.44 instead of 0.36 of a gather in memory (batches of 128, 49 kB each, busy core)."""


class BatchLoader(ABC):
    """What all loaders share: the order, the place in it, and reading ahead.

    The order is a pure function of (seed, epoch, step); the state is these three integers. A loop
    yields the batches of the current epoch and then stands at the start of the next. A loop that
    was left early starts the same epoch over the next time; `load_state_dict` with what
    `state_dict` gave continues behind the last batch instead, and `set_epoch` chooses another
    order.
    `waited_seconds` sums the time that the consumer waited for data.

    With `recycle`, a batch is valid until the next one is asked for, and nothing of a batch's size
    is allocated on the host once the first few are read: fresh memory for each batch costs several
    times the reading itself.

    Of several ranks each takes its slice of every batch of one global sequence, which is the same
    for any number of ranks, and so is the state. All ranks get equally many batches; where one has
    fewer samples than ranks, the last ranks' slices are empty.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        shuffle: Shuffle = True,
        views: Literal["random"] | int = "random",
        drop_last: bool = False,
        threads: int | None = None,
        recycle: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Makes a loader at the start of epoch 0.

        A loop over it yields `Batch`es: `latents` float32 (B, M, h, w), in `PixelLoader` images
        (B, 3, H, W) in [0, 1]; `labels` int64 (B,), -1 where there is none; `rows` int64 (B,).

        Args:
            split: The split to read.
            batch_size: Samples per batch, of all ranks together; the last of an epoch may be
                smaller.
            seed: Seed of the order and of the views.
            device: Where batches are put.
            shuffle: Whether to shuffle, and how; False gives the rows in ascending order.
            views: Which view of a sample: random draws one per (seed, epoch, row), a number fixes
                it.
            drop_last: Whether to leave out the last, smaller batch.
            threads: Threads that read; None: one per core.
            recycle: Whether the memory of a batch is used again for later ones.
            rank: This process among those that share the batches, 0 <= rank < world_size.
            world_size: Number of processes that share the batches.

        Raises:
            UsageError: a value is out of range.
            InputDataError: the split holds no latent.
        """
        if batch_size < 1:
            raise UsageError(f"`batch_size` is {batch_size}; it must be at least 1")
        if views != "random" and not 0 <= views < split.num_views:
            raise UsageError(
                f"`views` is {views}; split {split.name!r} has views 0 to {split.num_views - 1}"
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"`rank` is {rank} of `world_size` {world_size}; it must be below it")
        if not len(split.valid_rows):
            raise InputDataError(f"split {split.name!r} of {split.cache.path} holds no latent")
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.step = 0
        self.waited_seconds = 0.0
        self._first_step: int | None = None
        self._is_closed = False
        self._shuffle = shuffle
        self._views = views
        self._drop_last = drop_last
        self._threads = threads or num_cores()
        self._recycle = recycle
        self._offset = torch.from_numpy(split.offset).to(self.device)[:, None, None]
        self._floats: Tensor | None = None
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._futures: set[Future[Any]] = set()
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Makes what a loader needs beside what all have; called last on construction."""

    @property
    def num_samples(self) -> int:
        """Samples that an epoch hands out, to all ranks together."""
        total = len(self.split.valid_rows)
        return len(self) * self.batch_size if self._drop_last else total

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        total = len(self.split.valid_rows)
        return num_batches(total, self.batch_size, drop_last=self._drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch."""
        self.epoch, self.step, self._first_step = epoch, 0, None

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the order: seed, epoch, and batches of it handed out."""
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Has the next loop begin at a place that `state_dict` gave, with this loader's batch size.

        Raises:
            UsageError: the state is of another seed: the order would be another.
        """
        if state["seed"] != self.seed:
            raise UsageError(f"the state has seed {state['seed']}, this loader has {self.seed}")
        self.epoch, self.step = state["epoch"], state["step"]
        self._first_step = self.step

    def close(self) -> None:
        """Ends the threads; a loop over a closed loader raises."""
        self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the current epoch, from its start or where a state was loaded.

        Raises:
            UsageError: the loader is closed, now or when a batch is asked for.
        """
        self._require_open()
        if self._first_step is None:
            # A loop that was left behind its last batch is done with its epoch.
            self.epoch += 0 < len(self) <= self.step
        self.step, self._first_step = self._first_step or 0, None
        return self._batches(self.epoch, self.step)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        rows, views = self._sequence(epoch)
        upcoming = iter(range(first, len(self)))
        most = _READ_AHEAD_RAW if self.split.is_mapped else _READ_AHEAD
        ahead: deque[tuple[int, Callable[[], Batch]]] = deque()
        futures: set[Future[Any]] = set()
        try:
            while True:
                self._require_open()
                while len(ahead) < most and (step := next(upcoming, None)) is not None:
                    part = slice(step * self.batch_size, (step + 1) * self.batch_size)
                    # Of this loop alone: another one over the loader may begin or end meanwhile.
                    self._futures = futures
                    ahead.append((step, self._start_batch(rows[part], views[part])))
                if not ahead:
                    break
                asked = time.perf_counter()
                step, finish = ahead.popleft()
                batch = finish()
                self.waited_seconds += time.perf_counter() - asked
                self.epoch, self.step = epoch, step + 1
                yield batch
        finally:
            # Left early: what is still being read goes into buffers that no one uses again.
            for future in futures:
                future.cancel()
        self.epoch, self.step = epoch + 1, 0

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError(
                f"this {type(self).__name__} of split {self.split.name!r} is closed",
                hint="make a new loader, or loop over it inside its `with` block",
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.split!r}, batch_size={self.batch_size}, "
            f"seed={self.seed}, device={self.device}, epoch={self.epoch}, step={self.step} of "
            f"{len(self)})"
        )

    def _sequence(self, epoch: int) -> tuple[Rows, Rows]:
        """Returns the rows of an epoch in order, and the view of each."""
        rows = self.split.valid_rows
        if self._shuffle == "blocks":
            size = self.split.record.shard_rows
            rows = block_order(rows, size, seed=self.seed, epoch=epoch)
        elif self._shuffle:
            rows = epoch_order(rows, seed=self.seed, epoch=epoch)
        if self._views == "random":
            return rows, epoch_views(rows, self.split.num_views, seed=self.seed, epoch=epoch)
        return rows, np.full(len(rows), self._views, np.int64)

    def _start_batch(self, global_rows: Rows, views: Rows) -> Callable[[], Batch]:
        """Starts reading this rank's slice of a batch; the returned function waits for it."""
        own = rank_slice(len(global_rows), rank=self.rank, world_size=self.world_size)
        rows = global_rows[own]
        finish = self._start(rows, views[own])

        def hand_out() -> Batch:
            stored = finish()
            labels = torch.from_numpy(self.split.labels[rows].astype(np.int64))
            return Batch(
                stored,
                labels.to(self.device),
                torch.from_numpy(rows.copy()),
                torch.from_numpy(global_rows.copy()),
                self._dequantised,
            )

        return hand_out

    @abstractmethod
    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        """Starts reading; the returned function waits and gives what is stored, on the device."""

    def _dequantised(self, stored: Tensor) -> Tensor:
        """Returns stored values as float32 (B, M, h, w): symbols * step + median, or y itself."""
        if stored.dtype == torch.float32:
            return stored
        # Copied first: an operation that converts on its way takes memory for it, and is slower.
        latents = self._float_memory(stored).copy_(stored)
        if self.split.latent.is_symbols:
            if self.split.scale != 1.0:
                latents.mul_(self.split.scale)
            latents.add_(self._offset)
        return latents

    def _float_memory(self, stored: Tensor) -> Tensor:
        if not self._recycle or self.device.type == "cuda":
            # torch itself keeps CUDA memory for later use.
            return torch.empty(stored.shape, dtype=torch.float32, device=self.device)
        if self._floats is None:
            shape = (self._largest_slice, *stored.shape[1:])
            self._floats = torch.empty(shape, dtype=torch.float32)
        return self._floats[: len(stored)]

    @property
    def _largest_slice(self) -> int:
        """Samples of the largest slice of a batch that this rank may get."""
        largest = rank_slice(self.batch_size, rank=0, world_size=self.world_size)
        return int(largest.stop)
