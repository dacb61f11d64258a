"""What others published of the paper's models, to hold our counts against: `published`.

Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120: parameters and
reductions are the paper's; MACs are those of the authors' published code, counted by mmengine.
"""

from __future__ import annotations

from dataclasses import dataclass

from ci2p_cache.record import Record

__all__ = ["PAPER_MODELS", "PAPER_SIZES", "Published", "published"]

PAPER_MODELS = ("vit_b16", "vit", "vitds")
"""ViT-B/16, CI2P-ViT and CI2P-ViTds: the rows of the paper's table of costs."""

PAPER_SIZES = (224, 256, 384, 512)
"""Sides of the image in pixels; the paper trains at 256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published(Record):
    """Figures of one model at one image size, rounded as they were published."""

    gmacs: float
    """Thousand million MACs of the authors' code from pixels to features, by mmengine."""
    parameters_millions: float | None = None
    """The paper's number of parameters in millions, frozen ones included; None: not known."""
    reduction: str | None = None
    """What the paper says is saved against ViT-B/16, in its words; None: not known."""


_FIGURES = {
    ("vit_b16", 256): Published(gmacs=23.1268),
    ("vit", 256): Published(gmacs=8.4768, parameters_millions=88.96, reduction="63.35 %"),
    ("vitds", 256): Published(gmacs=6.6303, parameters_millions=49.7, reduction="about 72 %"),
    ("vit_b16", 384): Published(gmacs=55.43),
    ("vit", 384): Published(gmacs=19.28),
    ("vitds", 384): Published(gmacs=15.45),
    ("vit_b16", 512): Published(gmacs=107.0),
    ("vit", 512): Published(gmacs=34.81),
    ("vitds", 512): Published(gmacs=28.78),
}


def published(name: str, size: int) -> Published | None:
    """Returns what was published of a model behind the encoder of quality 1-5, without a head.

    Args:
        name: Name of the model.
        size: Side of the image in pixels.

    Returns:
        None where nothing is known.
    """
    return _FIGURES.get((name, size))
