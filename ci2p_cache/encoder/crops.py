"""The batch of a step: random crops of the training images, a pure function of seed and step.

What is trained with them is not known here. Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ci2p_cache.encoder.codec_spec import CodecSpec
from ci2p_cache.errors import UsageError

__all__ = ["Crops", "TrainingImages"]


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """What is trained on."""

    images: Sequence[Tensor]
    """uint8 (3, H, W), 0-255, RGB, each side at least `crop_px`; items may be made when asked for,
    as long as they are the same every time."""
    draws: Sequence[float]
    """How often each image is drawn, in proportion; positive, as many as images."""
    digest: str
    """What images these are, in the caller's words; a run is resumed with the same ones only."""


class Crops:
    """Batches of random crops of training images.

    Args:
        data: The images.
        spec: Seed, batch size, and how crops are drawn.

    Raises:
        UsageError: there are no images, or the draws do not belong to them.
    """

    def __init__(self, data: TrainingImages, spec: CodecSpec) -> None:
        if len(data.images) == 0 or len(data.draws) != len(data.images) or min(data.draws) <= 0:
            raise UsageError(
                f"{len(data.images)} images and {len(data.draws)} draws; wanted at least one image "
                "and a positive number for each"
            )
        self._images = data.images
        self._spec = spec
        self._cumulative = np.cumsum(np.asarray(data.draws, dtype=np.float64))

    def batch(self, step: int) -> Tensor:
        """Gives the batch of a step: float32 (B, 3, crop_px, crop_px) in [0, 1].

        Raises:
            UsageError: an image is smaller than the crop or not uint8 (3, H, W).
        """
        rng = np.random.default_rng([self._spec.seed, step])
        crops = []
        for _ in range(self._spec.batch_size):
            # A draw that rounds up to the whole sum would be behind the last image.
            drawn = rng.random() * self._cumulative[-1]
            place = np.searchsorted(self._cumulative, drawn, side="right")
            index = min(int(place), len(self._images) - 1)
            crops.append(_crop(self._images[index], rng, self._spec, index))
        return torch.stack(crops).float().div_(255)


def _crop(image: Tensor, rng: np.random.Generator, spec: CodecSpec, index: int) -> Tensor:
    """Cuts out a random square, shrinks it in half of the cases, and mirrors half of them."""
    size = spec.crop_px
    if (
        image.ndim != 3
        or image.shape[0] != 3
        or image.dtype != torch.uint8
        or min(image.shape[1:]) < size
    ):
        raise UsageError(
            f"image {index} is {tuple(image.shape)} {image.dtype}; wanted (3, H, W) uint8 with "
            f"sides of at least `crop_px` {size}"
        )
    height, width = image.shape[1:]
    scale, shrinks, mirrors, down, right = rng.random(5)
    side = size
    if shrinks < 0.5:
        side = min(round(size / (spec.min_scale + (1 - spec.min_scale) * scale)), height, width)
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    crop = image[:, top : top + side, left : left + side]
    if side != size:
        crop = interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if mirrors < 0.5 else crop
