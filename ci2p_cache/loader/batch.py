"""`Batch`: what a loader hands out for one training step.

Shapes: B batch, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Batch"]


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
