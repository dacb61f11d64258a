"""`TrainSpec`: every setting that changes the numbers of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = ["TrainSpec"]

_VERSION = 2

_WARMUP_SHARE = 0.1

_SINCE_VERSION_2: dict[str, float | int] = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "mix_probability": 1.0,
    "latent_flip": 0.0,
    "ema": 0.0,
    "layer_decay": 1.0,
    "folds": 0,
    "fold": 0,
}
"""What version 1 did not have, with the values that change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec(Record):
    """What to train and how; together with the cache it binds a run folder.

    Device, threads, paths and how often a checkpoint is saved are no part of it: they may change
    when a run is resumed.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    version: int = _VERSION
    """Version of this record."""
    model: str = "vitds"
    """Name of the model, as for `create_model`; the paper's better one."""
    epochs: int = 100
    """Passes over the train split; enough for small data, the paper takes 300."""
    batch_size: int = 64
    """Images per optimiser step; small, because small data sets need many steps."""
    accumulate: int = 1
    """Parts that a batch is cut into to save memory; gradients of all parts make one step."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """adamw as in the authors' code, adam as in the paper's summary."""
    lr: float = 1e-3
    """Peak learning rate, suits batches of 64 from scratch; the paper takes 1e-4 for 300 epochs."""
    min_lr: float = 1.25e-6
    """Learning rate at the end of the cosine; the paper's."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; None: a tenth of `epochs` (the paper: 20 of 300)."""
    weight_decay: float | None = None
    """Decoupled decay of adamw; None: 0.05, the authors', for adamw and 0 for adam."""
    decay_norm_and_bias: bool = False
    """Whether one-dimensional parameters decay too, as in the authors' code; usual is not."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging of Adam's moments; Kingma and Ba 2015, arXiv 1412.6980, and the paper."""
    eps: float = 1e-8
    """Adam's denominator; Kingma and Ba's, and the authors'."""
    clip_grad_norm: float = 1.0
    """Largest L2 norm of all gradients together, 0 for no clipping; 1 is usual for ViTs."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes; the authors'."""
    drop_path: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0; the paper's."""
    pos_embed: bool = False
    """Whether to add a learned positional embedding; the paper has none."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the model: IEEE float32 without TF32, or bf16 autocast with float32 weights."""
    order: Literal["random", "blocks"] = "random"
    """random: any sample at any time. blocks: eight shards at a time, for slow storage."""
    seed: int = 0
    """Seed of the initial weights, order, views, stochastic depth and of what is mixed."""
    mixup: float = 0.0
    """Alpha of Mixup of what the model reads, latents or images; 0 off, the authors 0.8."""
    cutmix: float = 0.0
    """Alpha of CutMix of what the model reads; 0 off, the authors 1.0. With both: half and half."""
    mix_probability: float = 1.0
    """Share of the batches that are mixed; the authors'."""
    latent_flip: float = 0.0
    """Probability that what the model reads is mirrored; wrong for latents, see step.py."""
    ema: float = 0.0
    """Decay per step of averaged weights, which are then what is validated; 0 off, usual 0.999."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer to the one below it; 1 off, BEiT 0.65-0.9."""
    folds: int = 0
    """Parts of the train split for cross-validation, of which one validates; 0 off."""
    fold: int = 0
    """The part that validates, 0 <= fold < folds."""

    def __post_init__(self) -> None:
        self._make_floats()
        _require(
            self.version == _VERSION,
            f"training record `version` is {self.version!r}; this ci2p-cache reads {_VERSION}",
        )
        for name, low, high in (
            ("epochs", 1, 10**6),
            ("batch_size", 1, 2**20),
            ("accumulate", 1, self.batch_size),
            ("seed", 0, 2**63 - 1),
            ("folds", 0, 2**20),
            ("fold", 0, max(self.folds - 1, 0) if type(self.folds) is int else 0),
        ):
            value = getattr(self, name)
            _require(
                type(value) is int and low <= value <= high,
                f"`{name}` is {value!r}; a whole number from {low} to {high} is wanted",
            )
        for name, choices in (
            ("optimizer", ("adamw", "adam")),
            ("precision", ("float32", "bf16")),
            ("order", ("random", "blocks")),
        ):
            value = getattr(self, name)
            _require(value in choices, f"`{name}` is {value!r}; wanted one of {', '.join(choices)}")
        self._check_rates()
        self._check_additions()

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuilds a spec written by `to_dict`, of version 1 too: what came later is off there.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if (
            isinstance(data, Mapping)
            and data.get("version") == 1
            and not _SINCE_VERSION_2.keys() & data.keys()
        ):
            data = {**data, **_SINCE_VERSION_2, "version": _VERSION}
        # By name: with slots a dataclass is another class than the one that `super()` knows.
        return super(TrainSpec, cls).from_dict(data)

    def binding(self) -> dict[str, Any]:
        """Returns what a run folder is bound to: all fields, as version 1 wrote them.

        What came later is left out where it is off, so runs that were begun before it continue.
        """
        return {
            name: value
            for name, value in (self.to_dict() | {"version": 1}).items()
            if name not in _SINCE_VERSION_2 or value != _SINCE_VERSION_2[name]
        }

    def _make_floats(self) -> None:
        """Turns whole numbers in float fields to floats, so that equal specs have equal records."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and type(value) is int:
                object.__setattr__(self, field.name, float(value))
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))

    def _check_rates(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), f"`lr` is {self.lr}; it must be positive")
        _require(
            0 <= self.min_lr <= self.lr,
            f"`min_lr` is {self.min_lr}; it must be between 0 and `lr` {self.lr}",
        )
        _require(
            0 <= self.num_warmup_epochs < self.epochs,
            f"`warmup_epochs` is {self.warmup_epochs}; it must be less than `epochs` {self.epochs}",
        )
        _require(
            len(list(self.betas)) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"`betas` is {self.betas}; two numbers with 0 <= beta < 1 are wanted",
        )
        _require(
            self.decay >= 0 and (self.optimizer == "adamw" or self.decay == 0),
            f"`weight_decay` is {self.weight_decay}; adamw takes 0 or more, adam takes none "
            "(it would be added to the gradients, which is another method)",
        )
        _require(self.eps > 0, f"`eps` is {self.eps}; it must be positive")
        _require(
            self.clip_grad_norm >= 0,
            f"`clip_grad_norm` is {self.clip_grad_norm}; 0 switches it off",
        )
        for name in ("label_smoothing", "drop_path"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"`{name}` is {value}; 0 <= value < 1 is wanted")

    def _check_additions(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _require(
                0 <= value < math.inf, f"`{name}` is {value}; 0 (off) or a positive alpha is wanted"
            )
        for name, fits, wanted in (
            ("mix_probability", 0 < self.mix_probability <= 1, "0 < value <= 1"),
            ("latent_flip", 0 <= self.latent_flip <= 1, "0 <= value <= 1"),
            ("ema", 0 <= self.ema < 1, "0 <= value < 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "0 < value <= 1"),
        ):
            _require(fits, f"`{name}` is {getattr(self, name)}; {wanted} is wanted")
        _require(
            self.is_mixing or self.mix_probability == 1,
            f"`mix_probability` is {self.mix_probability}, but nothing is mixed: `mixup` and "
            "`cutmix` are 0",
        )
        _require(self.folds != 1, "`folds` is 1; 0 switches it off, 2 or more divide the split")

    @property
    def is_mixing(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def num_warmup_epochs(self) -> float:
        """Epochs of linear warm-up."""
        if self.warmup_epochs is None:
            return _WARMUP_SHARE * self.epochs
        return self.warmup_epochs

    @property
    def decay(self) -> float:
        """Decoupled weight decay."""
        if self.weight_decay is None:
            return 0.05 if self.optimizer == "adamw" else 0.0
        return self.weight_decay


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
