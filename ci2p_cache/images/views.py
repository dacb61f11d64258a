"""Views: from a decoded image to the uint8 squares that g_a sees, and where each was cut.

Everything is a pure function of its arguments, whatever was drawn before. Augmentation draws from
torch's global state, which is set for each view and put back: one thread of a process at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from ci2p_cache.images.decode import DecodedImage
from ci2p_cache.specs import AugmentSpec, ImageSpec, ViewSpec

__all__ = ["CropBox", "image_views"]

# Random-resized crops: Szegedy et al. 2015, "Going deeper with convolutions" (arXiv 1409.4842,
# section 6), 8-100 % of the area and a ratio of sides between 3/4 and 4/3; ten attempts and the
# central fallback as torchvision's RandomResizedCrop makes them.
_MIN_AREA = 0.08
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_NUM_ATTEMPTS = 10
_FLIP_PROBABILITY = 0.5
_NUM_DRAWS = 2 * _NUM_ATTEMPTS + 3
"""Per view: area and ratio of each attempt, then top, left, flip. All are always drawn, so that a
value does not depend on how many attempts failed."""


@dataclass(frozen=True, slots=True)
class CropBox:
    """Where a view was cut, in pixels of the decoded image (after an EXIF turn).

    For a random crop the box is exact. For the centre square, which is cut after the resize, it is
    where the square is in the decoded image, rounded to whole pixels.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    """Whether the cut was then mirrored left to right."""


def image_views(
    image: DecodedImage,
    image_spec: ImageSpec,
    view_spec: ViewSpec,
    *,
    split: str,
    key: str,
    numbers: Sequence[int] | None = None,
) -> tuple[torch.Tensor, list[CropBox]]:
    """Cuts the views of one image.

    Args:
        image: The decoded image; how its pixels are strided makes no difference.
        image_spec: `size`, `resize_side` and `interpolation` are used; every resize is antialiased
            and works on uint8, as torchvision does it.
        view_spec: Which views `train` has: the centre square; the square and its mirror; or random
            crops, drawn and augmented by (`seed`, `split`, `key`, number of the view) alone.
        split: Other splits than `train` have one view, the centre square.
        key: The sample's key within the split.
        numbers: Of the views to cut; None: all that are stored. A crop may have any number from 0.

    Returns:
        uint8 (V, 3, size, size), 0-255, contiguous; and one box per view.
    """
    if numbers is None:
        numbers = range(view_spec.num_views(split))
    if split == "train" and view_spec.kind == "crops":
        height, width = image.pixels.shape[1:]
        augment = view_spec.augment
        min_area = _MIN_AREA if augment is None else augment.min_area
        names = [f"{view_spec.seed}\0{split}\0{key}\0{number}" for number in numbers]
        boxes = [_random_box(height, width, _draws(name), min_area) for name in names]
        squares = [_resized_crop(image.pixels, box, image_spec) for box in boxes]
        if augment is not None:
            change = _augmentation(augment, image_spec.size)
            pairs = zip(squares, names, strict=True)
            squares = [_augmented(square, change, name) for square, name in pairs]
        return _stacked(squares), boxes
    square, box = _centre_square(image.pixels, image_spec)
    boxes = [replace(box, flip=number == 1) for number in numbers]
    return _stacked([square.flip(2) if each.flip else square for each in boxes]), boxes


def _stacked(squares: list[torch.Tensor]) -> torch.Tensor:
    # Squares of pixels that are pixel by pixel do so too.
    return torch.stack(squares).contiguous()


def _centre_square(pixels: torch.Tensor, spec: ImageSpec) -> tuple[torch.Tensor, CropBox]:
    """Resizes the shorter side to `resize_side`, then cuts the central `size` x `size`."""
    from torchvision.transforms.v2.functional import center_crop

    resized = _resize(pixels, [spec.resize_side], spec)
    square = center_crop(resized, [spec.size, spec.size])
    height, width = pixels.shape[1:]
    top, box_height = _in_source(height, resized.shape[1], spec.size)
    left, box_width = _in_source(width, resized.shape[2], spec.size)
    return square, CropBox(top, left, box_height, box_width, flip=False)


