"""The codec's scalar quantiser as pure tensor functions; compressai is not needed.

::

    y --(-median, /step, round)--> symbols --(clamp)--> stored symbols --(*step, +median)--> y_hat

Shapes: B leading dimensions (any number, also none), M channels, h and w latent rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ci2p_cache.errors import UsageError

__all__ = ["check_step", "dequantize", "quantize", "saturate"]


def quantize(y_BMhw: Tensor, medians_M: Tensor, step: float = 1.0) -> Tensor:
    """Gives the symbols round((y - median) / step), halves to even.

    At step 1 they equal CompressAI's `EntropyBottleneck.quantize(y, "symbols", medians)` bit for
    bit (Balle et al. 2018, arXiv 1802.01436), because dividing by 1.0 changes no float.

    Args:
        y_BMhw: Latents, floating point; computed with in float32.
        medians_M: Median of each channel, float32, on the device of y.
        step: Width of a quantisation bin in units of y; 1.0 is the codec's own.

    Returns:
        int32 symbols of the shape of y.

    Raises:
        UsageError: `step` is not positive and finite.
    """
    check_step(step)
    scaled = y_BMhw.to(torch.float32) - medians_M[:, None, None]
    return scaled.div_(step).round_().to(torch.int32)


def dequantize(symbols_BMhw: Tensor, medians_M: Tensor, step: float = 1.0) -> Tensor:
    """Gives y_hat = symbols * step + median.

    At step 1 it equals CompressAI's `EntropyBottleneck.dequantize` bit for bit.

    Args:
        symbols_BMhw: Integer symbols, any signed integer dtype, absolute value below 2**24.
        medians_M: Median of each channel, float32, on the device of the symbols.
        step: The step they were quantised with.

    Returns:
        float32 y_hat of the shape of the symbols.

    Raises:
        UsageError: `step` is not positive and finite.
    """
    check_step(step)
    # Two roundings, product then sum, as numpy's float32(symbols) * step + median does it.
    return symbols_BMhw.to(torch.float32).mul_(step).add_(medians_M[:, None, None])


def saturate(symbols_BMhw: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Clamps symbols to what the stored dtype holds, and counts what was lost.

    Args:
        symbols_BMhw: int32 symbols with at least the dimensions (M, h, w).
        limit: The largest absolute symbol stored, `LatentSpec.symbol_limit`: 127 or 32767. The
            dtype's own minimum stays free, it is the fill value of a hole.

    Returns:
        The clamped symbols, int8 where `limit` is at most 127, else int16; and the number of
        clamped symbols per channel, int64: (M,) for one latent, (B, M) for a batch.

    Raises:
        UsageError: `limit` fits neither dtype, or the symbols have fewer than three dimensions.
    """
    if not 0 < limit <= 32767:
        raise UsageError(f"`limit` is {limit}; 1 to 32767 are possible (127 for int8)")
    if symbols_BMhw.ndim < 3:
        raise UsageError(
            f"symbols have shape {tuple(symbols_BMhw.shape)}; at least (M, h, w) is wanted"
        )
    # Not abs(): the smallest int32 has no positive twin.
    clipped = (symbols_BMhw > limit) | (symbols_BMhw < -limit)
    dtype = torch.int8 if limit <= 127 else torch.int16
    return symbols_BMhw.clamp(-limit, limit).to(dtype), clipped.sum(dim=(-2, -1))


def check_step(step: float) -> None:
    """Refuses a quantisation step that is no width.

    Raises:
        UsageError: `step` is not positive and finite.
    """
    if not (math.isfinite(step) and step > 0):
        raise UsageError(f"`step` is {step}; it must be positive and finite")
