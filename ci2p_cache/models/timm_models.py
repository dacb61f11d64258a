"""timm's models built from their records: `timm:<name>` on images, `ci2p+timm:<name>` on latents.

None is pretrained. What timm cannot build (Wightman, "PyTorch image models",
https://github.com/huggingface/pytorch-image-models) is refused before anything is trained.

`CI2PPatchEmbed`: PatchReshape in the place of a patch embedding, for timm's VisionTransformer.

::

    from timm.models import VisionTransformer
    model = VisionTransformer(img_size=256, in_chans=192, embed_layer=CI2PPatchEmbed, embed_dim=384)
    logits = model(latents)                    # (B, 192, 16, 16), what the encoder gives at 256 px

Shape suffixes: B batch, M latent channels, D width of a token, H and W rows and columns of the
latents, N tokens in row-major order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UnknownModelError, UsageError
from ci2p_cache.models.baselines import Normalise, check_images
from ci2p_cache.models.ci2p_vit import (
    PatchReshape,
    check_fields,
    check_latents,
    init_convolutions,
    to_tokens,
)
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = [
    "CI2P_TIMM_PREFIX",
    "TIMM_PREFIX",
    "CI2PPatchEmbed",
    "CI2PTimmConfig",
    "TimmClassifier",
    "TimmConfig",
    "build_ci2p_timm",
    "check_builds",
    "timm_config",
]

_IMAGE_CHANNELS = 3


class CI2PPatchEmbed(nn.Module):
    """Turns latents (B, M, H, W) into the tokens (B, N, D) of a Vision Transformer, N = H * W / 4.

    The PatchReshape of CI2P-ViT (Zhao and Sun, arXiv 2502.10120), which halves the latents: a token
    stands for 32 x 32 pixels, whatever patches the model was made for. Takes the arguments that
    timm's VisionTransformer gives its `embed_layer`, and has the attributes that it reads. Its
    convolutions keep their own initialisation, whichever the transformer has.

    Args:
        img_size: Rows and columns of the *images* in pixels, multiples of 32; the latents have a
            sixteenth of them. None: any size, for transformers without positional embedding.
        patch_size: Unused; it is always 32 pixels.
        in_chans: M, channels of the latents; 192 for CompressAI quality 1-5.
        embed_dim: D.
        norm_layer: Makes what normalises the tokens, from D; None: nothing does.
        flatten: Whether to give tokens (B, N, D) instead of a map (B, D, H / 2, W / 2).
        output_fmt: timm's name of the order of the axes, instead of `flatten`: NCHW, NHWC or NLC.
        bias: Unused; PatchReshape ends in a BatchNorm, which has one.
        strict_img_size: Whether latents of another size than that of `img_size` are refused.
        dynamic_img_pad: Must be False; latents of an odd size are refused, not padded.
        device: Where the weights are made; None: on the default device.
        dtype: Of the weights; None: float32.

    Raises:
        UsageError: a size is not a multiple of 32, padding is asked for, or `in_chans` is 3.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 256,
        patch_size: int | tuple[int, int] = SIZE_MULTIPLE_PX,
        in_chans: int = 192,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_chans == _IMAGE_CHANNELS:
            raise UsageError(
                "`in_chans` is 3, the channels of an image; CI2PPatchEmbed reads latents, of 192 "
                "channels behind CompressAI quality 1-5 and 320 behind 6-8"
            )
        if dynamic_img_pad:
            raise UsageError("`dynamic_img_pad` is True; CI2PPatchEmbed does not pad latents")
        self.in_chans = in_chans
        self.patch_size = (SIZE_MULTIPLE_PX, SIZE_MULTIPLE_PX)
        self.strict_img_size = strict_img_size
        self.flatten = flatten and output_fmt is None
        from timm.layers.format import Format

        self.output_fmt = Format(output_fmt or "NCHW")
        self.set_input_size(img_size)
        self.reshape = PatchReshape(in_chans, embed_dim, halve=True).to(device, dtype)
        self.norm = norm_layer(embed_dim).to(device, dtype) if norm_layer else nn.Identity()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Sets which latents are taken; no weight depends on it.

        Args:
            img_size: As on construction; None: any size.
            patch_size: Unused.

        Raises:
            UsageError: a size is no positive multiple of 32.
        """
        self.img_size: tuple[int, int] | None = None
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        if img_size is None:
            return
        from timm.layers.helpers import to_2tuple

        height, width = to_2tuple(img_size)
        if min(height, width) < 1 or height % SIZE_MULTIPLE_PX or width % SIZE_MULTIPLE_PX:
            raise UsageError(
                f"`img_size` is {img_size}; it must be a positive multiple of {SIZE_MULTIPLE_PX} "
                "pixels"
            )
        self.img_size = (height, width)
        self.grid_size = (height // SIZE_MULTIPLE_PX, width // SIZE_MULTIPLE_PX)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def init_weights(self) -> None:
        """Draws the convolutions again; timm calls it after it has drawn them its own way."""
        init_convolutions(self.reshape)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Returns the side of a token in pixels, or without `as_scalar` its rows and columns."""
        return SIZE_MULTIPLE_PX if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Returns rows and columns of tokens for rows and columns of the model's input: latents."""
        return img_size[0] // 2, img_size[1] // 2

    def forward(self, latents_BMHW: Tensor) -> Tensor:
        """Returns the tokens, (B, N, D) unless another order was asked for.

        Args:
            latents_BMHW: y, dequantised, (B, M, H, W) of the dtype of the weights.

        Raises:
            UsageError: there are not four dimensions and M channels, H or W is odd or 0, or the
                size is not that of `img_size`.
        """
        self._check(tuple(latents_BMHW.shape))
        maps_BDHW = self.reshape(latents_BMHW)
        if self.flatten or self.output_fmt == "NLC":
            tokens = to_tokens(maps_BDHW)
        elif self.output_fmt == "NHWC":
            tokens = maps_BDHW.permute(0, 2, 3, 1)
        else:
            tokens = maps_BDHW
        return self.norm(tokens)  # type: ignore[no-any-return]  # modules' calls are untyped

    def _check(self, shape: tuple[int, ...]) -> None:
        check_latents(shape, name="CI2PPatchEmbed", channels=self.in_chans)
        if self.img_size is None or not self.strict_img_size:
            return
        wanted = tuple(side // DOWNSAMPLING for side in self.img_size)
        if shape[2:] != wanted:
            raise UsageError(
                f"CI2PPatchEmbed was made for {wanted[0]}x{wanted[1]} latents, those of "
                f"{self.img_size[0]}x{self.img_size[1]} px; got {shape[2]}x{shape[3]}"
            )


TIMM_PREFIX = "timm:"
"""Prefix of timm's classifiers on images."""
CI2P_TIMM_PREFIX = "ci2p+timm:"
"""Prefix of timm's Vision Transformers on latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmConfig(Record):
    """What fixes a timm classifier on images, for one version of timm; see `ModelConfig` too."""

    kind: Literal["timm"] = "timm"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    name: str
    """`timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    image_size: int = 256
    """Side of the square image in pixels."""
    drop_path_rate: float = 0.1
    """Stochastic depth as the model takes it; 0 where it takes none."""
    mean: tuple[float, ...]
    """Means of the three channels, subtracted from images in [0, 1]; timm's for this model."""
    std: tuple[float, ...]
    """Deviation of the three channels, which they are divided by; timm's for this model."""
    reads: ClassVar[Literal["images"]] = "images"

    def __post_init__(self) -> None:
        check_fields(self, image_size=(SIZE_MULTIPLE_PX, SIZE_MULTIPLE_PX))
        _require_known(self.name, TIMM_PREFIX)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"`mean` is {self.mean} and `std` {self.std}; three numbers each are wanted, those "
                "of `std` positive"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CI2PTimmConfig(Record):
    """What fixes a timm Vision Transformer on latents; see `ModelConfig` too."""

    kind: Literal["ci2p_timm"] = "ci2p_timm"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    name: str
    """`ci2p+timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    latent_channels: int = 192
    latent_size: int = 16
    """Rows and columns of the latents (16 at 256 px), even; fixes the positional embedding."""
    drop_path_rate: float = 0.1
    reads: ClassVar[Literal["latents"]] = "latents"

    def __post_init__(self) -> None:
        check_fields(self, latent_channels=(1, 1), latent_size=(2, 2))
        _require_known(self.name, CI2P_TIMM_PREFIX)


def timm_config(
    name: str, *, num_classes: int, latent_channels: int, latent_size: int, drop_path_rate: float
) -> TimmConfig | CI2PTimmConfig:
    """Returns the record of a timm model; all is as for `registry.model_config`."""
    common: dict[str, Any] = {
        "name": name, "num_classes": num_classes, "drop_path_rate": drop_path_rate
    }  # fmt: skip
    if name.startswith(CI2P_TIMM_PREFIX):
        return CI2PTimmConfig(**common, latent_channels=latent_channels, latent_size=latent_size)
    _require_known(name, TIMM_PREFIX)
    inputs = _made_for(name)
    return TimmConfig(
        **common,
        image_size=latent_size * DOWNSAMPLING,
        mean=tuple(inputs.mean),
        std=tuple(inputs.std),
    )


def _made_for(name: str) -> Any:
    """Returns what timm records of the input of a model that it knows: size, mean, deviation."""
    import timm

    return timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))


