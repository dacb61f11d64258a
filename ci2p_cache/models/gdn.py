"""The analysis transform of a learned codec as a trainable module: `AnalysisTransform`, `GDN`.

What CompressAI calls g_a of bmshj2018-factorized, written anew, because a control trains it and
stage two runs where CompressAI is not installed.

Shape suffixes: B batch, C channels, M latent channels, H and W rows and columns.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

__all__ = ["GDN", "AnalysisTransform"]

_PEDESTAL = 2.0**-36
_BETA_MIN = 1e-6
_GAMMA_INIT = 0.1
"""The reference implementation's and CompressAI's."""


class _AtLeast(torch.autograd.Function):
    """Clamps from below, and lets a gradient through that would lift a clamped value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bound: float) -> Tensor:
        """Returns the values, those below `bound` as `bound`."""
        ctx.save_for_backward(values)
        ctx.bound = bound
        return values.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient, 0 where a step against it would sink a clamped value further."""
        (values,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * ((values >= ctx.bound) | (gradient < 0)), None


class GDN(nn.Module):
    """Divides each channel by a learned norm of all channels at its place: (B, C, H, W) as it is.

    ::

        y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)

    Balle, Laparra and Simoncelli 2016, arXiv 1511.06281. What is stored and trained is
    sqrt(beta + p) and sqrt(gamma + p), p = 2^-36, so that beta stays above 1e-6 and gamma above 0.
    Starts at beta = 1 and gamma = 0.1 on the diagonal. C * C + C parameters.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter((torch.ones(num_channels) + _PEDESTAL).sqrt())
        self.gamma = nn.Parameter((_GAMMA_INIT * torch.eye(num_channels) + _PEDESTAL).sqrt())

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Returns the normalised map."""
        beta_C = _squared(self.beta, _BETA_MIN)
        gamma_CC11 = _squared(self.gamma, 0.0)[:, :, None, None]
        return maps_BCHW * conv2d(maps_BCHW**2, gamma_CC11, beta_C).rsqrt()


def _squared(roots: Tensor, minimum: float) -> Tensor:
    bounded: Tensor = _AtLeast.apply(roots, (minimum + _PEDESTAL) ** 0.5)
    return bounded**2 - _PEDESTAL


class AnalysisTransform(nn.Sequential):
    """Turns images (B, 3, H, W) into latents (B, M, H / 16, W / 16): g_a, freshly initialised.

    Four 5x5 convolutions of stride 2, GDN behind the first three. Balle, Minnen, Singh, Hwang and
    Johnston 2018, arXiv 1802.01436. Convolutions are drawn as torch draws them by default, from its
    global generator, which is CompressAI's initialisation too. Parts have CompressAI's names, so
    its weights load once its constants (`*_reparam.*`) are left out.

    Args:
        width: N, channels between the convolutions; 128 for CompressAI quality 1-5.
        latent_channels: M; 192 for CompressAI quality 1-5.
    """

    def __init__(self, width: int, latent_channels: int) -> None:
        channels = (3, width, width, width, latent_channels)
        parts: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(channels):
            parts.append(nn.Conv2d(in_channels, out_channels, 5, stride=2, padding=2))
            parts.append(GDN(out_channels))
        super().__init__(*parts[:-1])
