"""Weights of the paper's codec that make lively latents, and compressai's model of the same."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

import pytest
import torch

from ci2p_cache.encoder.architecture import FactorizedPrior
from ci2p_cache.encoder.zoo import ARCH, ZOO, compressai_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compressai.models import CompressionModel

__all__ = ["lively_state", "needs_compressai", "reference_of"]

# Importing it would take seconds of every collection.
needs_compressai = pytest.mark.skipif(
    importlib.util.find_spec("compressai") is None, reason="compressai is not installed"
)


def lively_state(quality: int, seed: int) -> dict[str, torch.Tensor]:
    """Draws weights whose latents spread over many symbols and whose medians are not zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        width, latent_channels = ZOO[ARCH][quality - 1]
        state = FactorizedPrior(width, latent_channels).state_dict()
        state["g_a.6.weight"].mul_(60)
        for name, tensor in state.items():
            if ".matrices." in name:
                # As CompressAI begins: each layer widens the distribution alike, to 10 in all.
                tensor.fill_(math.log(math.expm1(10**-0.2 / tensor.shape[1])))
            elif ".biases." in name or ".factors." in name:
                tensor.uniform_(-0.5, 0.5)
        quantiles = state["entropy_bottleneck.quantiles"]
        quantiles.copy_(torch.tensor([-10.0, 0.0, 10.0]))
        quantiles.add_(torch.rand(latent_channels, 1, 1))
    return state


def reference_of(tensors: Mapping[str, torch.Tensor], quality: int) -> CompressionModel:
    """Puts weights into compressai's own model, in the reference setting: eval, channels_last."""
    model = compressai_model(ARCH, quality)
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict({**model.state_dict(), **floats})
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
