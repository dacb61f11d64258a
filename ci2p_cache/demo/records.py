"""How large the demo is, what it tells while it runs, and what it has made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = ["DemoEvent", "DemoOptions", "DemoResult", "DemoStep"]

DemoStep = Literal["pictures", "encode", "verify", "train", "draw"]
"""The steps, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """How large the demo is; the defaults take about 90 seconds on two cores.

    Raises:
        UsageError: a number is too small, on construction.
    """

    per_class: int = 120
    """Pictures of each of the five classes."""
    size: int = 128
    """Side of the encoded square in pixels, a multiple of 32."""
    epochs: int = 12
    """Epochs of training."""
    batch_size: int = 32
    """Images per step; small, so that few pictures make enough steps."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        for name, low in (("per_class", 2), ("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"demo `{name}` is {getattr(self, name)}; wanted {low} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoEvent:
    """A step that starts or has ended."""

    step: DemoStep
    """Which one."""
    text: str
    """One line: what it will do, or what came of it."""
    seconds: float | None
    """How long it took; None when it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult(Record):
    """What the demo made and measured."""

    note: str
    """That the pictures are generated."""
    folder: str
    """Where everything is; it is kept."""
    pictures: str
    """Folder of the generated pictures."""
    cache: str
    """The cache."""
    run: str
    """The run folder."""
    curves: str
    """Picture of the training curves."""
    preview: str
    """Picture of originals and reconstructions."""
    images: int
    """Pictures encoded."""
    classes: tuple[str, ...]
    """Their classes."""
    splits: dict[str, int]
    """Pictures per split."""
    bytes_per_image: float
    """Cache bytes per picture, all its views together."""
    encode_images_per_second: float
    """Speed of stage one."""
    train_images_per_second: float
    """Speed of stage two in its last epoch."""
    psnr_db: float
    """Mean PSNR of the reconstructions in the preview, in dB."""
    top1: float
    """Validation top-1 after the last epoch, 0 to 1."""
    chance: float
    """Top-1 of guessing."""
    seconds: dict[str, float]
    """Wall time of each step."""
    commands: tuple[str, ...]
    """The commands that do the same on one's own IMAGES."""
