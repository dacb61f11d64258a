"""Generated pictures for the demo: five kinds of pattern, each picture unlike any other.

::

    pattern in warped, turned, scaled coordinates -> two colours -> patches that hide parts of it
        -> light that falls from one side -> noise -> JPEG

A class has its pattern, and hues that it prefers without having them for itself, as flowers do.
Angle, scale, warp, light, second colour and shape of the picture say nothing about the class.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ci2p_cache.machine import num_cores

__all__ = ["CLASSES", "make_picture", "write_pictures"]

Plane = npt.NDArray[np.float32]

_SIDES_PX = ((150, 120), (160, 106), (144, 128), (120, 150), (106, 160))
"""(width, height): landscape and portrait, none of them square."""

_PERIODS_PX = (12.0, 26.0)
"""Distance of two stripes, dots or rings: from fine to coarse, still many per picture."""

_HUE_SPREAD = 0.1
"""Standard deviation of a class's hue, in turns; the classes' means are 0.2 apart, so the hue alone
gives about two pictures in three away."""

_MIN_CONTRAST = 90.0
"""Least distance of the two colours in RGB, of 441."""

_JPEG_QUALITY = 90


def write_pictures(root: Path, *, per_class: int, seed: int = 0) -> Iterator[Path]:
    """Writes `root/CLASS/NNN.jpg` for each of `CLASSES`, yielding each path once it is written.

    The folders are made. The same seed gives the same pictures.

    Raises:
        OSError: a picture cannot be written.
    """
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)

    def write(name: str, number: int) -> Path:
        path = root / name / f"{number:03d}.jpg"
        picture = Image.fromarray(make_picture(name, number, seed=seed))
        picture.save(path, format="JPEG", quality=_JPEG_QUALITY)
        return path

    # numpy leaves the interpreter to other threads while it computes.
    with ThreadPoolExecutor(num_cores()) as pool:
        yield from pool.map(write, *zip(*itertools.product(CLASSES, range(per_class)), strict=True))


def make_picture(name: str, number: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Returns one picture, uint8 (H, W, 3), a pure function of its arguments."""
    label = CLASSES.index(name)
    rng = np.random.default_rng([seed, label, number])
    width, height = _SIDES_PX[rng.integers(len(_SIDES_PX))]
    v, u = np.mgrid[0:height, 0:width].astype(np.float32)
    mask = _PATTERNS[name](*_turned(u, v, rng), rng)
    colour, ground = _two_colours(label / len(CLASSES) + rng.normal(0, _HUE_SPREAD), rng)
    pixels = ground + mask[..., None] * (colour - ground)
    for _ in range(int(rng.integers(2, 6))):
        pixels = _with_patch(pixels, u, v, rng)
    slope = rng.uniform(-0.45, 0.45, 2)
    shade = 1 + slope[0] * (u / width - 0.5) + slope[1] * (v / height - 0.5)
    noise = rng.uniform(2, 14) * rng.standard_normal(pixels.shape, np.float32)
    lit = np.clip(pixels * shade[..., None] + noise, 0, 255)
    return np.asarray(lit.round(), np.uint8)


def _turned(u: Plane, v: Plane, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Turns, scales and bends pixel coordinates; one unit becomes one period of the pattern."""
    height, width = u.shape
    period = np.exp(rng.uniform(*np.log(_PERIODS_PX)))
    angle = rng.uniform(0, 2 * np.pi)
    bend, wave = rng.uniform(0, 0.25) * period, rng.uniform(45, 120)
    phase = rng.uniform(0, 2 * np.pi, 2)
    x = u - width / 2 + bend * np.sin(2 * np.pi * v / wave + phase[0])
    y = v - height / 2 + bend * np.sin(2 * np.pi * u / wave + phase[1])
    turned = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    return turned[0] / period, turned[1] / period


def _soft(values: Plane) -> Plane:
    """Turns signed values into a mask in [0, 1] with edges some pixels wide."""
    return 1 / (1 + np.exp(np.clip(-8 * values, -60, 60)))


def _stripes(x: Plane, _: Plane, rng: np.random.Generator) -> Plane:
    return _soft(np.sin(2 * np.pi * x) + rng.uniform(-0.5, 0.5))


def _checkers(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    stretch = rng.uniform(0.75, 1.3)
    return _soft(2 * np.sin(np.pi * x) * np.sin(np.pi * y * stretch))


def _dots(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    row = np.floor(y)
    across, down = (x + 0.5 * (row % 2)) % 1 - 0.5, y % 1 - 0.5
    radius = rng.uniform(0.22, 0.36)
    return _soft((radius - np.hypot(across, down)) * 6)


def _rings(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    reach = 0.35 * np.array([np.ptp(x), np.ptp(y)])
    centre = rng.uniform(-0.5, 0.5, 2) * reach
    distance = np.hypot(x - centre[0], (y - centre[1]) * rng.uniform(0.7, 1.0))
    return _soft(np.sin(2 * np.pi * distance) + rng.uniform(-0.5, 0.5))


def _blobs(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Sums plane waves of about one period in many directions: spots without order."""
    total = np.zeros_like(x)
    for angle, length, phase in zip(
        rng.uniform(0, 2 * np.pi, 24),
        rng.uniform(0.35, 0.85, 24),
        rng.uniform(0, 2 * np.pi, 24),
        strict=True,
    ):
        total += np.sin(2 * np.pi * length * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return _soft(total / 3.5 + rng.uniform(-0.3, 0.3))


def _two_colours(hue: float, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Returns a colour of that hue and a paler one of any hue, easy to distinguish from it."""
    while True:
        colour = _rgb(hue, rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.95))
        ground = _rgb(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.15, 0.95))
        if np.linalg.norm(colour - ground) >= _MIN_CONTRAST:
            return colour, ground


def _rgb(hue: float, saturation: float, value: float) -> Plane:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float64)


def _with_patch(pixels: Plane, u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    """Paints one ellipse or box of a random colour somewhere."""
    height, width = u.shape
    x = (u - rng.uniform(0, width)) / rng.uniform(6, 25)
    y = (v - rng.uniform(0, height)) / rng.uniform(6, 25)
    inside = np.hypot(x, y) < 1 if rng.random() < 0.5 else np.maximum(abs(x), abs(y)) < 1
    return np.where(inside[..., None], rng.uniform(0, 255, 3), pixels)


_PATTERNS: dict[str, Callable[[Plane, Plane, np.random.Generator], Plane]] = {
    "blobs": _blobs,
    "checkers": _checkers,
    "dots": _dots,
    "rings": _rings,
    "stripes": _stripes,
}

CLASSES = tuple(_PATTERNS)
"""Names of the five classes, sorted."""
