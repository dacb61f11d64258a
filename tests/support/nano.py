"""Models of a few thousand weights, for tests in which the size of the model is not the point."""

from __future__ import annotations

from ci2p_cache.models import registry

__all__ = ["add_nano_models"]


def add_nano_models() -> None:
    """Makes `vit_nano` and `vitds_nano` known to this process: width 16, one block per scale."""
    registry._SCALES.setdefault("vit_nano", ((16, 1),))
    registry._SCALES.setdefault("vitds_nano", ((16, 1), (16, 1)))
