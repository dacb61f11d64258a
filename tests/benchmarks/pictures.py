"""Pictures for the size benchmark: views of a folder, JPEG of them, and PSNR."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ci2p_cache.images.decode import decode_image, decoder_name
from ci2p_cache.images.views import image_views
from ci2p_cache.pictures.reconstructions import JPEG_QUALITY, jpeg_bytes
from ci2p_cache.specs import ImageSpec, ViewSpec

__all__ = ["JPEG_QUALITY", "jpeg", "mean_psnr", "to_pixels", "unjpeg", "views"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def views(images: Path, count: int, size: int) -> torch.Tensor:
    """uint8 (N, 3, size, size): what the encoder sees of files spread evenly over the folder."""
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit("the folder holds no image")
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    spec = ImageSpec(
        size=size, resize_side=size, interpolation="bilinear", exif="ignore",
        max_pixels=89_000_000, decoder=decoder_name(),
    )  # fmt: skip
    found = []
    for path in dict.fromkeys(chosen):
        image = decode_image(path.read_bytes(), spec)
        square, _ = image_views(image, spec, ViewSpec.parse("none"), split="val", key="")
        found.append(square)
    return torch.cat(found)


def to_pixels(x_hat: torch.Tensor) -> torch.Tensor:
    return x_hat.clamp(0, 1).mul(255).round().to(torch.uint8)


def mean_psnr(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean over views of each one's PSNR; uint8 (B, 3, H, W)."""
    errors = torch.cat([(a.double() - b.double()).square().mean(dim=(1, 2, 3)) for a, b in pairs])
    return float((10 * torch.log10(255**2 / errors)).mean())


def jpeg(view: torch.Tensor) -> bytes:
    """The view as `jpeg_bytes` writes it."""
    return jpeg_bytes(view.permute(1, 2, 0).numpy())


def unjpeg(data: bytes) -> torch.Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
