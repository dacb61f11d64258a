"""`CodecSpec`: every setting that changes the numbers of a codec's training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = ["CODEC_ARCH", "CodecOptimizer", "CodecPrecision", "CodecSpec"]

CODEC_ARCH = "bmshj2018-factorized"
"""The one architecture that is trained here: its latents have symbols, which int8 caches hold."""

CodecPrecision = Literal["bfloat16", "float32"]
"""Arithmetic of g_a and g_s while they are trained."""

CodecOptimizer = Literal["muon", "adam"]
"""What moves the large kernels."""

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSpec(Record):
    """Every setting that changes the numbers of a codec's training; it binds the output folder.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    version: int = _VERSION
    """Version of this record."""
    quality: int = 5
    """CompressAI quality, 1-8; fixes N and M. 5 is what CI2P caches (128, 192)."""
    steps: int = 20_000
    """Optimiser steps, warm-up included; the learning rate ends at 0 with the last one."""
    batch_size: int = 8
    """Crops per step; small, because steps count for more than smooth gradients."""
    crop_px: int = 128
    """Side of the square crops; a multiple of 16. 128 sees g_a's whole field of view."""
    lmbda: float = 0.025
    """Weight of the distortion; CompressAI's for quality 5 and mse."""
    lr: float = 2e-4
    """Peak learning rate of g_a and g_s, of Adam's scale; between CompressAI's 1e-4 and the 4e-4
    that the bundled encoder began with from scratch."""
    optimizer: CodecOptimizer = "muon"
    """For the kernels inside g_a and g_s; all else is always Adam's. muon: see encoder/muon.py;
    adam: as CompressAI."""
    entropy_lr: float = 1e-3
    """Peak learning rate of the entropy model, which has to follow g_a; Adam's."""
    aux_lr: float = 1e-3
    """Learning rate of the quantiles' own Adam; CompressAI's."""
    warmup_steps: int = 100
    """Steps of linear warm-up, in which Adam learns its scales; at most half of `steps` count."""
    clip_norm: float = 1.0
    """Largest L2 norm of all gradients together; CompressAI's."""
    ema_decay: float = 0.998
    """Averaging of the weights that are kept: the last 500 steps or so; rises to it from 0.1."""
    min_scale: float = 0.5
    """Half of the crops are shrunk, antialiased, by a factor from here to 1; 1: none. Shrunk
    photographs are sharper and less marked by JPEG."""
    precision: CodecPrecision = "bfloat16"
    """Arithmetic of g_a and g_s (autocast) and inside Muon; weights, entropy model and loss are
    float32."""
    seed: int = 0
    """Seed of the initial weights, the crops and the noise."""

    def __post_init__(self) -> None:
        for name in ("lmbda", "lr", "entropy_lr", "aux_lr", "clip_norm", "ema_decay", "min_scale"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"`{name}` is {value}; wanted above 0")
        for name, low, high in (
            ("steps", 1, 10**9),
            ("batch_size", 1, 2**16),
            ("crop_px", 16, 2**13),
            ("warmup_steps", 0, 10**9),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            _require(low <= value <= high, f"`{name}` is {value}; wanted {low} to {high}")
        _require(self.version == _VERSION, f"`version` is {self.version}; known is {_VERSION}")
        _require(
            1 <= self.quality <= 8,
            f"`quality` is {self.quality}; {CODEC_ARCH} has 1 to 8",
        )
        _require(self.crop_px % 16 == 0, f"`crop_px` is {self.crop_px}; wanted a multiple of 16")
        _require(self.ema_decay < 1, f"`ema_decay` is {self.ema_decay}; wanted below 1")
        _require(self.min_scale <= 1, f"`min_scale` is {self.min_scale}; wanted at most 1")
        _require(
            self.optimizer in get_args(CodecOptimizer),
            f"`optimizer` is {self.optimizer!r}; wanted {' or '.join(get_args(CodecOptimizer))}",
        )
        _require(
            self.precision in get_args(CodecPrecision),
            f"`precision` is {self.precision!r}; wanted {' or '.join(get_args(CodecPrecision))}",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
