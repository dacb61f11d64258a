"""Models of a few thousand weights, for tests in which the size of the model is not the point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ci2p_cache.models import registry

__all__ = ["add_nano_models", "main", "nano_models"]


def add_nano_models() -> None:
    """Makes `vit_nano` and `vitds_nano` known to this process, and two models on images.

    All are 16 wide; the first two have one block per scale.
    """
    registry._SCALES["vit_nano"] = ((16, 1),)
    registry._SCALES["vitds_nano"] = ((16, 1), (16, 1))
    registry._PIXEL_DIMS["vit_nano16"] = 16
    registry._CNN_DIMS["cnn_vit_nano"] = 16


def main() -> None:
    """Runs the command line with every model on latents made nano: READMEs name large ones."""
    add_nano_models()
    for name, scales in list(registry._SCALES.items()):
        registry._SCALES[name] = tuple((16, 1) for _ in scales)
    from ci2p_cache.cli import start

    start.main()


@contextmanager
def nano_models() -> Iterator[None]:
    """Has the nano models known while the block runs."""
    tables: tuple[dict[str, Any], ...] = (
        registry._SCALES, registry._PIXEL_DIMS, registry._CNN_DIMS,
    )  # fmt: skip
    before = [dict(table) for table in tables]
    add_nano_models()
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            table.clear()
            table.update(known)
