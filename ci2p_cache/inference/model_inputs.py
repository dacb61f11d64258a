"""From images to what the model reads, step by step, each as stage one and the loaders do it.

Shape suffixes: B batch, H W pixels, M latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ci2p_cache.errors import UsageError
from ci2p_cache.specs import LatentSpec

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["as_floats", "as_stored", "encode_by_cores"]


def as_floats(images_B3HW: Tensor, *, size: int, device: torch.device) -> Tensor:
    """Gives images as float32 in [0, 1] on a device.

    Args:
        images_B3HW: uint8 0-255, or floating point in [0, 1], (B, 3, size, size), B >= 1.
        size: Side of the square that the model was trained at, in pixels.
        device: Where they go.

    Raises:
        UsageError: they have another shape or dtype.
    """
    shape, dtype = tuple(images_B3HW.shape), images_B3HW.dtype
    if shape[1:] != (3, size, size) or not shape[0]:
        raise UsageError(
            f"images have shape {shape}; wanted (batch, 3, {size}, {size}), the size that the "
            "run was trained at"
        )
    if dtype == torch.uint8:
        return images_B3HW.to(device).to(torch.float32).div_(255)
    if not dtype.is_floating_point:
        raise UsageError(f"images have dtype {dtype}; wanted uint8, or floats in [0, 1]")
    return images_B3HW.to(device, torch.float32)


def encode_by_cores(encoder: FrozenEncoder, images_B3HW: Tensor) -> Tensor:
    """Runs g_a as the cache did: on CPU one thread per call, with a part of the batch on each core.

    Args:
        encoder: On the device of the images.
        images_B3HW: float32 in [0, 1], B >= 1.

    Returns:
        y, float32 (B, M, h, w), on the same device.
    """
    if images_B3HW.device.type != "cpu":
        return encoder(images_B3HW)
    threads = torch.get_num_threads()
    parts = images_B3HW.chunk(min(threads, len(images_B3HW)))
    try:
        with ThreadPoolExecutor(
            len(parts), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return torch.cat(list(pool.map(encoder, parts)))
    finally:
        # torch keeps the number that was set last for threads that are still to come.
        torch.set_num_threads(threads)


def as_stored(y_BMhw: Tensor, latent: LatentSpec, encoder: FrozenEncoder | None) -> Tensor:
    """Gives what the cache would store of y, of its dtype: saturated symbols, or y itself.

    Args:
        y_BMhw: float32 (B, M, h, w).
        latent: What the cache stores.
        encoder: What made y; only looked at where symbols are stored.
    """
    dtype: torch.dtype = getattr(torch, latent.dtype)
    if not latent.is_symbols:
        return y_BMhw.to(dtype)
    # Only here: evaluating from a cache must run where compressai is not installed.
    from ci2p_cache.encoder.frozen import saturate

    assert encoder is not None
    symbols = encoder.quantize(y_BMhw, step=latent.step)
    return saturate(symbols, latent.symbol_limit)[0].to(dtype)
