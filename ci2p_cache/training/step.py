"""One step of the optimiser: from a batch to weights that have moved, without ever waiting.

::

    batch -> mirrored, mixed -> parts -> forward, backward -> sums over the ranks -> clipped
        -> the guard's step or none -> average

Mixup and CutMix: two samples become one, and so do their classes. ::

    lambda ~ Beta(alpha, alpha), and a box for CutMix: one draw per step, the same on all ranks
    x_i, label_i  share lambda
                                  -> mixed x_i, loss lambda L(label_i) + (1 - lambda) L(label_j)
    x_j, label_j  share 1 - lambda    (j = i - 1)

Mixup (Zhang et al. 2018, arXiv 1710.09412) adds two samples, CutMix (Yun et al. 2019, arXiv
1905.04899) puts a box of one into the other. A model that reads latents gets *latent* Mixup and
*latent* CutMix. They are other methods than those on pixels, because the encoder is not linear: the
sum of two latents is not the latent of the summed images, and a box in latents has an edge that no
image has. The nearest relative is Manifold Mixup (Verma et al. 2019, arXiv 1806.05236) at a fixed,
frozen layer. A model that reads images gets the methods of the papers.

Of several ranks each mixes within its slice, before `accumulate` cuts it: the partner of a sample
is the one before it, that of a slice's first its last. Draws do not depend on the ranks, the pairs
at the edges of slices do. A slice of one sample is its own partner, and stays as it is.

Shape suffixes: B batch, C channels, H and W rows and columns, K classes.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ci2p_cache.errors import TrainingDivergedError
from ci2p_cache.loader.batches import Batch
from ci2p_cache.loader.order import rank_slice
from ci2p_cache.training.metrics import TrainTotals, autocast
from ci2p_cache.training.optim import WeightAverage, lr_at, set_lr
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TakenStep
from ci2p_cache.training.spec import TrainSpec

__all__ = ["Mix", "OptimizerStep", "draw_mix", "flipped", "mixed"]

_CUTMIX_SHARE = 0.5
"""Share of CutMix in mixed batches when both methods are on; the authors' and timm's default."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How one batch is mixed."""

    share: float
    """lambda: the sample's own share in what is read and in the loss, 0 to 1."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, bottom, left, right of what comes from the partner; None: Mixup."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The classes of a batch, or of a part of it, with those of its partners where it is mixed."""

    labels: Tensor
    """int64 (B,)."""
    partners: Tensor | None = None
    """int64 (B,): the partners' labels; None where nothing is mixed."""
    share: float = 1.0
    """lambda of the labels; the partners have the rest."""

    def chunk(self, parts: int) -> list[Targets]:
        """Cuts as `torch.chunk` does."""
        labels = self.labels.chunk(parts)
        if self.partners is None:
            return [Targets(part) for part in labels]
        pairs = zip(labels, self.partners.chunk(parts), strict=True)
        return [Targets(part, other, self.share) for part, other in pairs]

    def loss(self, logits_BK: Tensor, *, label_smoothing: float) -> Tensor:
        """Returns the mean cross-entropy, a scalar.

        That against the classes' shares as soft targets, smoothed: cross-entropy is linear in its
        targets, so the weighted sum over both labels is the same without making (B, K) of them.
        """
        loss = cross_entropy(logits_BK, self.labels, label_smoothing=label_smoothing)
        if self.partners is None:
            return loss
        other = cross_entropy(logits_BK, self.partners, label_smoothing=label_smoothing)
        return self.share * loss + (1 - self.share) * other

    def hits(self, logits_BK: Tensor) -> Tensor:
        """Returns how many samples are classified as their dominant class, an integer scalar."""
        wanted = self.labels
        if self.partners is not None and self.share < 0.5:
            wanted = self.partners
        return (logits_BK.argmax(dim=1) == wanted).sum()


