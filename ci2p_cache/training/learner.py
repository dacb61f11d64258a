"""What training changes: the model, its optimiser, and the average of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ci2p_cache.errors import CheckpointError
from ci2p_cache.models.registry import AnyModelConfig, build_model
from ci2p_cache.training.checkpoint import Checkpoint, TrainState
from ci2p_cache.training.optim import (
    WeightAverage,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.spec import TrainSpec

__all__ = ["Learner"]


@dataclass(frozen=True, slots=True)
class Learner:
    """What training changes, on its device."""

    model: nn.Module
    """The weights that are trained."""
    optimizer: Optimizer
    """Moves them; from `make_optimizer`."""
    average: WeightAverage | None
    """Follows them; None where the spec has no `ema`."""

    @classmethod
    def drawn(cls, config: AnyModelConfig, spec: TrainSpec, device: torch.device) -> Learner:
        """Returns what a run begins with: a pure function of the spec's seed, moments at zero.

        torch's own random numbers stay as they were.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.seed)
            model = build_model(config).to(device)
        average = WeightAverage(model, spec.ema) if spec.ema else None
        return cls(model, make_optimizer(model, spec), average)

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the average of its weights where there is one."""
        return [self.model] if self.average is None else [self.model, self.average.module]

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Puts back what `checkpoint` gave.

        Args:
            checkpoint: Of this model, in memory.
            path: Where it was read from, for the message.

        Raises:
            CheckpointError: it does not fit the model.
        """
        try:
            self.model.load_state_dict(checkpoint.model)
            if self.average is not None:
                self.average.load(checkpoint.average)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the model: {error}") from error
        load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer)

    def share(self, ranks: Ranks) -> None:
        """Gives all ranks the weights and averages of rank 0."""
        for module in self.modules:
            ranks.share_tensors(list(module.state_dict().values()))

    def compile(self) -> None:
        """Compiles the modules in place, so the names of the weights stay; at the first step."""
        for module in self.modules:
            module.compile()

    def checkpoint(self, state: TrainState) -> Checkpoint:
        """Returns the tensors as they are now, with the place that they belong to."""
        return Checkpoint(
            state,
            dict(self.model.state_dict()),
            optimizer_tensors(self.model, self.optimizer),
            self.average.tensors() if self.average is not None else {},
        )
