"""`WeightAverage`: an exponential moving average of a model's weights, which is then validated.

Polyak and Juditsky 1992; in the form that TensorFlow and timm made usual for image models.
`timm.utils.ModelEmaV3` does the same but cannot leave out a step by a flag on the device, which is
how a step that was not finite leaves everything as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage", "decay_at"]


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of a step, counted from 0 over all epochs: min(decay, (1 + t) / (10 + t)).

    The rise of TensorFlow's `ExponentialMovingAverage`: without it the average of a short run, or
    of the first epochs, is mostly the random weights that it started from.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """A model whose floating-point parameters and buffers are the averages of another's.

    BatchNorm's running statistics are averaged like weights until `BatchNormStatistics` replaces
    them; other buffers (counts, tables) are copied. Nothing waits for the device.

    Args:
        model: On its device, with the weights to start from; copied. Not compiled yet.
        decay: Share of the average that a step keeps, 0 < decay < 1, see `decay_at`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._averages: list[Tensor] = []
        self._followed: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def follow(self, model: nn.Module) -> None:
        """Takes the averages of this model from now on: the one it was copied from.

        Call it again whenever the model's tensors are replaced by others.
        """
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        pairs = list(zip(ours, theirs, strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._followed = [value for average, value in pairs if average.is_floating_point()]
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int, is_finite: Tensor) -> None:
        """Moves the averages towards the weights after a step of the optimiser.

        Args:
            step: The step, counted from 0 over all epochs.
            is_finite: bool scalar on the device; where False nothing changes.
        """
        moved = (1 - decay_at(step, self._decay)) * is_finite.to(torch.float32)
        differences = torch._foreach_sub(self._followed, self._averages)
        torch._foreach_mul_(differences, moved)
        torch._foreach_add_(self._averages, differences)
        for average, value in self._copies:
            average.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the averages under the names of the model's `state_dict`."""
        return dict(self.module.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave.

        Raises:
            RuntimeError: a name or shape does not fit the model.
        """
        self.module.load_state_dict(dict(tensors))
