"""Parameters and multiply-accumulates of a model, its frozen encoder and the ViT-B/16 it replaces.

MACs are half of the FLOPs that `torch.utils.flop_counter.FlopCounterMode` reports: convolutions,
linear layers and both attention products (Q K^T and A V), nothing else. Models are counted on the
meta device, so no weight is drawn and nothing is computed.

Shape suffixes: B batch, H and W rows and columns of an image, D width, N tokens, K classes.

Of what was published (Zhao and Sun, arXiv 2502.10120) parameters and reductions are the paper's,
MACs those of the authors' published code, counted by mmengine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ci2p_cache.errors import UsageError
from ci2p_cache.gdn import AnalysisTransform
from ci2p_cache.models.own_models import OwnConfig
from ci2p_cache.models.registry import AnyModelConfig, build_model, list_models, model_config
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = [
    "BASELINE",
    "PAPER_MODELS",
    "PAPER_SIZES",
    "PUBLISHED",
    "Complexity",
    "Published",
    "complexity",
    "complexity_table",
    "tensor_shapes",
    "trainable_parameters",
]

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


PUBLISHED = {
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
"""By model and image size: with the encoder of quality 1-5, without a head."""

BASELINE = "vit_b16"
"""Name of the reference row: ViT-B/16 on images (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

_PRODUCTS = ("bmm", "baddbmm", "scaled_dot_product")
"""Batched matrix products: what attention is computed with. Linear layers are plain ones."""

_NORM_MACS = {"LayerNorm": 5, "BatchNorm2d": 2, "SqueezeExcite": 1}
"""What mmengine's counter, after fvcore's, adds per input value of a layer of this kind; for
squeeze-and-excitation that is its pooling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """What one image costs in one forward pass, and how many numbers are stored for it."""

    name: str
    """Name of the model."""
    size: int
    """Side of the square image in pixels."""
    num_classes: int
    """Outputs of the classification head; 0 counts the backbone alone, as the paper does."""
    encoder_parameters: int
    """Parameters of the frozen g_a; 0 for models on images."""
    trainable_parameters: int
    """Parameters of everything behind it."""
    encoder_macs: int
    """MACs of g_a, which a cache takes out of the training step; 0 for models on images."""
    model_macs: int
    """MACs of everything behind it: reshape, transformer, head."""
    attention_macs: int
    """Attention products in `model_macs`: Q K^T and A V."""
    norm_macs: int
    """What mmengine's counter adds for norms and pooling; in none of the other figures."""
    baseline_macs: int
    """MACs of ViT-B/16 at the same size and number of classes."""
    baseline_attention_macs: int
    """Attention products in `baseline_macs`."""
    baseline_norm_macs: int
    """What mmengine's counter adds to `baseline_macs`."""

    @property
    def parameters(self) -> int:
        """Parameters, frozen and trainable."""
        return self.encoder_parameters + self.trainable_parameters

    @property
    def macs(self) -> int:
        """MACs from pixels to output."""
        return self.encoder_macs + self.model_macs

    @property
    def reduction(self) -> float:
        """Share of the baseline's MACs that is saved from pixels to output; 0 saves nothing."""
        return 1 - self.macs / self.baseline_macs

    @property
    def cached_reduction(self) -> float:
        """Share of the baseline's MACs that is saved where the latents come from a cache."""
        return 1 - self.model_macs / self.baseline_macs

    @property
    def linear_reduction(self) -> float:
        """`reduction` without the attention products, on both sides."""
        return 1 - (self.macs - self.attention_macs) / (
            self.baseline_macs - self.baseline_attention_macs
        )

    @property
    def cached_linear_reduction(self) -> float:
        """`cached_reduction` without the attention products, on both sides."""
        return 1 - (self.model_macs - self.attention_macs) / (
            self.baseline_macs - self.baseline_attention_macs
        )

    @property
    def mmengine_macs(self) -> int:
        """MACs from pixels to output as mmengine counts them, what the paper's figures are."""
        return self.macs + self.norm_macs

    @property
    def mmengine_reduction(self) -> float:
        """Share of the baseline's that is saved, both counted as mmengine does."""
        return 1 - self.mmengine_macs / (self.baseline_macs + self.baseline_norm_macs)

    def to_dict(self) -> dict[str, Any]:
        """Returns fields and properties as plain JSON values."""
        members = vars(Complexity).items()
        derived = [name for name, member in members if isinstance(member, property)]
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class _Count:
    """What a model was counted to have."""

    parameters: int = 0
    macs: int = 0
    attention_macs: int = 0
    norm_macs: int = 0


def complexity(
    name: str,
    *,
    size: int = 256,
    latent_channels: int = 192,
    encoder_width: int = 128,
    num_classes: int = 0,
) -> Complexity:
    """Counts one model, behind its frozen encoder where it reads latents.

    The defaults are the paper's setting. A trainable g_a (`cnn_vit`) is part of the model.

    Args:
        name: As for `create_model`; `timm:` and `ci2p+timm:` names too.
        size: Side of the image in pixels, a positive multiple of 32.
        latent_channels: M of the frozen encoder; 192 for CompressAI quality 1-5, 320 for 6-8.
        encoder_width: N of the frozen encoder; 128 for CompressAI quality 1-5, 192 for 6-8.
        num_classes: Outputs of the classification head; 0 counts the backbone alone.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: a size or count cannot be used.
    """
    for field, value in (
        ("size", size), ("latent_channels", latent_channels), ("encoder_width", encoder_width)
    ):  # fmt: skip
        if type(value) is not int or value < 1:
            raise UsageError(f"`{field}` is {value!r}; it must be a positive integer")
    if size % SIZE_MULTIPLE_PX:
        raise UsageError(f"`size` is {size}; it must be a multiple of {SIZE_MULTIPLE_PX}")
    config = model_config(
        name,
        num_classes=num_classes,
        latent_channels=latent_channels,
        latent_size=size // DOWNSAMPLING,
    )
    baseline = _count(
        model_config(BASELINE, num_classes=num_classes, latent_size=size // DOWNSAMPLING),
        (1, 3, size, size),
    )
    encoder, shape = _Count(), (1, 3, size, size)
    if config.reads == "latents":
        encoder = _count((encoder_width, latent_channels), shape)
        shape = (1, latent_channels, size // DOWNSAMPLING, size // DOWNSAMPLING)
    counted = _count(config, shape)
    return Complexity(
        name=name,
        size=size,
        num_classes=num_classes,
        encoder_parameters=encoder.parameters,
        trainable_parameters=counted.parameters,
        encoder_macs=encoder.macs,
        model_macs=counted.macs,
        attention_macs=counted.attention_macs,
        norm_macs=counted.norm_macs,
        baseline_macs=baseline.macs,
        baseline_attention_macs=baseline.attention_macs,
        baseline_norm_macs=baseline.norm_macs,
    )


def complexity_table(
    size: int = 256,
    *,
    names: Iterable[str] | None = None,
    latent_channels: int = 192,
    encoder_width: int = 128,
    num_classes: int = 0,
) -> tuple[Complexity, ...]:
    """Counts several models at one size; arguments and errors are those of `complexity`.

    `names` says which, in this order; None: the baseline, then our models on latents.
    """
    return tuple(
        complexity(
            name,
            size=size,
            latent_channels=latent_channels,
            encoder_width=encoder_width,
            num_classes=num_classes,
        )
        for name in (names or (BASELINE, *list_models("latents")))
    )


def trainable_parameters(config: AnyModelConfig) -> int:
    """Counts the parameters of a model without drawing a weight, or running code of somebody's own.

    Raises:
        UsageError: the installed timm cannot build it.
    """
    return config.parameters if isinstance(config, OwnConfig) else _parameters(_built(config))


def tensor_shapes(what: AnyModelConfig | tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a model, or of g_a of width N and M channels, by name.

    Raises:
        UsageError: the installed timm cannot build it.
    """
    return {name: tuple(tensor.shape) for name, tensor in _built(what).state_dict().items()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _built(what: AnyModelConfig | tuple[int, int]) -> nn.Module:
    """Builds a model, or g_a of width N and M channels, on the meta device."""
    # What is drawn on the meta device must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = AnalysisTransform(*what) if isinstance(what, tuple) else build_model(what)
        return made.eval()


@cache
def _count(what: AnyModelConfig | tuple[int, int], input_shape: tuple[int, ...]) -> _Count:
    """Counts a model, or g_a of width N and M channels, on the meta device for one input."""
    model = _built(what)
    norm_macs = 0

    def add(factor: int, given: Tensor) -> None:
        nonlocal norm_macs
        norm_macs += factor * given.numel()

    for part in model.modules():
        # By name, for timm need not be imported; its LayerNorm has one of that name below it.
        names = {kind.__name__ for kind in type(part).__mro__}
        for name in names & _NORM_MACS.keys():
            part.register_forward_pre_hook(
                lambda _, given, factor=_NORM_MACS[name]: add(factor, given[0])
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(input_shape, device="meta"))
    by_operation = counter.get_flop_counts().get("Global", {})
    products = sum(
        flops
        for operation, flops in by_operation.items()
        if any(product in str(operation) for product in _PRODUCTS)
    )
    return _Count(
        parameters=_parameters(model),
        macs=counter.get_total_flops() // 2,
        attention_macs=products // 2,
        norm_macs=norm_macs,
    )
