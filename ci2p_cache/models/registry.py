"""The door to the models: their names, and the model or the record that a name stands for.

::

    name            reads    width of the scales  blocks
    vit             latents  768                  12      CI2P-ViT of the paper, arXiv 2502.10120
    vit_small       latents  384                  12      ours
    vit_tiny        latents  256                  12      ours
    vitds           latents  192, 768             6 + 6   CI2P-ViTds of the paper
    vitds_small     latents   96, 384             6 + 6   ours
    vitds_tiny      latents   64, 256             6 + 6   ours
    cnn_vit         images   768                  12      a trainable g_a, then `vit`
    cnn_vit_small   images   384                  12      a trainable g_a, then `vit_small`
    cnn_vit_tiny    images   256                  12      a trainable g_a, then `vit_tiny`
    vit_b16         images   768                  12      ViT-B/16, what the paper compares with
    vit_s16         images   384                  12      ViT-S/16
    vit_ti16        images   192                  12      ViT-Ti/16
    timm:NAME       images                                any classifier of timm, not pretrained
    ci2p+timm:NAME  latents                               a ViT or DeiT of timm, its patch embedding
                                                          replaced by PatchReshape
    FILE.py:NAME    either                                a class or function of the user's own
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from ci2p_cache.errors import ManifestError, UnknownModelError, UsageError
from ci2p_cache.imported import pinned_location
from ci2p_cache.models.baselines import (
    CnnViT,
    CnnViTConfig,
    EncoderViT,
    EncoderViTConfig,
    PixelViT,
    PixelViTConfig,
)
from ci2p_cache.models.ci2p_vit import CI2PViT, ModelConfig
from ci2p_cache.models.own_models import OwnConfig, OwnModel, own_config
from ci2p_cache.models.timm_models import (
    CI2P_TIMM_PREFIX,
    TIMM_PREFIX,
    CI2PTimmConfig,
    TimmClassifier,
    TimmConfig,
    build_ci2p_timm,
    check_builds,
    timm_config,
)
from ci2p_cache.specs import DOWNSAMPLING

__all__ = [
    "AnyModelConfig",
    "build_model",
    "config_from_dict",
    "create_model",
    "list_models",
    "model_config",
]

AnyModelConfig = (
    ModelConfig
    | PixelViTConfig
    | CnnViTConfig
    | EncoderViTConfig
    | TimmConfig
    | CI2PTimmConfig
    | OwnConfig
)
"""The record of any model; each has `name`, `num_classes` and `reads`."""

_SCALES: dict[str, tuple[tuple[int, int], ...]] = {
    "vit": ((768, 12),),
    "vit_small": ((384, 12),),
    "vit_tiny": ((256, 12),),
    "vitds": ((192, 6), (768, 6)),
    "vitds_small": ((96, 6), (384, 6)),
    "vitds_tiny": ((64, 6), (256, 6)),
}
"""Name -> (width, number of blocks) of each scale."""

_CNN_DIMS = {"cnn_vit": 768, "cnn_vit_small": 384, "cnn_vit_tiny": 256}
_PIXEL_DIMS = {"vit_b16": 768, "vit_s16": 384, "vit_ti16": 192}
"""Dosovitskiy et al. 2021 (B) and Touvron et al. 2021, arXiv 2012.12877 (S, Ti)."""

_KINDS: dict[str, tuple[type[AnyModelConfig], Callable[[Any], nn.Module]]] = {
    # CI2P's own record is older than the other kinds, and has no such field.
    "": (ModelConfig, CI2PViT),
    "pixel_vit": (PixelViTConfig, PixelViT),
    "cnn_vit": (CnnViTConfig, CnnViT),
    # Of no name: `train --train-encoder` puts the cache's encoder in front of `vit` and `vitds`.
    "encoder_vit": (EncoderViTConfig, EncoderViT),
    "timm": (TimmConfig, TimmClassifier),
    "ci2p_timm": (CI2PTimmConfig, build_ci2p_timm),
    "own": (OwnConfig, OwnModel),
}
"""`kind` of a record -> its class, and what builds its model."""


def list_models(reads: Literal["latents", "images"] | None = None) -> tuple[str, ...]:
    """Returns our own names that `create_model` knows, sorted.

    It also knows `timm:NAME` and `ci2p+timm:NAME`; `timm.list_models()` has the names.

    Args:
        reads: Those that read latents or images only; None: all.
    """
    latents, images = sorted(_SCALES), sorted((*_CNN_DIMS, *_PIXEL_DIMS))
    chosen = {"latents": latents, "images": images, None: sorted([*latents, *images])}
    return tuple(chosen[reads])


def model_config(
    name: str,
    *,
    num_classes: int = 1000,
    latent_channels: int = 192,
    pos_embed: bool = False,
    latent_size: int = 16,
    drop_path_rate: float = 0.1,
) -> AnyModelConfig:
    """Returns the record of a model without building it; a checkpoint stores its `to_dict()`.

    Arguments are as for `create_model`. A model of timm is built and run once on the meta device,
    to refuse what timm cannot build; one of `FILE.py:NAME` on the CPU, with two inputs.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: an argument is of another type or out of range, or the model cannot be built or
            does not run.
        RunMismatchError: `name` ends in `#` and another sha256 than the file has.
    """
    if pinned_location(str(name)) is not None:
        return own_config(
            name, num_classes=num_classes, latent_channels=latent_channels, pos_embed=pos_embed,
            latent_size=latent_size, drop_path_rate=drop_path_rate,
        )  # fmt: skip
    is_timm = str(name).startswith((TIMM_PREFIX, CI2P_TIMM_PREFIX))
    if pos_embed is True and (is_timm or name in _PIXEL_DIMS):
        raise UsageError(
            f"`pos_embed` is True; {name} comes with its own positional embedding, if any",
            hint="leave it out (train: without --pos-embed)",
        )
    common: dict[str, Any] = {
        "name": name, "num_classes": num_classes, "drop_path_rate": drop_path_rate
    }  # fmt: skip
    if is_timm:
        config = timm_config(**common, latent_channels=latent_channels, latent_size=latent_size)
        check_builds(config)
        return config
    image_size = latent_size * DOWNSAMPLING
    if name in _PIXEL_DIMS:
        return PixelViTConfig(**common, embed_dim=_PIXEL_DIMS[name], image_size=image_size)
    if name in _CNN_DIMS:
        return CnnViTConfig(
            **common, embed_dim=_CNN_DIMS[name], pos_embed=pos_embed, image_size=image_size
        )
    if name not in _SCALES:
        names = list_models()
        close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
        raise UnknownModelError(
            f"no model is named {name!r}; the models are {', '.join(names)}, {TIMM_PREFIX}NAME, "
            f"{CI2P_TIMM_PREFIX}NAME and FILE.py:NAME",
            hint=f"did you mean {close[0]}?" if close else None,
        )
    widths, depths = zip(*_SCALES[name], strict=True)
    return ModelConfig(
        **common,
        embed_dims=widths,
        depths=depths,
        latent_channels=latent_channels,
        pos_embed=pos_embed,
        latent_size=latent_size,
    )


def config_from_dict(data: Any) -> AnyModelConfig:
    """Rebuilds the record of any model from its `to_dict()`, what `model.json` holds as "model".

    Raises:
        ManifestError: it is not a model's record, has another version, or is damaged.
    """
    kind = data.get("kind", "") if isinstance(data, Mapping) else ""
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ManifestError(
            f"model record `kind` is {str(kind)[:40]!r}; this ci2p-cache reads "
            f"{', '.join(filter(None, _KINDS))}"
        )
    return _KINDS[kind][0].from_dict(data)


def build_model(config: AnyModelConfig) -> nn.Module:
    """Builds the model of a record, freshly initialised, in training mode on the default device.

    The weights are a pure function of torch's global seed: `torch.manual_seed` before this call
    gives the same weights again, on one version of torch and timm. `model.config` is the record.

    Raises:
        UsageError: the installed timm, or the user's own code, cannot build it.
        RefusedError: it is a model of the user's own, and its file was not named.
    """
    return _KINDS[getattr(config, "kind", "")][1](config)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    latent_channels: int = 192,
    pos_embed: bool = False,
    latent_size: int = 16,
    drop_path_rate: float = 0.1,
) -> nn.Module:
    """Builds a model: latents (B, M, h, w), or images (B, 3, H, W) in [0, 1], to logits (B, K).

    All are float32. CI2P-ViT and CI2P-ViTds are those of Zhao and Sun, arXiv 2502.10120; ViTs on
    images those of Dosovitskiy et al. 2021, arXiv 2010.11929, and Touvron et al. 2021, arXiv
    2012.12877.

    ::

        model = create_model("vitds", num_classes=10)
        logits = model(batch.latents)
        model = create_model("ci2p+timm:deit_small_patch16_224", num_classes=10)

    Args:
        name: One of `list_models()`, `timm:` or `ci2p+timm:` and a name of timm's, or
            `FILE.py:NAME`: a class or function of your own, whose attribute `reads` says "latents"
            or "images". It is called with those of these arguments that it takes, and `image_size`.
        num_classes: Number of classes; 0 gives pooled features (B, D) instead of logits.
        latent_channels: M, the channels of the latents; 192 for CompressAI quality 1-5, 320 for
            6-8. Models on images do not look at it.
        pos_embed: Whether to add a learned positional embedding; the paper has none. ViTs on images
            and timm's models have their own ways, and refuse it.
        latent_size: Rows and columns of the latents, image size / 16; fixes positional embeddings,
            and the image size of models on images.
        drop_path_rate: Stochastic depth of the last block, 0 <= rate < 1; 0.1 is the paper's.

    Returns:
        A module in training mode on the default device, its weights a pure function of torch's
        global seed; `model.config` is its record, and `model.config.reads` says what it takes.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: an argument is of another type or out of range, or the model cannot be built or
            does not run.
        RunMismatchError: `name` ends in `#` and another sha256 than the file has.
    """
    config = model_config(
        name,
        num_classes=num_classes,
        latent_channels=latent_channels,
        pos_embed=pos_embed,
        latent_size=latent_size,
        drop_path_rate=drop_path_rate,
    )
    return build_model(config)
