"""timm's classifiers under our names: `timm:<name>` on images, `ci2p+timm:<name>` on latents.

None is pretrained. Which names there are, and what they build, depends on the installed timm
(Wightman, https://github.com/huggingface/pytorch-image-models); `timm.list_models()` lists them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ci2p_cache.errors import UnknownModelError, UsageError
from ci2p_cache.models.baselines import Normalise, check_images
from ci2p_cache.models.fields import (
    require_integer,
    require_name,
    require_rate,
    require_version,
)
from ci2p_cache.models.patch_embed import CI2PPatchEmbed
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = [
    "CI2P_TIMM_PREFIX",
    "TIMM_PREFIX",
    "CI2PTimmConfig",
    "TimmClassifier",
    "TimmConfig",
    "build_ci2p_timm",
    "check_builds",
    "timm_config",
]

TIMM_PREFIX = "timm:"
CI2P_TIMM_PREFIX = "ci2p+timm:"

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmConfig(Record):
    """What fixes the tensors of a timm classifier on images, for one version of timm."""

    kind: Literal["timm"] = "timm"
    """What `config_from_dict` tells records apart by."""
    version: int = 1
    """Version of this record."""
    name: str
    """`timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    """K; 0 leaves the classification head out, and the model gives pooled features."""
    image_size: int = 256
    """Side of the square image in pixels."""
    drop_path_rate: float = 0.1
    """Stochastic depth as the model takes it; 0 where it takes none."""
    mean: tuple[float, ...]
    """Of the three channels, subtracted from images in [0, 1]; timm's for this model."""
    std: tuple[float, ...]
    """Deviation of the three channels, which they are divided by; timm's for this model."""

    def __post_init__(self) -> None:
        require_version(self.version, 1)
        _require_known(self.name, TIMM_PREFIX)
        require_integer(self, "num_classes", 0)
        require_integer(self, "image_size", SIZE_MULTIPLE_PX, multiple_of=SIZE_MULTIPLE_PX)
        require_rate(self, "drop_path_rate")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"`mean` is {self.mean} and `std` {self.std}; three numbers each are wanted, those "
                "of `std` positive"
            )

    @property
    def reads(self) -> Literal["images"]:
        """What the model takes: images in [0, 1]."""
        return "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class CI2PTimmConfig(Record):
    """What fixes the tensors of a timm Vision Transformer on latents, for one version of timm."""

    kind: Literal["ci2p_timm"] = "ci2p_timm"
    """What `config_from_dict` tells records apart by."""
    version: int = 1
    """Version of this record."""
    name: str
    """`ci2p+timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    """K; 0 leaves the classification head out, and the model gives pooled features."""
    latent_channels: int = 192
    """M; 192 is the paper's (CompressAI quality 1-5), 320 that of quality 6-8."""
    latent_size: int = 16
    """Rows and columns of the latents (16 at 256 px), even; fixes the positional embedding."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0 at the first."""

    def __post_init__(self) -> None:
        require_version(self.version, 1)
        _require_known(self.name, CI2P_TIMM_PREFIX)
        require_integer(self, "num_classes", 0)
        require_integer(self, "latent_channels", 1)
        require_integer(self, "latent_size", 2, multiple_of=2)
        require_rate(self, "drop_path_rate")

    @property
    def reads(self) -> Literal["latents"]:
        """What the model takes: dequantised latents."""
        return "latents"


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
        if _pretrained_cfg(name).fixed_input_size:
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


def timm_config(
    name: str,
    *,
    num_classes: int,
    latent_channels: int,
    latent_size: int,
    drop_path_rate: float,
) -> TimmConfig | CI2PTimmConfig:
    """Returns the record of a timm model; arguments as for `registry.model_config`.

    Raises:
        UnknownModelError: timm has no model of that name.
        UsageError: an argument is of another type or out of range.
    """
    if name.startswith(CI2P_TIMM_PREFIX):
        return CI2PTimmConfig(
            name=name,
            num_classes=num_classes,
            latent_channels=latent_channels,
            latent_size=latent_size,
            drop_path_rate=drop_path_rate,
        )
    _require_known(name, TIMM_PREFIX)
    made_for = _pretrained_cfg(name.removeprefix(TIMM_PREFIX))
    return TimmConfig(
        name=name,
        num_classes=num_classes,
        image_size=latent_size * DOWNSAMPLING,
        drop_path_rate=drop_path_rate,
        mean=tuple(made_for.mean),
        std=tuple(made_for.std),
    )


def build_ci2p_timm(config: CI2PTimmConfig) -> VisionTransformer:
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
    return cast("VisionTransformer", model)


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


def _require_known(name: object, prefix: str) -> None:
    """Raises UnknownModelError unless timm lists the name behind the prefix.

    Only listed names reach timm, which takes others for addresses of models to fetch.
    """
    require_name(name)
    known, timm_name = timm.list_models(), str(name).removeprefix(prefix)
    if str(name).startswith(prefix) and timm_name in known:
        return
    # Names are long: the beginning of one is nearer to short others than to itself.
    begun = [each for each in known if timm_name and each.startswith(timm_name)]
    close = begun[:3] or difflib.get_close_matches(timm_name.lower(), known, n=3, cutoff=0.5)
    raise UnknownModelError(
        f"no model is named {name!r}: timm {timm.__version__} has no {timm_name!r}"
        + (" (give it without the tag of pretrained weights)" if "." in timm_name else ""),
        hint=f"did you mean {', '.join(prefix + each for each in close)}?" if close else None,
    )


def _pretrained_cfg(name: str) -> Any:
    """Returns what timm records of a model's input: size, mean, deviation."""
    return timm.get_pretrained_cfg(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