def draw_mix(spec: TrainSpec, *, size: tuple[int, int], seed: int) -> Mix | None:
    """Draws how a batch is mixed: a pure function of its arguments, made on the host.

    The box of CutMix has 1 - lambda of the area (`size`: H and W of what is read), its centre is
    anywhere, so that an edge may cut it, and is whole in rows and columns; `share` is what is then
    really left.

    Returns:
        None where the batch is not mixed.
    """
    if not spec.is_mixing:
        return None
    draw = random.Random(seed)
    if draw.random() >= spec.mix_probability:
        return None
    if not spec.cutmix or (spec.mixup and draw.random() >= _CUTMIX_SHARE):
        return Mix(draw.betavariate(spec.mixup, spec.mixup), None)
    side = math.sqrt(1 - draw.betavariate(spec.cutmix, spec.cutmix))
    top, bottom = _cut(size[0], side, draw)
    left, right = _cut(size[1], side, draw)
    taken = (bottom - top) * (right - left) / (size[0] * size[1])
    return Mix(1 - taken, (top, bottom, left, right))


def _cut(length: int, share: float, draw: random.Random) -> tuple[int, int]:
    """Returns begin and end of a piece of about that share around a place drawn uniformly."""
    piece, centre = int(length * share), draw.randrange(length)
    begin = centre - piece // 2
    return max(begin, 0), min(begin + piece, length)


def mixed(x_BCHW: Tensor, labels_B: Tensor, mix: Mix | None) -> tuple[Tensor, Targets]:
    """Mixes a batch, or a rank's slice of it, with itself moved on by one.

    The order of an epoch is random, so the sample before is as random a partner as a drawn one, and
    never the sample itself while there are two.

    Returns:
        What the model reads instead, in its own memory where `mix` is not None, and the targets.
    """
    if mix is None or not len(labels_B):
        return x_BCHW, Targets(labels_B)
    partners_BCHW = x_BCHW.roll(1, dims=0)
    if mix.box is None:
        x_BCHW = torch.lerp(partners_BCHW, x_BCHW, mix.share)
    else:
        top, bottom, left, right = mix.box
        box = (..., slice(top, bottom), slice(left, right))
        x_BCHW = x_BCHW.clone()
        x_BCHW[box] = partners_BCHW[box]
    return x_BCHW, Targets(labels_B, labels_B.roll(1), mix.share)


def flipped(
    x_BCHW: Tensor, probability: float, *, num_samples: int, own: slice, seed: int
) -> Tensor:
    """Mirrors some samples of this rank's slice, `own`, of a batch of `num_samples` along x.

    Wrong for latents, and there to show it. g_a is not flip-equivariant: with the bundled encoder
    the latents of a mirrored image differ from the mirrored latents of the image by 80 % of their
    norm (ten flower photographs, 224 px). `encode --views flip` stores the latents of the mirrored
    image instead. For models that read images this is the usual horizontal flip.

    Each sample of the whole batch is drawn for, so that the ranks change nothing. Probability 0
    gives `x_BCHW` itself.
    """
    if not probability or not len(x_BCHW):
        return x_BCHW
    draw = random.Random(seed)
    flips = [draw.random() < probability for _ in range(num_samples)]
    flips_B = torch.tensor(flips[own], device=x_BCHW.device)
    return torch.where(flips_B[:, None, None, None], x_BCHW.flip(-1), x_BCHW)


_MAX_IN_A_ROW = 10


