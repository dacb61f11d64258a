"""The door to the models: their names, and the model or the record that a name stands for.

::

    name          width of the scales  blocks
    vit           768                  12      CI2P-ViT of the paper, arXiv 2502.10120
    vit_small     384                  12      ours
    vit_tiny      256                  12      ours
    vitds         192, 768             6 + 6   CI2P-ViTds of the paper
    vitds_small    96, 384             6 + 6   ours
    vitds_tiny     64, 256             6 + 6   ours
"""

from __future__ import annotations

import difflib

from torch import nn

from ci2p_cache.errors import UnknownModelError
from ci2p_cache.models.ci2p_vit import CI2PViT, ModelConfig

__all__ = ["build_model", "create_model", "list_models", "model_config"]

_EMBED_DIMS: dict[str, tuple[int, ...]] = {
    "vit": (768,),
    "vit_small": (384,),
    "vit_tiny": (256,),
    "vitds": (192, 768),
    "vitds_small": (96, 384),
    "vitds_tiny": (64, 256),
}
# Indexed by the number of scales.
_DEPTHS: dict[int, tuple[int, ...]] = {1: (12,), 2: (6, 6)}


def list_models() -> tuple[str, ...]:
    """Returns the names that `create_model` knows, sorted."""
    return tuple(sorted(_EMBED_DIMS))


def model_config(
    name: str,
    *,
    num_classes: int = 1000,
    latent_channels: int = 192,
    pos_embed: bool = False,
    latent_size: int = 16,
    drop_path_rate: float = 0.1,
) -> ModelConfig:
    """Returns the record of a model without building it; a checkpoint stores its `to_dict()`.

    Args:
        name: One of `list_models()`.
        num_classes: Number of classes; 0 gives pooled features instead of logits.
        latent_channels: M, the channels of the latents; 192 for CompressAI quality 1-5.
        pos_embed: Whether to add a learned positional embedding; the paper has none.
        latent_size: Rows and columns of the latents, image size / 16; only `pos_embed` uses it.
        drop_path_rate: Stochastic depth of the last block, 0 <= rate < 1; 0.1 is the paper's.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: an argument is of another type or out of range.
    """
    if name not in _EMBED_DIMS:
        names = list_models()
        close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
        raise UnknownModelError(
            f"no model is named {name!r}; the models are {', '.join(names)}",
            hint=f"did you mean {close[0]}?" if close else None,
        )
    widths = _EMBED_DIMS[name]
    return ModelConfig(
        name=name,
        embed_dims=widths,
        depths=_DEPTHS[len(widths)],
        num_classes=num_classes,
        latent_channels=latent_channels,
        pos_embed=pos_embed,
        latent_size=latent_size,
        drop_path_rate=drop_path_rate,
    )


def build_model(config: ModelConfig) -> nn.Module:
    """Builds the model of a record, freshly initialised, in training mode on the default device.

    The weights are a pure function of torch's global seed: `torch.manual_seed` before this call
    gives the same weights again, on one version of torch and timm. `model.config` is the record.
    """
    return CI2PViT(config)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    latent_channels: int = 192,
    pos_embed: bool = False,
    latent_size: int = 16,
    drop_path_rate: float = 0.1,
) -> nn.Module:
    """Builds a model: latents (B, M, h, w), h and w even, to logits (B, num_classes).

    ::

        model = create_model("vitds", num_classes=10)
        logits = model(batch.latents)

    Args:
        name: One of `list_models()`.
        num_classes: Number of classes; 0 gives pooled features (B, D) instead of logits.
        latent_channels: M, the channels of the latents; 192 for CompressAI quality 1-5.
        pos_embed: Whether to add a learned positional embedding; the paper has none.
        latent_size: Rows and columns of the latents, image size / 16; only `pos_embed` uses it.
        drop_path_rate: Stochastic depth of the last block, 0 <= rate < 1; 0.1 is the paper's.

    Returns:
        A module in training mode on the default device, its weights a pure function of torch's
        global seed; `model.config` is its `ModelConfig`.

    Raises:
        UnknownModelError: no model has that name.
        UsageError: an argument is of another type or out of range.
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
