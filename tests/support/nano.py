"""Models of a few thousand weights, for tests in which the size of the model is not the point."""

from __future__ import annotations

from ci2p_cache.models import registry

__all__ = ["add_nano_models"]


def add_nano_models() -> None:
    """Makes `vit_nano`, `vitds_nano` and, on images, `vit_nano16` known to this process.

    They are 16 wide; the first two have one block per scale.
    """
    registry._SCALES.setdefault("vit_nano", ((16, 1),))
    registry._SCALES.setdefault("vitds_nano", ((16, 1), (16, 1)))
    registry._PIXEL_DIMS.setdefault("vit_nano16", 16)