@dataclass(kw_only=True, slots=True)
class OptimizerStep:
    """Takes the steps of a run, one batch each, and leaves out those that are not finite.

    All randomness of a step comes from (seed, epoch, step, rank). After each step all ranks hold
    the same weights, moments and sums.

    The optimiser skips itself by a flag that stays on the device: where everything is finite no
    value changes, and all ranks give the same flag. BatchNorm's running statistics may take up what
    was not finite; `BatchNormStatistics` replaces them before any use.
    """

    spec: TrainSpec
    model: nn.Module
    """On its device, in training mode when a step is taken."""
    optimizer: Optimizer
    """Fused; steps only through this."""
    average: WeightAverage | None
    """Follows the weights; None where the spec has no `ema`."""
    ranks: Ranks
    steps_per_epoch: int
    bad_in_a_row: int
    """Steps skipped directly before the last `read`, at first those of the resumed run."""
    _parameters: list[nn.Parameter] = field(init=False)
    _pending: list[tuple[TakenStep, Tensor, Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._parameters = [each for each in self.model.parameters() if each.requires_grad]
        if self.average is not None:
            self.average.follow(self.model)

    def read(self) -> list[TakenStep]:
        """Waits for the device and returns the steps since the last call.

        Raises:
            TrainingDivergedError: ten steps in a row were skipped.
        """
        if not self._pending:
            return []
        # One copy from the device for all of them.
        values = torch.stack([value for _, *both in self._pending for value in both]).tolist()
        steps = [step for step, *_ in self._pending]
        for step, loss, skipped in zip(steps, values[::2], values[1::2], strict=True):
            step.loss, step.is_skipped = loss, skipped > 0
            self.bad_in_a_row = self.bad_in_a_row + 1 if step.is_skipped else 0
            if self.bad_in_a_row >= _MAX_IN_A_ROW:
                rows = ", ".join(map(str, step.rows[:8])) + ", ..." * (len(step.rows) > 8)
                raise TrainingDivergedError(
                    f"loss or gradients were not finite in {self.bad_in_a_row} steps in a row, "
                    f"up to step {step.step} of epoch {step.epoch} (train rows {rows}); the "
                    "weights and the last checkpoint are unharmed",
                    hint="train with a lower --lr or --precision float32 under another --name",
                )
        self._pending.clear()
        return steps

    def lr(self, epoch: int, step: int) -> float:
        """Returns the learning rate of a step."""
        done = epoch * self.steps_per_epoch + step
        return lr_at(done, spec=self.spec, steps_per_epoch=self.steps_per_epoch)

    def take(self, batch: Batch, totals: TrainTotals, *, epoch: int, step: int) -> None:
        """Takes one optimiser step on this rank's slice of a batch; waits for nothing.

        `epoch` and `step` are those done, from 0; `totals` takes the step's sums, or that it was
        skipped. What the batch holds is not changed.
        """
        spec, images = self.spec, len(batch.global_rows)
        lr = self.lr(epoch, step)
        set_lr(self.optimizer, lr)
        torch.manual_seed(_step_seed(spec.seed, epoch, step, self.ranks.rank))
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
        if self.ranks.world_size > 1:
            loss, correct = self._combine(loss, correct)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, spec.clip_grad_norm or float("inf"), foreach=True
        )
        is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        rows = batch.global_rows.tolist()
        # The fused kernels read this attribute; torch's GradScaler uses the same door.
        skipped = (~is_finite).float()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # not declared
        self.optimizer.step()
        self._pending.append((TakenStep(epoch + 1, step, rows, lr), loss, skipped))
        if self.average is not None:
            self.average.update(epoch * self.steps_per_epoch + step, is_finite)
        self.optimizer.zero_grad(set_to_none=True)
        totals.add(
            loss=loss, correct=correct, grad_norm=grad_norm, images=images, is_finite=is_finite
        )

    def _augmented(self, batch: Batch, *, epoch: int, step: int) -> tuple[Tensor, Targets]:
        """Returns what the model reads of a batch, (B, C, H, W) channels_last, and its targets."""
        spec, inputs_BCHW, ranks = self.spec, batch.latents, self.ranks
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
        with autocast(inputs_BCHW.device, self.spec.precision):
            logits = self.model(inputs_BCHW)
        logits = logits.float()
        loss = targets.loss(logits, label_smoothing=self.spec.label_smoothing) * share
        loss.backward()  # type: ignore[no-untyped-call]  # torch stub
        return loss.detach(), targets.hits(logits.detach())

    def _combine(self, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Makes a slice's share of the loss, and its hits, those of the whole batch, on all ranks.

        Gradients and loss are weighted by their images already. What is not finite on one rank is
        so on all, which therefore skip the same steps. BatchNorm normalises by its slice, and its
        running statistics stay each rank's own until `BatchNormStatistics` replaces them.
        """
        scores = torch.stack([loss, correct.to(loss.dtype)])
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self.ranks.add_up([*gradients, scores])
        return scores[0], scores[1]


def _step_seed(seed: int, epoch: int, step: int, drawer: int | str) -> int:
    """Mixes a step and who draws in it to a seed below 2**63; rank 0 draws as a process alone."""
    words = [seed, epoch, step] + ([drawer] if drawer else [])
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