def _in_source(source: int, resized: int, size: int) -> tuple[int, int]:
    """Returns (start, length) in source pixels of the central `size` of `resized` pixels."""
    start = round((resized - size) / 2.0) * source / resized
    stop = start + size * source / resized
    first = min(round(start), source - 1)
    return first, max(1, min(round(stop), source) - first)


def _resized_crop(pixels: torch.Tensor, box: CropBox, spec: ImageSpec) -> torch.Tensor:
    crop = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
    square = _resize(crop, [spec.size, spec.size], spec)
    return square.flip(2) if box.flip else square


def _resize(pixels: torch.Tensor, size: list[int], spec: ImageSpec) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    resized: torch.Tensor = resize(
        pixels, size, InterpolationMode(spec.interpolation), antialias=True
    )
    return resized


@cache
def _augmentation(spec: AugmentSpec, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what is done to a square of `size` pixels; a step with the chance 0 draws as well."""
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = []
    if spec.rand_augment:
        steps.append(v2.RandAugment(spec.rand_augment, spec.magnitude))
    if spec.trivial_augment:
        steps.append(v2.TrivialAugmentWide())
    blur = v2.GaussianBlur(2 * (size // 20) + 1)
    steps += [v2.RandomGrayscale(spec.grey), v2.RandomApply([blur], spec.blur)]
    steps += [v2.RandomSolarize(128, spec.solarize), v2.RandomErasing(spec.erasing)]
    change: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(steps)
    return change


def _augmented(
    square: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], name: str
) -> torch.Tensor:
    """Changes a square by draws that only `name` decides: seed, split, key and number of view."""
    seed = int.from_bytes(_digest("augment", name)[:8], "little")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds devices that do not exist here.
        torch.default_generator.manual_seed(seed)
        # In one order of memory: another one may blur with other roundings.
        return change(square.contiguous())


def _digest(purpose: str, name: str) -> bytes:
    text = f"{purpose}\0{name}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _draws(name: str) -> list[float]:
    """Returns `_NUM_DRAWS` numbers in [0, 1) that only `name` decides.

    Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") under a key of
    128 bits of BLAKE2b. Raw words are taken, as numpy promises them to stay; what its
    distributions make of them may change between versions.
    """
    key = int.from_bytes(_digest("crops", name), "little")
    words = np.random.Philox(key=key).random_raw(_NUM_DRAWS)
    return [int(word >> 11) * 2.0**-53 for word in words.tolist()]


def _random_box(height: int, width: int, draws: list[float], min_area: float) -> CropBox:
    """Returns a random-resized crop of an image of `height` x `width` pixels."""
    box_height, box_width = _fallback_size(height, width)
    for attempt in range(_NUM_ATTEMPTS):
        area = height * width * _between((min_area, 1.0), draws[2 * attempt])
        ratio = math.exp(_between(_LOG_RATIO, draws[2 * attempt + 1]))
        tried_width, tried_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < tried_width <= width and 0 < tried_height <= height:
            box_height, box_width = tried_height, tried_width
            top = int(draws[-3] * (height - box_height + 1))
            left = int(draws[-2] * (width - box_width + 1))
            break
    else:
        top, left = (height - box_height) // 2, (width - box_width) // 2
    return CropBox(top, left, box_height, box_width, flip=draws[-1] < _FLIP_PROBABILITY)


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _fallback_size(height: int, width: int) -> tuple[int, int]:
    """Returns the largest central (height, width) whose ratio of sides is within the bounds."""
    narrowest, widest = (math.exp(bound) for bound in _LOG_RATIO)
    if width / height < narrowest:
        return round(width / narrowest), width
    if width / height > widest:
        return height, round(height * widest)
    return height, width
