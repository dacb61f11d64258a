"""What the latents of a cache still show: single samples decoded again, and held to the originals.

The pieces that previews, the report and the size benchmark share. Decoding takes the cache's own
encoder.safetensors; the originals come from the source, where it is still there and unchanged.

Shape suffixes: V views, M latent channels, h w latent rows and columns, C H W of pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.index import IndexRow
from ci2p_cache.cache.split import Split
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
from ci2p_cache.images.views import image_views

__all__ = [
    "JPEG_QUALITY",
    "SourceState",
    "bits_per_pixel",
    "decoded_pixels",
    "jpeg_bytes",
    "load_decoder",
    "open_images",
    "original_views",
    "psnr_db",
    "stored_latent",
]

JPEG_QUALITY = 90
"""What FFCV stores ImageNet with (Leclerc et al. 2023, arXiv 2306.12517): the usual small copy."""

SourceState = Literal["unchanged", "changed", "missing"]


def load_decoder(cache: CacheFolder) -> FrozenEncoder:
    """Loads the cache's own encoder for decoding alone, on the CPU.

    Raises:
        WeightsError: the cache's encoder.safetensors is damaged.
        DigestError: it is another encoder than the one that made the latents.
    """
    # Only g_s is used, which runs in float32 whatever g_a ran in.
    spec = dataclasses.replace(cache.fingerprint.encoder, precision="float32")
    return load_recorded_encoder(cache.encoder_path, spec)


def open_images(cache: CacheFolder, source: str | Path | None = None) -> ImageReader | None:
    """Opens the images that a cache was made from; None where they are no longer there.

    Args:
        cache: The cache.
        source: Where the images are now; None: where they were when the cache was made.

    Raises:
        SourceError: `source` is given and cannot be opened.
    """
    if source is not None:
        return open_reader(source)
    try:
        return open_reader(cache.manifest.source)
    except (SourceError, ResourceError):
        return None


def original_views(
    split: Split, entry: IndexRow, images: ImageReader | None
) -> tuple[Tensor | None, SourceState]:
    """Reads the views of a sample's image again, if it is the file that was encoded.

    Args:
        split: The sample's split.
        entry: Its index row.
        images: The source; None where there is none.

    Returns:
        uint8 (V, 3, H, W) or None, and what became of the source.
    """
    if images is None:
        return None, "missing"
    try:
        data = images.read(entry.path_bytes)
    except (ImageDecodeError, ResourceError):
        return None, "missing"
    if hashlib.sha256(data).hexdigest() != entry.source_sha256:
        return None, "changed"
    fingerprint = split.cache.fingerprint
    views, _ = image_views(
        decode_image(data, fingerprint.image),
        fingerprint.image,
        fingerprint.views,
        split=split.name,
        key=entry.key,
    )
    return views, "unchanged"


def stored_latent(split: Split, row: int, view: int) -> Tensor:
    """Returns one dequantised latent, float32 (M, h, w); of an incomplete cache as well.

    Raises:
        ShardError: its shard is missing or damaged.
    """
    stored = np.empty(split.latent.shape, split.latent.dtype)
    split.read_into(row, view, stored)
    y_Mhw = torch.from_numpy(stored.astype(np.float32))
    if split.latent.is_symbols:
        y_Mhw.mul_(split.scale).add_(torch.from_numpy(split.offset)[:, None, None])
    return y_Mhw


def bits_per_pixel(
    split: Split, encoder: FrozenEncoder, y_VMhw: Tensor
) -> tuple[float | None, ...]:
    """Returns what the entropy model asks for each latent; None for encoders without symbols.

    Floats are counted as if they were rounded at step 1.
    """
    if not encoder.has_symbols:
        return (None,) * len(y_VMhw)
    step, size = split.latent.step, split.cache.fingerprint.image.size
    y_hat_VMhw = encoder.dequantize(encoder.quantize(y_VMhw, step=step), step=step)
    return tuple((encoder.bits(y_hat_VMhw, step=step) / size**2).tolist())


def psnr_db(decoded_CHW: Tensor, original_CHW: Tensor) -> float:
    """Returns 10 log10(1 / MSE), 99 dB where they are equal.

    Args:
        decoded_CHW: Floats in [0, 1], clamped by the caller.
        original_CHW: uint8, 0-255.
    """
    error = decoded_CHW.double() - original_CHW.double() / 255
    mean_square = float(error.square().mean())
    return -10 * math.log10(max(mean_square, 10**-9.9))


def decoded_pixels(decoded_CHW: Tensor) -> npt.NDArray[np.uint8]:
    """Returns floats (3, H, W) in [0, 1] as rounded uint8 (H, W, 3)."""
    rounded = decoded_CHW.clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.asarray(rounded.permute(1, 2, 0).numpy(), np.uint8)


def jpeg_bytes(view_HWC: npt.NDArray[np.uint8], *, quality: int = JPEG_QUALITY) -> bytes:
    """Returns pixels, uint8 (H, W, 3), as Pillow's JPEG: 4:2:0, baseline, no optimised tables."""
    sink = io.BytesIO()
    Image.fromarray(view_HWC).save(sink, "JPEG", quality=quality)
    return sink.getvalue()
