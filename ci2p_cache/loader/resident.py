"""`ResidentLoader`: the whole split in memory, on the device that uses it; batches are gathered.

All of ImageNet is 63 GB of int8 a view: two fit on one H200. Where a split fits, an epoch reads no
file and copies nothing to the device but row numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.errors import ResourceError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.order import Rows
from ci2p_cache.machine import free_memory_bytes

__all__ = ["Resident", "ResidentLoader", "choose_resident"]

Resident = Literal["auto", "yes", "no"]

_SHARE = 0.6
"""Of the free memory, for the split: the rest is for the model, its gradients and activations."""

_READ_BYTES = 2**25
"""Read at a time while the split is loaded."""


def resident_bytes(split: Split) -> int:
    """Returns what the stored latents of all views of a split take in memory, in bytes."""
    return len(split.valid_rows) * split.num_views * split.latent.num_bytes


def choose_resident(split: Split, device: torch.device, wanted: Resident) -> tuple[bool, str]:
    """Decides whether a split is kept in memory.

    `auto` keeps it in a CUDA device's memory where it takes at most 60 % of what is free there, and
    never in a CPU's: there the page cache does the same, compressed, and reading costs a
    thousandth of training.

    Args:
        split: The split.
        device: Where batches are used.
        wanted: auto, yes or no.

    Returns:
        Whether to, and a sentence that says why, empty where there is nothing to say.

    Raises:
        ResourceError: yes was asked for and it does not fit at all.
    """
    if wanted == "no" or (wanted == "auto" and device.type != "cuda"):
        return False, ""
    need, free = resident_bytes(split), free_memory_bytes(device)
    what = f"the latents of split {split.name!r} take {_gb(need)} and {device} has {_gb(free)} free"
    if wanted == "yes":
        if need > free:
            raise ResourceError(
                f"{what}: they do not fit", hint="--resident no reads them from disk, ahead of use"
            )
        return True, f"{what}; they are kept there."
    if need > _SHARE * free:
        return False, (
            f"{what}, of which {_SHARE:.0%} may be taken: they are read from disk, ahead of use."
        )
    return True, f"{what}; they are kept there."


class ResidentLoader(BatchLoader):
    """Loads batches from memory: the split is read once, on construction, and verified then.

    Gives what `LatentLoader` gives, in the same order. Arguments and errors are those of
    `__init__`.

    Raises:
        ShardError: on construction: a shard is missing, damaged or not committed.
    """

    def _prepare(self) -> None:
        split, latent = self.split, self.split.latent
        rows, views = split.valid_rows, split.num_views
        shape = (len(rows) * views, *latent.shape)
        self._all = torch.empty(shape, dtype=getattr(torch, latent.dtype), device=self.device)
        self._place = np.zeros(split.num_rows, np.int64)
        self._place[rows] = np.arange(len(rows)) * views
        self._buffer: npt.NDArray[Any] | None = None
        for view in range(views):
            with LatentLoader(
                split,
                batch_size=math.ceil(_READ_BYTES / latent.num_bytes),
                device=self.device,
                shuffle=False,
                views=view,
                threads=self._threads,
                recycle=True,
            ) as loader:
                for batch in loader:
                    places = torch.from_numpy(self._place[batch.rows.numpy()] + view)
                    self._all[places.to(self.device)] = batch.stored

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        places = self._place[rows] + views
        if self.device.type == "cuda":
            return lambda: self._all.index_select(0, torch.from_numpy(places).to(self.device))
        return lambda: self._gathered(places)

    def _gathered(self, places: Rows) -> Tensor:
        """Copies latents together on the CPU, where numpy is faster than torch."""
        if self._buffer is None or not self._recycle:
            shape = (self._largest_slice, *self.split.latent.shape)
            self._buffer = np.empty(shape, self.split.latent.dtype)
        out = self._buffer[: len(places)]
        # Places are in range; any mode but "raise" lets numpy write to `out` directly.
        np.take(self._all.numpy(), places, axis=0, out=out, mode="clip")
        return torch.from_numpy(out)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
