"""g_a as a module of its own, for graphs that leave this package."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.errors import UsageError

__all__ = ["analysis_transform"]


def analysis_transform(encoder: FrozenEncoder) -> nn.Module:
    """Copies g_a: images (B, 3, H, W) in [0, 1] to y (B, M, h, w), in float32 on the CPU.

    Raises:
        UsageError: the encoder computes in bfloat16: a float32 graph would give other latents.
    """
    if encoder.spec.precision == "bf16":
        raise UsageError(
            "the encoder's `precision` is bf16, which a float32 graph does not repeat",
            hint="export the model alone: --what model",
        )
    g_a: nn.Module = copy.deepcopy(encoder._g_a)
    return g_a.to("cpu", torch.float32)
