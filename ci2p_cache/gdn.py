"""The analysis transform of a learned codec, `AnalysisTransform`, and the `GDN` in it.

What CompressAI calls g_a of bmshj2018-factorized, under its names and equal to it bit for bit. The
frozen encoder is made of it, and a control (`cnn_vit`) trains it.

Shape suffixes: B batch, C channels, M latent channels, H and W rows and columns.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

__all__ = ["GDN", "AnalysisTransform", "FrozenGDN", "LowerBound"]

_PEDESTAL = 2.0**-36
_BETA_MIN = 1e-6
_GAMMA_INIT = 0.1
"""The reference implementation's and CompressAI's."""


class _AtLeast(torch.autograd.Function):
    """Clamps from below, and lets a gradient through that would lift a clamped value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bound: Tensor) -> Tensor:
        """Returns the values, those below `bound` as `bound`."""
        ctx.save_for_backward(values, bound)
        return torch.maximum(values, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient, 0 where a step against it would sink a clamped value further."""
        values, bound = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * ((values >= bound) | (gradient < 0)), None


class LowerBound(nn.Module):
    """Clamps values from below, and lets a gradient through that would lift a clamped value.

    Args:
        bound: The smallest value that comes out.
        saved: Whether a state dict holds the bound.
    """

    bound: Tensor

    def __init__(self, bound: float, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor([bound]), persistent=saved)

    def forward(self, values: Tensor) -> Tensor:
        """Returns the clamped values."""
        bounded: Tensor = _AtLeast.apply(values, self.bound)
        return bounded


class _Squared(nn.Module):
    """Gives what a stored root stands for: its square less the pedestal, at least `minimum`."""

    pedestal: Tensor

    def __init__(self, minimum: float, *, saved: bool) -> None:
        super().__init__()
        self.register_buffer("pedestal", torch.tensor([_PEDESTAL]), persistent=saved)
        self.lower_bound = LowerBound((minimum + _PEDESTAL) ** 0.5, saved=saved)

    def forward(self, roots: Tensor) -> Tensor:
        """Returns the values."""
        squares: Tensor = self.lower_bound(roots) ** 2
        return squares - self.pedestal


class GDN(nn.Module):
    """Divides each channel by a learned norm of all channels at its place: (B, C, H, W) as it is.

    ::

        y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)        inverse: x_i * sqrt(...)

    Balle, Laparra and Simoncelli 2016, arXiv 1511.06281. What is stored and trained is
    sqrt(beta + p) and sqrt(gamma + p), p = 2^-36, so that beta stays above 1e-6 and gamma above 0.
    Starts at beta = 1 and gamma = 0.1 on the diagonal. C * C + C parameters.

    Args:
        num_channels: C.
        inverse: Whether it multiplies instead.
        saves_constants: Whether a state dict holds p and the bounds, as CompressAI's do.
        device: Where the parameters are made; the constants are on torch's default device.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        inverse: bool = False,
        saves_constants: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.inverse = inverse
        beta = torch.ones(num_channels) + _PEDESTAL
        gamma = _GAMMA_INIT * torch.eye(num_channels) + _PEDESTAL
        # Moved afterwards: to compute on "meta" would import torch._dynamo, which takes seconds.
        self.beta = nn.Parameter(beta.sqrt().to(device))
        self.gamma = nn.Parameter(gamma.sqrt().to(device))
        self.beta_reparam = _Squared(_BETA_MIN, saved=saves_constants)
        self.gamma_reparam = _Squared(0.0, saved=saves_constants)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Returns the normalised map."""
        beta_C = self.beta_reparam(self.beta)
        gamma_CC11 = self.gamma_reparam(self.gamma)[:, :, None, None]
        norm_BCHW = conv2d(maps_BCHW**2, gamma_CC11, beta_C)
        # In place, which changes no bit: at 256 px a batch of 8 takes 67 MB of each map.
        factor_BCHW = norm_BCHW.sqrt_() if self.inverse else norm_BCHW.rsqrt_()
        return maps_BCHW * factor_BCHW if torch.is_grad_enabled() else factor_BCHW.mul_(maps_BCHW)


class FrozenGDN(nn.Module):
    """A `GDN` whose weights never change: the same bits sooner, and in less memory.

    beta and gamma are computed once, and the norm becomes the result in its own memory.

    On one thread torch leaves a float32 1x1 convolution of fewer than 16 images to BLAS, which
    wants another memory layout and takes up to twice as long as oneDNN (AMD EPYC, AVX-512). Here
    oneDNN computes it wherever it gives the same bits; each new shape is compared first.

    Args:
        gdn: With the weights and the dtype to freeze; it stays as it is.
    """

    beta: Tensor
    gamma: Tensor

    def __init__(self, gdn: GDN) -> None:
        super().__init__()
        self.inverse = gdn.inverse
        self.register_buffer("beta", gdn.beta_reparam(gdn.beta).detach())
        gamma_CC = gdn.gamma_reparam(gdn.gamma).detach()
        self.register_buffer("gamma", gamma_CC[:, :, None, None])
        self._same_bits: dict[tuple[torch.Size, int], bool] = {}

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Returns the normalised map."""
        norm_BCHW = self._norm(maps_BCHW**2)
        factor_BCHW = norm_BCHW.sqrt_() if self.inverse else norm_BCHW.rsqrt_()
        return factor_BCHW.mul_(maps_BCHW)

    def _norm(self, squares_BCHW: Tensor) -> Tensor:
        shape = squares_BCHW.shape, torch.get_num_threads()
        wide = squares_BCHW.dtype == torch.float32 and squares_BCHW.device.type == "cpu"
        if wide and self._same_bits.get(shape):
            return self._by_onednn(squares_BCHW)
        norm_BCHW = conv2d(squares_BCHW, self.gamma, self.beta)
        if wide and shape not in self._same_bits and torch._C._has_mkldnn:
            self._same_bits[shape] = torch.equal(norm_BCHW, self._by_onednn(squares_BCHW))
        return norm_BCHW

    def _by_onednn(self, squares_BCHW: Tensor) -> Tensor:
        ones = [1, 1]
        return torch.mkldnn_convolution(
            squares_BCHW, self.gamma, self.beta, [0, 0], stride=ones, dilation=ones, groups=1
        )


class AnalysisTransform(nn.Sequential):
    """Turns images (B, 3, H, W) into latents (B, M, H / 16, W / 16): g_a, freshly initialised.

    Four 5x5 convolutions of stride 2, GDN behind the first three. Balle, Minnen, Singh, Hwang and
    Johnston 2018, arXiv 1802.01436. Convolutions are drawn as torch draws them by default, from its
    global generator, which is CompressAI's initialisation too.

    Args:
        width: N, channels between the convolutions; 128 for CompressAI quality 1-5.
        latent_channels: M; 192 for CompressAI quality 1-5.
        saves_constants: As for `GDN`; without them, CompressAI's weights load once its constants
            (`*_reparam.*`) are left out.
        device: As for `GDN`.
    """

    def __init__(
        self,
        width: int,
        latent_channels: int,
        *,
        saves_constants: bool = False,
        device: str | None = None,
    ) -> None:
        channels = (3, width, width, width, latent_channels)
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            parts.append(nn.Conv2d(before, after, 5, stride=2, padding=2, device=device))
            parts.append(GDN(after, saves_constants=saves_constants, device=device))
        super().__init__(*parts[:-1])
