"""One step of the optimiser: from a batch to weights that have moved, without ever waiting.

::

    batch -> mirrored, mixed -> parts -> forward, backward -> sums over the ranks -> clipped
        -> the guard's step or none -> average

Shape suffixes: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ci2p_cache.loader.batch import Batch
from ci2p_cache.loader.order import rank_slice
from ci2p_cache.training.ema import WeightAverage
from ci2p_cache.training.flipping import flipped
from ci2p_cache.training.guard import BadStep, StepGuard
from ci2p_cache.training.metrics import TrainTotals, autocast
from ci2p_cache.training.mixing import Targets, draw_mix, mixed
from ci2p_cache.training.optim import lr_at, set_lr
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.spec import TrainSpec

__all__ = ["OptimizerStep"]


class OptimizerStep:
    """Takes the steps of a run, one batch each.

    All randomness of a step comes from (seed, epoch, step, rank). After each step all ranks hold
    the same weights, moments and sums.

    Args:
        spec: What to do.
        model: On its device, in training mode when a step is taken.
        optimizer: Fused; steps only through this.
        average: Follows the weights; None where the spec has no `ema`.
        ranks: Those that train together.
        steps_per_epoch: Steps of an epoch.
        bad_in_a_row: Steps skipped directly before, of the run that is resumed.
    """

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage | None,
        *,
        ranks: Ranks,
        steps_per_epoch: int,
        bad_in_a_row: int,
    ) -> None:
        self._spec = spec
        self._model = model
        self._optimizer = optimizer
        self._average = average
        self._ranks = ranks
        self._steps_per_epoch = steps_per_epoch
        self._guard = StepGuard(optimizer, in_a_row=bad_in_a_row)
        self._parameters = list(model.parameters())
        if average is not None:
            average.follow(model)

    @property
    def bad_in_a_row(self) -> int:
        """Steps skipped directly before the last `read_bad`."""
        return self._guard.in_a_row

    def read_bad(self) -> list[BadStep]:
        """Waits for the device and returns the steps skipped since the last call.

        Raises:
            TrainingDivergedError: ten steps in a row were skipped.
        """
        return self._guard.read()

    def lr(self, epoch: int, step: int) -> float:
        """Returns the learning rate of a step."""
        return lr_at(
            epoch * self._steps_per_epoch + step,
            spec=self._spec,
            steps_per_epoch=self._steps_per_epoch,
        )

    def take(self, batch: Batch, totals: TrainTotals, *, epoch: int, step: int) -> None:
        """Takes one optimiser step; waits for nothing.

        Args:
            batch: This rank's slice of the global batch; what it holds is not changed.
            totals: Takes the step's sums, or that it was skipped.
            epoch: Epochs done, from 0.
            step: Steps of this epoch done, from 0.
        """
        spec, images = self._spec, len(batch.global_rows)
        set_lr(self._optimizer, self.lr(epoch, step))
        torch.manual_seed(_step_seed(spec.seed, epoch, step, self._ranks.rank))
        inputs_BCHW, targets = self._augmented(batch, epoch=epoch, step=step)
        loss = correct = torch.zeros((), device=inputs_BCHW.device)
        for part_BCHW, wanted in zip(
            inputs_BCHW.chunk(spec.accumulate), targets.chunk(spec.accumulate), strict=True
        ):
            if not len(part_BCHW):
                continue
            share = len(part_BCHW) / images
            part_loss, part_correct = self._backward(part_BCHW, wanted, share=share)
            loss, correct = loss + part_loss, correct + part_correct
        if self._ranks.world_size > 1:
            loss, correct = self._combine(loss, correct)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, spec.clip_grad_norm or float("inf"), foreach=True
        )
        is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        rows = batch.global_rows.tolist()
        self._guard.step(is_finite, BadStep(epoch=epoch + 1, step=step, rows=rows))
        if self._average is not None:
            self._average.update(epoch * self._steps_per_epoch + step, is_finite)
        self._optimizer.zero_grad(set_to_none=True)
        totals.add(
            loss=loss, correct=correct, grad_norm=grad_norm, images=images, is_finite=is_finite
        )

    def _augmented(self, batch: Batch, *, epoch: int, step: int) -> tuple[Tensor, Targets]:
        """Returns what the model reads of a batch, (B, C, H, W) channels_last, and its targets."""
        spec, inputs_BCHW, ranks = self._spec, batch.latents, self._ranks
        num_samples = len(batch.global_rows)
        # None of these seeds knows the rank: all draw alike, for the whole batch.
        inputs_BCHW = flipped(
            inputs_BCHW,
            spec.latent_flip,
            num_samples=num_samples,
            own=rank_slice(num_samples, rank=ranks.rank, world_size=ranks.world_size),
            seed=_step_seed(spec.seed, epoch, step, "flip"),
        )
        mix = draw_mix(
            spec,
            size=(inputs_BCHW.shape[2], inputs_BCHW.shape[3]),
            seed=_step_seed(spec.seed, epoch, step, "mix"),
        )
        inputs_BCHW, targets = mixed(inputs_BCHW, batch.labels, mix)
        return inputs_BCHW.contiguous(memory_format=torch.channels_last), targets

    def _backward(
        self, inputs_BCHW: Tensor, targets: Targets, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a part of a batch; returns its share of the loss, and its hits."""
        with autocast(inputs_BCHW.device, self._spec.precision):
            logits = self._model(inputs_BCHW)
        logits = logits.float()
        loss = targets.loss(logits, label_smoothing=self._spec.label_smoothing) * share
        loss.backward()  # type: ignore[no-untyped-call]  # torch stub
        return loss.detach(), targets.hits(logits.detach())

    def _combine(self, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Makes the sums over a slice those over the whole batch, on all ranks alike.

        Gradients and loss are weighted by their images already. What is not finite on one rank is
        so on all, which therefore skip the same steps. BatchNorm normalises by its slice, and its
        running statistics stay each rank's own until `BatchNormStatistics` replaces them.

        Args:
            loss: This rank's share of the loss, a scalar.
            correct: Its hits, a scalar.
        """
        scores = torch.stack([loss, correct.to(loss.dtype)])
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._ranks.add_up([*gradients, scores])
        return scores[0], scores[1]


def _step_seed(seed: int, epoch: int, step: int, drawer: int | str) -> int:
    """Mixes a step and who draws in it to a seed below 2**63; rank 0 draws as a process alone."""
    words = [seed, epoch, step] + ([drawer] if drawer else [])
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
