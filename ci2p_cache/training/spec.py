"""`TrainSpec`: every setting that changes the numbers of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ci2p_cache.errors import UsageError
from ci2p_cache.fields import check_options, option
from ci2p_cache.record import Record

__all__ = ["TrainSpec"]

_VERSION = 4

_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.05

# Panels of the help; what has none is for every day.
_OPTIMISER, _REGULARISATION, _DATA = "Model and optimiser", "Regularisation", "Data"
_FINE_TUNING = "Fine-tuning"

_SINCE: dict[int, dict[str, Any]] = {
    2: {
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_probability": 1.0,
        "latent_flip": 0.0,
        "ema": 0.0,
        "layer_decay": 1.0,
        "folds": 0,
        "fold": 0,
    },
    3: {"init_from": None, "freeze": 0, "train_encoder": False},
    4: {"fresh_views": False},
}
"""What earlier versions did not have, by version, with the values that change nothing."""


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
    model: str = option(
        "vitds",
        "On latents: vit, vitds, these with _small or _tiny, ci2p+timm:NAME. On the images: "
        "vit_b16, vit_s16, vit_ti16, cnn_vit (_small, _tiny), timm:NAME. Either: FILE.py:NAME.",
    )
    epochs: int = option(
        100, "Passes over the training images; the paper takes 300.", low=1, high=10**6
    )
    batch_size: int = option(64, "Images per step, of all ranks.", low=1, high=2**20)
    accumulate: int = option(
        1, "Parts a batch is cut into, to save memory.", low=1, panel=_OPTIMISER
    )
    optimizer: Literal["adamw", "adam"] = option(
        "adamw",
        "adamw as in the authors' code, or adam as in the paper's summary.",
        panel=_OPTIMISER,
    )
    lr: float = option(
        1e-3, "Peak learning rate; suits batches of 64, the paper takes 1e-4.", above=0
    )
    min_lr: float = option(
        1.25e-6, "Learning rate at the end of the cosine; the paper's.", low=0, panel=_OPTIMISER
    )
    warmup_epochs: float | None = option(
        None,
        f"Linear warm-up [default: {_WARMUP_SHARE:.0%} of the epochs; the paper: 20 of 300].",
        low=0,
        panel=_OPTIMISER,
    )
    weight_decay: float | None = option(
        None,
        f"Decoupled weight decay [default: {_WEIGHT_DECAY}, the authors'; 0 with adam].",
        low=0,
        panel=_OPTIMISER,
    )
    decay_norm_and_bias: bool = option(
        False,
        "Whether one-dimensional parameters decay too, as in the authors' code; usual is not.",
        is_flag=False,
    )
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging of Adam's moments; Kingma and Ba 2015, arXiv 1412.6980, and the paper."""
    eps: float = option(
        1e-8, "Adam's denominator; Kingma and Ba's, and the authors'.", above=0, is_flag=False
    )
    clip_grad_norm: float = option(
        1.0,
        "Limit of the L2 norm of all gradients together; 0: none. 1 is usual.",
        low=0,
        panel=_OPTIMISER,
    )
    label_smoothing: float = option(
        0.1,
        "Share of the target spread over all classes; the authors'.",
        low=0,
        below=1,
        panel=_REGULARISATION,
    )
    drop_path: float = option(
        0.1,
        "Stochastic depth of the last block, from 0 at the first; the paper's.",
        low=0,
        below=1,
        panel=_REGULARISATION,
    )
    pos_embed: bool = option(
        False, "Add a learned positional embedding; the paper has none.", panel=_OPTIMISER
    )
    precision: Literal["float32", "bf16"] = option(
        "float32", "float32: IEEE, without TF32. bf16: autocast with float32 weights, for GPUs."
    )
    order: Literal["random", "blocks"] = option(
        "random", "blocks: eight shards at a time, mixed; for slow storage.", panel=_DATA
    )
    seed: int = option(
        0,
        "Seed of weights, order, views, stochastic depth and mixing.",
        low=0,
        high=2**63 - 1,
        panel=_DATA,
    )
    mixup: float = option(
        0.0,
        "Alpha of Mixup of what the model reads, latents or images; 0: off, the authors 0.8.",
        low=0,
        panel=_REGULARISATION,
    )
    cutmix: float = option(
        0.0, "Alpha of CutMix; 0: off, the authors 1.0. With both, half and half.", low=0,
        panel=_REGULARISATION,
    )  # fmt: skip
    mix_probability: float = option(
        1.0, "Share of the batches that are mixed; the authors'.", above=0, high=1,
        panel=_REGULARISATION,
    )  # fmt: skip
    latent_flip: float = option(
        0.0, "Probability of mirroring latents. The encoder gives no such latents: see the study.",
        low=0, high=1, panel=_REGULARISATION,
    )  # fmt: skip
    ema: float = option(
        0.0, "Decay of averaged weights, which are then validated; 0: off, usual 0.999.", low=0,
        below=1, panel=_REGULARISATION,
    )  # fmt: skip
    layer_decay: float = option(
        1.0, "Factor on the learning rate per layer towards the input; 1: off, BEiT 0.65 to 0.9.",
        above=0, high=1, panel=_OPTIMISER,
    )  # fmt: skip
    folds: int = option(
        0, "Parts of the train split, one of which validates; 0: use val.", low=0, high=2**20,
        panel=_DATA,
    )  # fmt: skip
    fold: int = option(0, "The part that validates, from 0.", low=0, panel=_DATA)
    fresh_views: bool = option(
        False, "New crops in each epoch, cut from the images as the cache's are; with latents, the "
        "encoder runs in each step.", panel=_DATA,
    )  # fmt: skip
    init_from: str | None = option(
        None, "Begin with the weights of a run, a checkpoint in it, or an export of it.",
        metavar="RUN", panel=_FINE_TUNING,
    )  # fmt: skip
    freeze: int = option(
        0, "Layers from the input that keep their weights: first what is before the blocks, then "
        "each block.", low=0, panel=_FINE_TUNING,
    )  # fmt: skip
    train_encoder: bool = option(
        False, "Train the encoder too, from the images; best with --init-from, at a low --lr.",
        panel=_FINE_TUNING,
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require(
            self.version == _VERSION,
            f"training record `version` is {self.version!r}; this ci2p-cache reads {_VERSION}",
        )
        check_options(self)
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        _require(
            len(list(self.betas)) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"`betas` is {self.betas}; two numbers with 0 <= beta < 1 are wanted",
        )
        for name, limit in (
            ("accumulate", self.batch_size),
            ("min_lr", self.lr),
            ("fold", max(self.folds - 1, 0)),
        ):
            value = getattr(self, name)
            _require(value <= limit, f"`{name}` is {value}; wanted at most {limit}")
        _require(
            self.num_warmup_epochs < self.epochs,
            f"`warmup_epochs` is {self.warmup_epochs}; it must be less than `epochs` {self.epochs}",
        )
        _require(
            self.optimizer == "adamw" or self.decay == 0,
            f"`weight_decay` is {self.weight_decay}; adam takes none (it would be added to the "
            "gradients, which is another method)",
        )
        _require(
            self.is_mixing or self.mix_probability == 1,
            f"`mix_probability` is {self.mix_probability}, but nothing is mixed: `mixup` and "
            "`cutmix` are 0",
        )
        _require(self.folds != 1, "`folds` is 1; 0 switches it off, 2 or more divide the split")
        _require(
            not self.freeze or (self.init_from is not None and not self.train_encoder),
            f"`freeze` (--freeze) is {self.freeze}: it keeps the weights of `init_from` "
            "(--init-from), and does not go together with `train_encoder` (--train-encoder)",
        )

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuilds a spec written by `to_dict`, of any version: what came later is off there.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if isinstance(data, Mapping) and type(made := data.get("version")) is int:
            news = (own for version, own in _SINCE.items() if version > made)
            later = {name: value for own in news for name, value in own.items()}
            if made >= 1 and later and not later.keys() & data.keys():
                data = {**data, **later, "version": _VERSION}
        # By name: with slots a dataclass is another class than the one that `super()` knows.
        return super(TrainSpec, cls).from_dict(data)

    def binding(self) -> dict[str, Any]:
        """Returns what a run folder is bound to: the fields as version 1 wrote them.

        What came later is left out where it is off, so runs that were begun before it continue.
        `init_from` is left out, because what it leads to binds and not where it is.
        """
        off = {name: value for own in _SINCE.values() for name, value in own.items()}
        return {
            name: value
            for name, value in (self.to_dict() | {"version": 1}).items()
            if name != "init_from" and (name not in off or value != off[name])
        }

    @property
    def is_extensible(self) -> bool:
        """Whether no learning rate follows from `epochs`, so that a run can be given more."""
        return self.min_lr == self.lr and self.warmup_epochs is not None

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
            return _WEIGHT_DECAY if self.optimizer == "adamw" else 0.0
        return self.weight_decay


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
