"""Latent flipping: the wrong way to mirror an image that is cached, kept to be shown wrong.

g_a is not flip-equivariant: with the bundled encoder the latents of a mirrored image differ from
the mirrored latents of the image by 80 % of their norm (ten flower photographs, 224 px), so a model
that is trained on mirrored latents learns from inputs that no image has. `encode --views flip`
stores the latents of the mirrored image instead; that is the right way, and the default. For models
that read images the same option is the usual horizontal flip.

Shape suffixes: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["flipped"]


def flipped(
    x_BCHW: Tensor, probability: float, *, num_samples: int, own: slice, seed: int
) -> Tensor:
    """Mirrors some samples along x.

    Each sample of the whole batch is drawn for, so that the ranks change nothing.

    Args:
        x_BCHW: What the model reads: this rank's slice of the batch; not changed.
        probability: That a sample is mirrored, 0 to 1; 0 gives `x_BCHW` itself.
        num_samples: Samples of the whole batch, of all ranks.
        own: Which of them `x_BCHW` holds.
        seed: Of the step, for nothing else.
    """
    if not probability or not len(x_BCHW):
        return x_BCHW
    draw = random.Random(seed)
    flips = [draw.random() < probability for _ in range(num_samples)]
    flips_B = torch.tensor(flips[own], device=x_BCHW.device)
    return torch.where(flips_B[:, None, None, None], x_BCHW.flip(-1), x_BCHW)
