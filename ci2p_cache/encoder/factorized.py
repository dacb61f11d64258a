"""The paper's codec, bmshj2018-factorized, from torch layers: `FactorizedPrior`.

Balle, Minnen, Singh, Hwang and Johnston 2018, arXiv 1802.01436. ::

    x --g_a--> y --rounding--> y_hat --g_s--> x_hat
                                 +--entropy_bottleneck--> mass of each bin --> bits

CompressAI's state dict, key by key, and its values, bit by bit. What only training or real entropy
coding needs is not here: compressai has it.

Shape suffixes: B batch, M latent channels, K values of a channel, r s widths of a small network, H
W pixels, h w latent rows and columns.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ci2p_cache.gdn import GDN, AnalysisTransform, LowerBound

__all__ = ["EntropyBottleneck", "FactorizedPrior"]

_WIDTHS = (1, 3, 3, 3, 3, 1)
_LEAST_MASS = 1e-9
"""The paper's network, and CompressAI's bound on the mass of a bin."""


class EntropyBottleneck(nn.Module):
    """The learned distribution of each channel of y; its weights are zero until they are loaded.

    A channel's cumulative is the sigmoid of a small increasing network: appendix 6.1 of the paper.

    Args:
        num_channels: M.
        device: Where the parameters are made.
    """

    def __init__(self, num_channels: int, *, device: str | None = None) -> None:
        super().__init__()

        def parameters(*shapes: tuple[int, int]) -> nn.ParameterList:
            return nn.ParameterList(
                torch.zeros(num_channels, *shape, device=device) for shape in shapes
            )

        self.likelihood_lower_bound = LowerBound(_LEAST_MASS, saved=True)
        self.matrices = parameters(*((s, r) for r, s in itertools.pairwise(_WIDTHS)))
        self.biases = parameters(*((s, 1) for s in _WIDTHS[1:]))
        self.factors = parameters(*((s, 1) for s in _WIDTHS[1:-1]))
        self.quantiles = nn.Parameter(torch.zeros(num_channels, 1, 3, device=device))

    def bin_mass(self, values_M1K: Tensor, width: float) -> Tensor:
        """Returns the mass of the bin of `width` around each value, at least 1e-9: (M, 1, K)."""
        lower_M1K = self._logits(values_M1K - width / 2)
        upper_M1K = self._logits(values_M1K + width / 2)
        mass_M1K: Tensor = self.likelihood_lower_bound(upper_M1K.sigmoid() - lower_M1K.sigmoid())
        return mass_M1K

    def _logits(self, values_M1K: Tensor) -> Tensor:
        """Returns the logit of the cumulative at each value."""
        logits_MrK = values_M1K
        for layer, (matrix_Msr, bias_Ms1) in enumerate(
            zip(self.matrices, self.biases, strict=True)
        ):
            logits_MrK = torch.matmul(softplus(matrix_Msr), logits_MrK) + bias_Ms1
            if layer < len(self.factors):
                gate_Mr1 = torch.tanh(self.factors[layer])
                logits_MrK = logits_MrK + gate_Mr1 * torch.tanh(logits_MrK)
        return logits_MrK


class FactorizedPrior(nn.Module):
    """g_a, g_s and the entropy model; convolutions are drawn as torch draws them.

    Args:
        width: N, channels between the convolutions.
        latent_channels: M, channels of y.
        device: Where the parameters are made. "meta" draws and holds nothing: load a state dict
            with `assign=True` then. Constants are on torch's default device.
    """

    def __init__(self, width: int, latent_channels: int, *, device: str | None = None) -> None:
        super().__init__()
        self.M = latent_channels
        self.entropy_bottleneck = EntropyBottleneck(latent_channels, device=device)
        self.g_a = AnalysisTransform(width, latent_channels, saves_constants=True, device=device)
        self.g_s = _SynthesisTransform(latent_channels, width, device=device)


class _SynthesisTransform(nn.Sequential):
    """Turns y_hat (B, M, h, w) into images (B, 3, 16 h, 16 w): g_s, the mirror of g_a."""

    def __init__(self, latent_channels: int, width: int, *, device: str | None) -> None:
        channels = (latent_channels, width, width, width, 3)
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            parts.append(
                nn.ConvTranspose2d(
                    before, after, 5, stride=2, padding=2, output_padding=1, device=device
                )
            )
            parts.append(GDN(after, inverse=True, saves_constants=True, device=device))
        super().__init__(*parts[:-1])
