"""Generated pictures: smooth, non-square and asymmetric, each of its own seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["picture", "write_image_folder"]


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """A smooth, asymmetric RGB picture: no flip, turn or transposition leaves it as it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    phase = rng.uniform(0, 6.28, (3, 1, 1))
    waves = np.sin(x / rng.uniform(5, 15) + y / rng.uniform(9, 30) + phase)
    ramp = (x / width + 2 * y / height) / 3
    pixels = np.clip((waves * 0.3 + 0.5) * 160 + ramp * 95, 0, 255)
    pixels[:, : height // 8, : width // 6] = rng.integers(0, 255, (3, 1, 1))
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def write_image_folder(root: Path, counts: dict[str, int], *, quality: int = 92) -> Path:
    """Writes `counts[name]` JPEGs below `root/name`, each of its own seed and size."""
    for class_index, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = 1000 * class_index + i
            image = picture(seed, width=80 + 7 * (i % 5), height=66 + 5 * (i % 3))
            image.save(folder / f"{i:03d}.jpg", quality=quality)
    return root
