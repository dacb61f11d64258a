"""What a codec costs and gives: bits from real entropy-coded bytes, distortion, and their sum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ci2p_cache.encoder.architecture import value_tensors
from ci2p_cache.encoder.frozen import FrozenEncoder, fixed_arithmetic
from ci2p_cache.encoder.zoo import ARCH, compressai_model, require_compressai
from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = ["RateDistortion", "evaluate_rate_distortion"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RateDistortion(Record):
    """One point of a codec on a set of images; every figure is a mean over the images."""

    num_images: int
    """How many images were coded."""
    bpp: float
    """Bits per pixel of the entropy coder's bytes (CompressAI's rANS)."""
    bpp_estimated: float
    """Bits per pixel by the entropy model's likelihoods, without a coder."""
    mse: float
    """Mean squared error on the scale 0-255, reconstruction clamped and not rounded."""
    psnr_db: float
    """10 log10(255^2 / MSE) of each image, then the mean."""
    lmbda: float
    """The weight of the distortion in `cost`."""
    cost: float
    """lmbda * mse + bpp: CompressAI's loss, `lmbda * 255^2 * MSE + bpp` with MSE on [0, 1]."""


def evaluate_rate_distortion(
    encoder: FrozenEncoder, images: Iterable[Tensor], *, lmbda: float = 0.025
) -> RateDistortion:
    """Codes whole images to bytes and back, one by one, in float32.

    Sides that are no multiples of 16 are padded with zeros by g_a's convolutions; the
    reconstruction is cut back, and the bits are divided by the pixels of the image.

    Args:
        encoder: A codec with symbols; stays as it is.
        images: uint8 (3, H, W), 0-255, RGB, of any sizes.
        lmbda: The weight of the distortion; 0.025 is CompressAI's for quality 5 and mse.

    Raises:
        UsageError: there are no images, one has another shape or dtype, or the encoder has no
            symbols.
        MissingDependencyError: compressai cannot be imported.
    """
    if not encoder.has_symbols:
        raise UsageError(f"{encoder!r} has no symbols of its own, so y alone cannot be coded")
    require_compressai(
        "real entropy coding",
        instead="FrozenEncoder.bits estimates the bits without it, and comes within 1 %",
    )
    model = compressai_model(ARCH, encoder.spec.quality).eval()
    model.load_state_dict({**model.state_dict(), **value_tensors(encoder._model)})
    model.to(device=encoder.device, memory_format=torch.channels_last).update()
    rows: list[tuple[float, float, float, float]] = []
    with torch.inference_mode(), fixed_arithmetic(encoder.device, tf32=False):
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
                raise UsageError(
                    f"image {len(rows)} has shape {tuple(image.shape)} and dtype {image.dtype}; "
                    "wanted (3, H, W) uint8"
                )
            x = image[None].to(encoder.device).float().div(255)
            x = x.contiguous(memory_format=torch.channels_last)
            num_pixels = x.shape[2] * x.shape[3]
            coded = model.compress(x)
            x_hat = model.decompress(coded["strings"], coded["shape"])["x_hat"]
            x_hat = x_hat[:, :, : x.shape[2], : x.shape[3]]
            _, likelihoods = model.entropy_bottleneck(model.g_a(x))
            bits = -torch.log2(likelihoods.double()).sum().item()
            mse = (x_hat - x).mul(255).square().double().mean().item()
            num_bytes = sum(len(string) for strings in coded["strings"] for string in strings)
            psnr = 10 * math.log10(255**2 / mse) if mse > 0 else math.inf
            rows.append((8 * num_bytes / num_pixels, bits / num_pixels, mse, psnr))
    if not rows:
        raise UsageError("there are no images to evaluate on; wanted at least one")
    bpp, estimated, mse, psnr = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return RateDistortion(
        num_images=len(rows),
        bpp=bpp,
        bpp_estimated=estimated,
        mse=mse,
        psnr_db=psnr,
        lmbda=lmbda,
        cost=lmbda * mse + bpp,
    )
