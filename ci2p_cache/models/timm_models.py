"""timm's models built from their records: `timm:<name>` on images, `ci2p+timm:<name>` on latents.

None is pretrained. What timm cannot build (Wightman, "PyTorch image models",
https://github.com/huggingface/pytorch-image-models) is refused before anything is trained.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UsageError
from ci2p_cache.models.baselines import Normalise, check_images
from ci2p_cache.models.patch_embed import CI2PPatchEmbed
from ci2p_cache.models.timm_records import (
    CI2P_TIMM_PREFIX,
    TIMM_PREFIX,
    CI2PTimmConfig,
    TimmConfig,
    made_for,
)
from ci2p_cache.specs import DOWNSAMPLING

__all__ = ["TimmClassifier", "build_ci2p_timm", "check_builds"]

_BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What timm's models raise for a size or an option that they cannot have."""


class TimmClassifier(nn.Module):
    """Any timm classifier, not pretrained: images (B, 3, H, W) to logits (B, K).

    Args:
        config: What to build.

    Raises:
        UsageError: timm cannot build it so.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.mean, config.std)
        options: dict[str, Any] = {}
        name = config.name.removeprefix(TIMM_PREFIX)
        if made_for(config.name).fixed_input_size:
            # timm's word for models that take `img_size`; the others take images as they come.
            options["img_size"] = config.image_size
        self.model = _create(config, name, options)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Returns logits (B, K), or pooled features (B, D) where K is 0.

        Args:
            images_B3HW: float32 in [0, 1], of the size that the model was made for.

        Raises:
            UsageError: the images have another shape.
        """
        check_images(images_B3HW, name=self.config.name, size=self.config.image_size)
        return self.model(self.normalise(images_B3HW))  # type: ignore[no-any-return]  # modules' calls are untyped


def build_ci2p_timm(config: CI2PTimmConfig) -> nn.Module:
    """Builds a timm Vision Transformer whose patch embedding is `CI2PPatchEmbed`.

    The model is timm's own, so timm's functions for its models work on it; `model.config` is the
    record.

    Raises:
        UsageError: the model's stem cannot be replaced, or timm cannot build it so.
    """
    name = config.name.removeprefix(CI2P_TIMM_PREFIX)
    _require_replaceable_stem(config.name, name)
    options = {
        "img_size": config.latent_size * DOWNSAMPLING,
        "in_chans": config.latent_channels,
        "embed_layer": CI2PPatchEmbed,
    }
    model = _create(config, name, options)
    model.config = config
    return cast("nn.Module", model)


@cache
def check_builds(config: TimmConfig | CI2PTimmConfig) -> None:
    """Refuses a record that timm cannot build, or whose model does not run; takes no memory.

    Built and run once on the meta device. What a model asks of its input (a window that divides
    it, a least size) shows only when it runs.

    Raises:
        UsageError: one of these, with what timm said.
    """
    if isinstance(config, TimmConfig):
        shape = (1, 3, config.image_size, config.image_size)
    else:
        shape = (1, config.latent_channels, config.latent_size, config.latent_size)
    # What is drawn on the meta device must not move the weights that are drawn later.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        model: nn.Module = (
            TimmClassifier(config) if isinstance(config, TimmConfig) else build_ci2p_timm(config)
        )
        try:
            out = tuple(model.eval()(torch.empty(shape)).shape)
        except _BUILD_ERRORS as error:
            raise UsageError(
                f"{config.name} does not run on {config.reads} {shape[1:]}: {_first_line(error)}",
                hint="encode the images at a size that the model takes, or choose another model",
            ) from error
    if len(out) != 2 or config.num_classes not in (0, out[1]):
        raise UsageError(
            f"{config.name} gives {out} for one image of {config.num_classes} classes; it is no "
            "classifier"
        )


def _create(config: TimmConfig | CI2PTimmConfig, name: str, options: dict[str, Any]) -> Any:
    """Builds timm's model `name`, refusing stochastic depth where it takes none."""
    import timm

    options = options | {"num_classes": config.num_classes, "pretrained": False}
    try:
        try:
            return timm.create_model(name, drop_path_rate=config.drop_path_rate, **options)
        except TypeError as error:
            # The only way to learn that the model's class has no such argument.
            if "drop_path_rate" not in str(error):
                raise
            _refuse_drop_path(config, error)
        return timm.create_model(name, **options)
    except UsageError:
        raise
    except _BUILD_ERRORS as error:
        raise UsageError(f"timm cannot build {config.name}: {_first_line(error)}") from error


def _refuse_drop_path(config: TimmConfig | CI2PTimmConfig, error: TypeError) -> None:
    if config.drop_path_rate:
        raise UsageError(
            f"{config.name} takes no stochastic depth; `drop_path_rate` is {config.drop_path_rate}",
            hint="set it to 0 (train: --drop-path 0)",
        ) from error


@cache
def _require_replaceable_stem(name: str, timm_name: str) -> None:
    """Raises UsageError unless it is a VisionTransformer with the plain patch embedding."""
    import timm
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = timm.create_model(timm_name, pretrained=False)
    if isinstance(model, VisionTransformer) and type(model.patch_embed) is PatchEmbed:
        return
    kind = type(model).__name__
    if isinstance(model, VisionTransformer):
        kind += f" with a {type(model.patch_embed).__name__}"
    raise UsageError(
        f"{name} is a {kind}, whose stem cannot be replaced by latents: that takes timm's "
        "VisionTransformer with its plain patch embedding (vit_*, deit_*, deit3_*), no hybrid, "
        "windowed or convolutional model",
        hint=f"{TIMM_PREFIX}{timm_name} trains it on the images",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
