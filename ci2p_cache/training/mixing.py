"""Mixup and CutMix of what a model reads: two samples become one, and so do their classes.

::

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

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ci2p_cache.training.spec import TrainSpec

__all__ = ["Mix", "Targets", "draw_mix", "mixed"]

_CUTMIX_SHARE = 0.5
"""Of the mixed batches, where both methods are on; the authors', and timm's default."""


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

    Args:
        spec: `mixup`, `cutmix` and `mix_probability` count.
        size: H and W of what is read: latents for latents, pixels for images.
        seed: Of the step, for nothing else.

    Returns:
        None where the batch is not mixed. The box of CutMix has 1 - lambda of the area, its centre
        is anywhere, so that an edge may cut it, and is whole in rows and columns; `share` is what
        is then really left.
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

    Args:
        x_BCHW: What the model reads, floating point; not changed. B may be 0.
        labels_B: int64.
        mix: What `draw_mix` gave.

    Returns:
        What the model reads instead, in memory of its own where `mix` is not None, and the targets.
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
