"""Models on images: `PixelViT` and `CnnViT`, which CI2P is compared with, and `EncoderViT`.

The last is CI2P with its encoder unfrozen. Beside the models are their records.

Images are float32 in [0, 1], as `PixelLoader` gives them; what normalises them is in the model.

Shape suffixes: B batch, H and W rows and columns of an image, D width, N tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UsageError
from ci2p_cache.gdn import AnalysisTransform
from ci2p_cache.models.ci2p_vit import (
    LAYER_NORM_EPS,
    CI2PViT,
    ModelConfig,
    check_fields,
    classification_head,
    drop_path_rates,
    to_tokens,
    transformer_blocks,
)
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = [
    "CnnViT",
    "CnnViTConfig",
    "EncoderViT",
    "EncoderViTConfig",
    "Normalise",
    "PixelViT",
    "PixelViTConfig",
    "check_images",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Means of ImageNet's channels in [0, 1], as torchvision's and most of timm's models use them."""
IMAGENET_STD = (0.229, 0.224, 0.225)

_PATCH_PX = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelViTConfig(Record):
    """Everything that fixes the tensors of a `PixelViT`; the rest is as in `ModelConfig`."""

    kind: Literal["pixel_vit"] = "pixel_vit"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    name: str
    embed_dim: int
    """D, width of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_classes: int = 1000
    image_size: int = 256
    """Side of the square image in pixels, a multiple of 16; fixes the positional embedding."""
    drop_path_rate: float = 0.1

    reads: ClassVar[Literal["images"]] = "images"
    """What the model takes: images in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self, embed_dim=(1, 1), depth=(1, 1), image_size=(_PATCH_PX, _PATCH_PX))


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnViTConfig(Record):
    """Everything that fixes the tensors of a `CnnViT`; the rest is as in `ModelConfig`."""

    kind: Literal["cnn_vit"] = "cnn_vit"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    name: str
    embed_dim: int
    """D, width of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_classes: int = 1000
    encoder_width: int = 128
    """N of the trainable g_a; that of CompressAI quality 1-5, the paper's."""
    latent_channels: int = 192
    """M of the trainable g_a; that of CompressAI quality 1-5, the paper's."""
    pos_embed: bool = False
    image_size: int = 256
    """Side of the square image that `pos_embed` is made for, in pixels; else unused."""
    drop_path_rate: float = 0.1

    reads: ClassVar[Literal["images"]] = "images"
    """What the model takes: images in [0, 1]."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("embed_dim", "depth", "encoder_width", "latent_channels"), (1, 1))
        check_fields(self, **sizes, image_size=(SIZE_MULTIPLE_PX, SIZE_MULTIPLE_PX))

    @property
    def latent(self) -> ModelConfig:
        """The model behind the encoder."""
        return ModelConfig(
            name=self.name,
            embed_dims=(self.embed_dim,),
            depths=(self.depth,),
            num_classes=self.num_classes,
            latent_channels=self.latent_channels,
            pos_embed=self.pos_embed,
            latent_size=self.image_size // DOWNSAMPLING,
            drop_path_rate=self.drop_path_rate,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderViTConfig(Record):
    """Everything that fixes the tensors of an `EncoderViT`."""

    kind: Literal["encoder_vit"] = "encoder_vit"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    latent: ModelConfig
    """The model behind the encoder."""
    encoder_width: int = 128
    """N of g_a; that of CompressAI quality 1-5, the paper's."""

    reads: ClassVar[Literal["images"]] = "images"
    """What the model takes: images in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self, encoder_width=(1, 1))

    @property
    def name(self) -> str:
        """Name of the model behind the encoder."""
        return self.latent.name

    @property
    def num_classes(self) -> int:
        """Its number of classes."""
        return self.latent.num_classes

    @property
    def drop_path_rate(self) -> float:
        """Its stochastic depth."""
        return self.latent.drop_path_rate

    @property
    def depths(self) -> tuple[int, ...]:
        """Its blocks."""
        return self.latent.depths


class Normalise(nn.Module):
    """Takes images in [0, 1] to what a model was made for: (images - mean) / std, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Constants of the record, not weights: no checkpoint holds them.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Returns the normalised images."""
        return (images_B3HW - self.mean) / self.std


class PixelViT(nn.Module):
    """ViT on patches of 16 pixels, as the paper compares with: images (B, 3, H, W) to logits.

    Dosovitskiy et al. 2021, arXiv 2010.11929, with a learned positional embedding (truncated normal
    of deviation 0.02), without class token, with mean pooling. Blocks, final LayerNorm and head are
    those of CI2P-ViT. The patch embedding is drawn from Xavier's uniform as the linear layer that
    it is, with bias 0 (our choice: not specified anywhere).
    """

    def __init__(self, config: PixelViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
        self.patch_embed = nn.Conv2d(3, width, _PATCH_PX, stride=_PATCH_PX)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]  # torch's stub: may be None
        num_tokens = (config.image_size // _PATCH_PX) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = drop_path_rates(config.drop_path_rate, config.depth)
        self.blocks = transformer_blocks(width, rates)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = classification_head(width, config.num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Returns logits (B, K), or pooled features (B, D) where K is 0.

        Raises:
            UsageError: the images have another shape.
        """
        config = self.config
        check_images(images_B3HW, name=config.name, size=config.image_size)
        tokens_BND = to_tokens(self.patch_embed(self.normalise(images_B3HW))) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens_BND)).mean(dim=1))  # type: ignore[no-any-return]  # modules' calls are untyped


class EncoderViT(nn.Module):
    """An encoder and the model on its latents, trained together.

    ::

        images in [0, 1] -> AnalysisTransform /16 -> y -> CI2PViT -> logits

    y is not rounded, which would have no gradient. Like the frozen encoder it takes images without
    mean and deviation. H and W are multiples of 32 and otherwise free, unless there is a positional
    embedding.
    """

    def __init__(self, config: EncoderViTConfig | CnnViTConfig) -> None:
        super().__init__()
        self.config = config
        self.g_a = AnalysisTransform(config.encoder_width, config.latent.latent_channels)
        self.vit = CI2PViT(config.latent)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Returns logits (B, K), or pooled features (B, D) where K is 0.

        Raises:
            UsageError: there are not four dimensions and three channels, H or W is no multiple of
                32, or the positional embedding was made for another size.
        """
        check_images(images_B3HW, name=self.config.name)
        return self.vit(self.g_a(images_B3HW))  # type: ignore[no-any-return]  # modules' calls are untyped


class CnnViT(EncoderViT):
    """The paper's control CNN-ViT, as we read it: a trainable g_a, then CI2P-ViT.

    The summary of arXiv 2502.10120 names it and its published code lacks it. Ours: the topology of
    the frozen encoder, drawn at random and trained with the rest.
    """


def check_images(images: Tensor, *, name: str, size: int | None = None) -> None:
    """Refuses images that a model cannot take, `name` and `size` being the model's.

    Raises:
        UsageError: there are not four dimensions and three channels, or the sides are not `size`,
            or, where that is None, no multiples of 32.
    """
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[1] == 3
    if fits and size is not None:
        fits = shape[2:] == (size, size)
    elif fits:
        fits = all(side > 0 and not side % SIZE_MULTIPLE_PX for side in shape[2:])
    if fits:
        return
    sides = f"{size}, {size}" if size else f"multiples of {SIZE_MULTIPLE_PX}"
    raise UsageError(f"{name} reads images (batch, 3, {sides}), got {shape}")