def _require_known(name: object, prefix: str) -> None:
    """Raises UnknownModelError unless timm lists the name behind the prefix.

    Only listed names reach timm, which takes others for addresses of models to fetch.
    """
    import timm

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


_BUILD_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What timm's models raise for a size or an option that they cannot have."""


class TimmClassifier(nn.Module):
    """Any timm classifier, not pretrained: images (B, 3, H, W) to logits (B, K).

    Raises:
        UsageError: timm cannot build it so.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.mean, config.std)
        options: dict[str, Any] = {}
        name = config.name.removeprefix(TIMM_PREFIX)
        if _made_for(config.name).fixed_input_size:
            # timm's word for models that take `img_size`; the others take images as they come.
            options["img_size"] = config.image_size
        self.model = _create(config, name, options)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Returns logits (B, K), or pooled features (B, D) where K is 0.

        Raises:
            UsageError: the images have another shape.
        """
        check_images(images_B3HW, name=self.config.name, size=self.config.image_size)
        return self.model(self.normalise(images_B3HW))  # type: ignore[no-any-return]  # modules' calls are untyped


def build_ci2p_timm(config: CI2PTimmConfig) -> nn.Module:
    """Builds a timm Vision Transformer whose patch embedding is `CI2PPatchEmbed`.

    The model is timm's own, so timm's functions for its models work on it; `model.config` is the
    record. UsageError where the model's stem cannot be replaced, or timm cannot build it so.
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
        UsageError: one of these, with timm's message.
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
            if config.drop_path_rate:
                raise UsageError(
                    f"{config.name} takes no stochastic depth; `drop_path_rate` is "
                    f"{config.drop_path_rate}",
                    hint="set it to 0 (train: --drop-path 0)",
                ) from error
        return timm.create_model(name, **options)
    except UsageError:
        raise
    except _BUILD_ERRORS as error:
        raise UsageError(f"timm cannot build {config.name}: {_first_line(error)}") from error


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
        f"{name} is a {kind}, whose stem cannot be replaced by latents; wanted timm's "
        "VisionTransformer with its plain patch embedding (vit_*, deit_*, deit3_*)",
        hint=f"{TIMM_PREFIX}{timm_name} trains it on the images",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
