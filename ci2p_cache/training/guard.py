"""Leaves out steps whose loss or gradients are not finite, without ever waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ci2p_cache.errors import TrainingDivergedError

__all__ = ["BadStep", "StepGuard"]

_MAX_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that was skipped."""

    epoch: int
    """Its epoch, from 1."""
    step: int
    """Its place in the epoch, from 0."""
    rows: list[int]
    """The rows of the train split in its batch."""


class StepGuard:
    """Makes a step happen or not by a flag that stays on the device.

    ::

        forward, backward
        guard.step(is_finite, bad_step)     the fused optimiser skips itself where the flag says so
        guard.read()                        now and then: waits for the device, gives bad steps

    Where everything is finite no value changes. All ranks give the same flag. BatchNorm's running
    statistics may take up what was not finite; `BatchNormStatistics` replaces them before any use.

    Args:
        optimizer: Fused; steps only through the guard.
        in_a_row: Bad steps directly before, of the run that is resumed.
    """

    def __init__(self, optimizer: Optimizer, *, in_a_row: int = 0) -> None:
        self.in_a_row = in_a_row
        self._optimizer = optimizer
        self._pending: list[tuple[BadStep, Tensor]] = []

    def step(self, is_finite: Tensor, bad_step: BadStep) -> None:
        """Makes the optimiser's step, or leaves everything as it was before.

        Args:
            is_finite: bool scalar on the device.
            bad_step: What to report where it is False.
        """
        # The fused kernels read this attribute; torch's GradScaler uses the same door.
        self._optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # not declared
        self._optimizer.step()
        self._pending.append((bad_step, is_finite))

    def read(self) -> list[BadStep]:
        """Waits for the device and returns the steps skipped since the last call.

        Raises:
            TrainingDivergedError: ten steps in a row were skipped.
        """
        if not self._pending:
            return []
        flags = torch.stack([flag for _, flag in self._pending]).tolist()
        bad = []
        for (step, _), is_finite in zip(self._pending, flags, strict=True):
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            if not is_finite:
                bad.append(step)
            if self.in_a_row >= _MAX_IN_A_ROW:
                raise TrainingDivergedError(
                    f"loss or gradients were not finite in {self.in_a_row} steps in a row, the "
                    f"last one step {step.step} of epoch {step.epoch} on the rows "
                    f"{_short(step.rows)} of the train split; none of these steps changed the "
                    "weights, and the last checkpoint is unharmed",
                    hint="train with a lower --lr or --precision float32 under another --name",
                )
        self._pending.clear()
        return bad


def _short(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
