"""Sums that stay on the device while an epoch runs, and the pass over the validation split.

Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ci2p_cache.loader.batch import Batch
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.training.ranks import Ranks

__all__ = ["TrainTotals", "Validation", "autocast", "validate"]

_TOP = 5
_ALONE = Ranks()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context a forward pass runs in: bf16 autocast, or none for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class TrainTotals:
    """Sums over the steps of an epoch; nothing waits for the device until `read`.

    float64, so that a sum saved in the middle of an epoch continues to the same last bit.

    Args:
        device: Where the sums are kept.
        start: What an earlier `read` gave; empty at the start of an epoch.
    """

    NAMES = ("loss", "top1", "grad_norm", "images", "steps", "skipped")

    def __init__(self, device: torch.device, start: Mapping[str, float]) -> None:
        values = [start.get(name, 0.0) for name in self.NAMES]
        self._sums = torch.tensor(values, dtype=torch.float64, device=device)
        self._one_step = self._sums.new_tensor([1, 0])
        self._skipped = torch.zeros_like(self._sums)
        self._skipped[-1] = 1

    def add(
        self, *, loss: Tensor, correct: Tensor, grad_norm: Tensor, images: int, is_finite: Tensor
    ) -> None:
        """Adds a step.

        Args:
            loss: Mean loss of the batch, a scalar.
            correct: Number of images classified right, a scalar.
            grad_norm: L2 norm of all gradients, a scalar.
            images: Images in the batch.
            is_finite: bool scalar; where False the step counts as skipped and as nothing else.
        """
        count = self._sums.new_full((), images)
        step = torch.stack([loss.double() * images, correct.double(), grad_norm.double(), count])
        self._sums += torch.where(is_finite, torch.cat([step, self._one_step]), self._skipped)

    def read(self) -> dict[str, float]:
        """Returns the sums by name, after waiting for the device."""
        return dict(zip(self.NAMES, self._sums.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Validation:
    """What a pass over the validation split gives."""

    loss: float
    """Mean cross-entropy per image, without label smoothing."""
    top1: float
    """Share of images whose class came first, 0 to 1."""
    top5: float
    """Share of images whose class was among the first five, or all where there are fewer."""


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: BatchLoader,
    *,
    precision: str,
    should_stop: Callable[[], bool],
    ranks: Ranks = _ALONE,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Validation | None:
    """Runs the model in eval mode over every image of a split once, over all ranks together.

    Args:
        model: Its mode is put back afterwards.
        loader: Unshuffled; started at the beginning of its epoch.
        precision: float32 or bf16.
        should_stop: Asked before each batch; gives all ranks the same answer.
        ranks: Those that share the loader's batches.
        observe: Shown each batch with its logits, float32 (B, K) on its device; both may be used
            again for the next one.

    Returns:
        The means over all ranks' images, or None where it was stopped.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    loader.set_epoch(0)
    try:
        for batch in loader:
            if should_stop():
                return None
            if not len(batch.labels):
                continue
            with autocast(loader.device, precision):
                logits_BK = model(batch.latents.contiguous(memory_format=torch.channels_last))
            sums += _scores(logits_BK.float(), batch.labels)
            if observe is not None:
                observe(batch, logits_BK.float())
    finally:
        model.train(was_training)
    ranks.add_up([sums])
    loss, top1, top5 = (sums / loader.num_samples).tolist()
    return Validation(loss, top1, top5)


def _scores(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the sums over a batch of loss, top-1 hits and top-5 hits, float64 (3,)."""
    loss = cross_entropy(logits_BK, labels_B, reduction="sum")
    ranked = logits_BK.topk(min(_TOP, logits_BK.shape[1]), dim=1).indices
    hits = ranked == labels_B[:, None]
    return torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
