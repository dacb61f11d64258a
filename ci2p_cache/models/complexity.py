"""Parameters and multiply-accumulates of a model, its frozen encoder and the ViT-B/16 it replaces.

MACs are half of the FLOPs that `torch.utils.flop_counter.FlopCounterMode` reports: convolutions,
linear layers and both attention products (Q K^T and A V), nothing else. Models are counted on the
meta device, so no weight is drawn and nothing is computed; the encoder is counted by its formula,
because this room runs where CompressAI is not installed.

Shape suffixes: B batch, H and W rows and columns of an image, D width, N tokens, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ci2p_cache.errors import UsageError
from ci2p_cache.models.baselines import ViTB16
from ci2p_cache.models.registry import build_model, list_models, model_config
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = ["BASELINE", "Complexity", "complexity", "complexity_table"]

BASELINE = "vit_b16"
"""Name of the reference row: ViT-B/16 on images (Dosovitskiy et al. 2021, arXiv 2010.11929)."""


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
    """Parameters of the frozen g_a; 0 for the baseline."""
    trainable_parameters: int
    """Parameters of everything behind it."""
    encoder_macs: int
    """MACs of g_a, which a cache takes out of the training step; 0 for the baseline."""
    model_macs: int
    """MACs of everything behind it: reshape, transformer, head."""
    baseline_macs: int
    """MACs of ViT-B/16 at the same size and number of classes."""

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

    def to_dict(self) -> dict[str, Any]:
        """Returns fields and properties as plain JSON values."""
        derived = ("parameters", "macs", "reduction", "cached_reduction")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def complexity(
    name: str,
    *,
    size: int = 256,
    latent_channels: int = 192,
    encoder_width: int = 128,
    num_classes: int = 0,
) -> Complexity:
    """Counts one model behind its frozen encoder; the defaults are the paper's setting.

    Args:
        name: One of `list_models()`, or "vit_b16" for the baseline.
        size: Side of the image in pixels, a positive multiple of 32.
        latent_channels: M of the encoder; 192 for CompressAI quality 1-5, 320 for 6-8.
        encoder_width: N of the encoder; 128 for CompressAI quality 1-5, 192 for 6-8.
        num_classes: Outputs of the classification head; 0 counts the backbone alone.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: a size or count cannot be used.
    """
    _check_positive("size", size)
    if size % SIZE_MULTIPLE_PX:
        raise UsageError(f"`size` is {size}; it must be a multiple of {SIZE_MULTIPLE_PX}")
    _check_positive("encoder_width", encoder_width)
    # Also refuses a bad `num_classes` for the baseline, which has no record of its own.
    known = name if name != BASELINE else list_models()[0]
    config = model_config(known, num_classes=num_classes, latent_channels=latent_channels)
    baseline_parameters, baseline_macs = _count_baseline(size, num_classes)
    encoder_parameters = encoder_macs = 0
    trainable, model_macs = baseline_parameters, baseline_macs
    if name != BASELINE:
        encoder_parameters, encoder_macs = _count_encoder(size, encoder_width, latent_channels)
        with torch.device("meta"):
            model = build_model(config)
        side = size // DOWNSAMPLING
        trainable, model_macs = _count(model, (1, latent_channels, side, side))
    return Complexity(
        name=name,
        size=size,
        num_classes=num_classes,
        encoder_parameters=encoder_parameters,
        trainable_parameters=trainable,
        encoder_macs=encoder_macs,
        model_macs=model_macs,
        baseline_macs=baseline_macs,
    )


def complexity_table(
    size: int = 256,
    *,
    latent_channels: int = 192,
    encoder_width: int = 128,
    num_classes: int = 0,
) -> tuple[Complexity, ...]:
    """Counts the baseline and then every model, in the order of `list_models()`.

    Args:
        size: As for `complexity`.
        latent_channels: As for `complexity`.
        encoder_width: As for `complexity`.
        num_classes: As for `complexity`.

    Raises:
        UsageError: a size or count cannot be used.
    """
    return tuple(
        complexity(
            name,
            size=size,
            latent_channels=latent_channels,
            encoder_width=encoder_width,
            num_classes=num_classes,
        )
        for name in (BASELINE, *list_models())
    )


def _check_positive(field: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise UsageError(f"`{field}` is {value!r}; it must be a positive integer")


def _count_encoder(size: int, width: int, latent_channels: int) -> tuple[int, int]:
    """Returns (parameters, MACs) of g_a: four 5x5 convolutions of stride 2, GDN after three.

    Balle, Minnen, Singh, Hwang and Johnston 2018, arXiv 1802.01436. GDN is a 1x1 convolution of the
    squares with `width` biases (Balle, Laparra and Simoncelli 2016, arXiv 1511.06281).
    """
    parameters = macs = 0
    channels = (3, width, width, width, latent_channels)
    for layer, (in_channels, out_channels) in enumerate(itertools.pairwise(channels), start=1):
        kernel = 5 * 5 * in_channels * out_channels
        gdn = out_channels * out_channels if layer < 4 else 0
        biases = 2 * out_channels if layer < 4 else out_channels
        parameters += kernel + gdn + biases
        macs += (size >> layer) ** 2 * (kernel + gdn)
    return parameters, macs


@cache
def _count_baseline(size: int, num_classes: int) -> tuple[int, int]:
    """Returns (parameters, MACs) of ViT-B/16."""
    with torch.device("meta"):
        model = ViTB16(size, num_classes)
    return _count(model, (1, 3, size, size))


def _count(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (parameters, MACs) of a model on the meta device for one input."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(input_shape, device="meta"))
    return parameters, counter.get_total_flops() // 2
