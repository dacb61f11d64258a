"""CI2P-ViT and CI2P-ViTds: Vision Transformers whose input is the latents of a frozen encoder.

Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120. The blocks are
those of Dosovitskiy et al. 2021 (arXiv 2010.11929), with stochastic depth (Huang et al. 2016, arXiv
1603.09382), as timm builds them.

Shape suffixes: B batch, M latent channels, D width of a token, H and W rows and columns of a map,
N = H * W tokens in row-major order, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = [
    "LAYER_NORM_EPS",
    "CI2PViT",
    "ModelConfig",
    "PatchReshape",
    "check_fields",
    "check_latents",
    "classification_head",
    "drop_path_rates",
    "init_convolutions",
    "to_tokens",
    "transformer_blocks",
]


def check_fields(record: Any, **integers: tuple[int, int]) -> None:
    """Refuses a model's record one of whose fields is of another type or out of range.

    Args:
        record: Its version, name, rate and, where it has them, flag are checked, and `num_classes`.
        integers: Its other integers by name: the lowest value, and what it is a multiple of.

    Raises:
        UsageError: names the field and what it wants.
    """
    if record.version != 1:
        raise UsageError(
            f"model record `version` is {record.version!r}; this ci2p-cache reads 1, so use the "
            "version that wrote it"
        )
    if type(record.name) is not str:
        raise UsageError(f"model `name` is {record.name!r}; it must be a string")
    for field, (lowest, factor) in {"num_classes": (0, 1), **integers}.items():
        value = getattr(record, field)
        if type(value) is not int or value < lowest:
            raise UsageError(f"`{field}` is {value!r}; it must be an integer >= {lowest}")
        if value % factor:
            raise UsageError(f"`{field}` is {value}; it must be a multiple of {factor}")
    if type(flag := getattr(record, "pos_embed", False)) is not bool:
        raise UsageError(f"`pos_embed` is {flag!r}; it must be True or False")
    rate = record.drop_path_rate
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise UsageError(f"`drop_path_rate` is {rate!r}; wanted 0 <= rate < 1")


def _inverted_residual(
    in_channels: int, out_channels: int, expansion: int, *, kernel_size: int, stride: int
) -> nn.Module:
    """Returns one MobileNetV3 block; its residual exists where the map keeps its shape.

    The depthwise convolution, with an odd kernel padded by half of it, has `expansion` times
    `in_channels`; timm rounds that to a multiple of 8, which changes nothing for `in_channels`
    divisible by 4.
    """
    from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

    # timm calls `se_layer` and annotates it as a class.
    squeeze_excite = cast(
        "type[nn.Module]",
        partial(SqueezeExcite, rd_ratio=0.25, force_act_layer=nn.ReLU, gate_layer=nn.Hardsigmoid),
    )
    return InvertedResidual(
        in_channels,
        out_channels,
        dw_kernel_size=kernel_size,
        stride=stride,
        exp_ratio=float(expansion),
        act_layer=nn.Hardswish,
        se_layer=squeeze_excite,
    )


class PatchReshape(nn.Sequential):
    """Turns latents (B, M, H, W) into a map of tokens (B, D, H', W').

    ::

        halve = True  (CI2P-ViT)    M -> 4M -> M, k3   M -> 6M -> D, k5, stride 2   H' = H / 2
        halve = False (CI2P-ViTds)  M -> 4M -> M, k3   M -> 4M -> D, k3             H' = H

    Inverted residuals of MobileNetV3 (Howard et al. 2019, arXiv 1905.02244) with
    squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507), which timm provides. The first has a
    residual, the second only where it keeps its shape (`halve` False and D = M, as in the paper's
    CI2P-ViTds). M other than the paper's 192 is our extension.
    """

    def __init__(self, latent_channels: int, width: int, *, halve: bool) -> None:
        first = _inverted_residual(latent_channels, latent_channels, 4, kernel_size=3, stride=1)
        shape = {"kernel_size": 5, "stride": 2} if halve else {"kernel_size": 3, "stride": 1}
        second = _inverted_residual(latent_channels, width, 6 if halve else 4, **shape)
        super().__init__(first, second)
        init_convolutions(self)


class CnnReshape(nn.Sequential):
    """Takes a map from one scale to the next: (B, C, H, W) -> (B, D, H / 2, W / 2).

    One inverted residual, C -> 6C -> D, k5, stride 2, between the two scales of CI2P-ViTds.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(_inverted_residual(in_width, width, 6, kernel_size=5, stride=2))
        init_convolutions(self)


def init_convolutions(module: nn.Module) -> None:
    """Draws every convolution below `module` from Kaiming's normal (fan out, ReLU), biases 0.

    He et al. 2015, arXiv 1502.01852. The fan out of a depthwise kernel is taken as torch takes it,
    C * k * k without regard to groups. The numbers come from torch's global generator.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def to_tokens(maps_BDHW: Tensor) -> Tensor:
    """Returns (B, N, D) tokens in row-major order; a view where the map is channels_last."""
    return maps_BDHW.flatten(2).transpose(1, 2)


def to_map(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """Returns the (B, D, height, width) view of row-major tokens; its memory is channels_last."""
    # Not len(): that is a plain integer, which would fix the batch size of an exported graph.
    return tokens_BND.transpose(1, 2).reshape(tokens_BND.shape[0], -1, height, width)


_MLP_RATIO = 4
_HEAD_WIDTH = 64
LAYER_NORM_EPS = 1e-6
"""The paper's, and that of Dosovitskiy et al."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Record):
    """Everything that fixes the tensors of a model; a checkpoint stores it beside the weights."""

    version: int = 1
    """Version of this record."""
    name: str
    """Name of the preset it was made from, for display."""
    embed_dims: tuple[int, ...]
    """Token width of each scale: one for CI2P-ViT, two for CI2P-ViTds."""
    depths: tuple[int, ...]
    """Number of transformer blocks of each scale."""
    num_classes: int = 1000
    """K; 0 leaves the classification head out, and the model gives pooled features."""
    latent_channels: int = 192
    """M; 192 is the paper's (CompressAI quality 1-5), 320 that of quality 6-8."""
    pos_embed: bool = False
    """Whether a learned positional embedding is added to the first tokens; the paper has none."""
    latent_size: int = 16
    """Rows and columns of the latents that `pos_embed` is made for (16 at 256 px); else unused."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0 at the first; the paper's."""

    reads: ClassVar[Literal["latents"]] = "latents"
    """What the model takes: dequantised latents."""

    def __post_init__(self) -> None:
        for field in ("embed_dims", "depths"):
            values = getattr(self, field)
            if (
                type(values) is not tuple
                or len(values) not in (1, 2)
                or any(type(value) is not int or value < 1 for value in values)
            ):
                raise UsageError(
                    f"`{field}` is {values!r}; it must be a tuple of one or two positive integers"
                )
        if len(self.embed_dims) != len(self.depths):
            raise UsageError(
                f"`embed_dims` {self.embed_dims} and `depths` {self.depths} must be equally long, "
                "one entry per scale"
            )
        check_fields(self, latent_channels=(1, 1), latent_size=(2, 2))


def check_latents(shape: tuple[int, ...], *, name: str, channels: int) -> None:
    """Refuses latents that a model cannot take, by UsageError; their sides must be even."""
    if len(shape) != 4 or shape[1] != channels:
        raise UsageError(
            f"{name} wants latents (batch, {channels}, height, width), got {shape}; make it with "
            "the number of channels that the cache has"
        )
    if shape[2] % 2 or shape[3] % 2 or not shape[2] or not shape[3]:
        raise UsageError(
            f"{name} wants latents of even height and width, got {shape[2]}x{shape[3]}; the image "
            "size must be a multiple of 32"
        )


def num_heads(width: int) -> int:
    """Returns the number of attention heads for tokens of `width` channels.

    64 channels a head, ViT's own, where 64 divides `width`; otherwise the divisor whose head width
    is nearest to 64 (ours: 2 heads of 48 for width 96), the fewer heads on a tie.
    """
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: abs(width // heads - _HEAD_WIDTH))


def transformer_blocks(width: int, drop_path_rates: tuple[float, ...]) -> nn.Sequential:
    """Returns pre-norm ViT blocks (B, N, D) -> (B, N, D), one per entry of `drop_path_rates`.

    MLP four times as wide, biases everywhere, exact GELU, LayerNorm eps 1e-6, no layer scale, no
    dropout. Attention weights are drawn from a truncated normal of deviation 0.02 with bias 0,
    those of the MLP from Xavier's uniform (Glorot and Bengio 2010) with biases of deviation 1e-6,
    all from torch's global generator.
    """
    from timm.models.vision_transformer import Block

    # timm calls `norm_layer` and annotates it as a class.
    norm_layer = cast("type[nn.Module]", partial(nn.LayerNorm, eps=LAYER_NORM_EPS))
    blocks = nn.Sequential(
        *(
            Block(
                width,
                num_heads(width),
                mlp_ratio=_MLP_RATIO,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=norm_layer,
            )
            for rate in drop_path_rates
        )
    )
    for name, part in blocks.named_modules():
        if isinstance(part, nn.Linear) and ".attn." in name:
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.normal_(part.bias, std=1e-6)
    return blocks


def classification_head(width: int, num_classes: int) -> nn.Module:
    """Gives the linear layer D -> K, drawn from N(0, 0.01) with bias 0; the identity for K = 0."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """Returns the stochastic depth of each block: 0 at the first, growing linearly to `rate`."""
    return tuple(rate * i / max(depth - 1, 1) for i in range(depth))


class CI2PViT(nn.Module):
    """Latents (B, M, H, W) to logits (B, K), or to pooled features (B, D) where K is 0.

    ::

        one scale,  CI2P-ViT    y -> PatchReshape /2 -> 12 blocks ---------------------> LayerNorm
        two scales, CI2P-ViTds  y -> PatchReshape -> 6 blocks -> CnnReshape /2 -> 6 blocks  mean
                                                                                         Linear

    H and W are even and otherwise free, unless there is a positional embedding. There is no class
    token, and by default no positional embedding: only the convolutions give tokens their place.
    Values of y enter unscaled, as the encoder gives them. Nothing in `forward` depends on values,
    so torch.compile makes one graph per shape; channels_last latents are read as they are.
    """

    pos_embed: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        widths, last = config.embed_dims, config.embed_dims[-1]
        rates = drop_path_rates(config.drop_path_rate, sum(config.depths))
        two_scales = len(widths) == 2
        self.patch_reshape = PatchReshape(config.latent_channels, widths[0], halve=not two_scales)
        self.pos_embed = None
        if config.pos_embed:
            side = config.latent_size if two_scales else config.latent_size // 2
            self.pos_embed = nn.Parameter(torch.empty(1, side * side, widths[0]))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = transformer_blocks(widths[0], rates[: config.depths[0]])
        self.cnn_reshape = CnnReshape(widths[0], last) if two_scales else None
        # Empty, and without an entry in the state dict, where there is one scale.
        self.last_blocks = transformer_blocks(last, rates[config.depths[0] :])
        self.norm = nn.LayerNorm(last, eps=LAYER_NORM_EPS)
        self.head = classification_head(last, config.num_classes)

    def forward(self, latents_BMHW: Tensor) -> Tensor:
        """Returns logits (B, K), or pooled features (B, D) where K is 0.

        They have the dtype of the weights, or under torch.autocast that of autocast.

        Args:
            latents_BMHW: y, floating point, H and W even.

        Raises:
            UsageError: there are not four dimensions and M channels, H or W is odd or 0, or the
                positional embedding was made for another size.
        """
        features_BD = self.forward_features(latents_BMHW).mean(dim=1)
        return self.head(features_BD)  # type: ignore[no-any-return]  # Identity or Linear

    def forward_features(self, latents_BMHW: Tensor) -> Tensor:
        """Returns the normalised tokens (B, N, D) of the last scale; N = H * W / 4.

        Raises:
            UsageError: as `forward` does.
        """
        self._check(latents_BMHW)
        map_BDHW = self.patch_reshape(latents_BMHW)
        tokens_BND = to_tokens(map_BDHW)
        if self.pos_embed is not None:
            tokens_BND = tokens_BND + self.pos_embed
        tokens_BND = self.blocks(tokens_BND)
        if self.cnn_reshape is not None:
            map_BDHW = to_map(tokens_BND, *map_BDHW.shape[2:])
            tokens_BND = self.last_blocks(to_tokens(self.cnn_reshape(map_BDHW)))
        return self.norm(tokens_BND)  # type: ignore[no-any-return]  # LayerNorm's call is untyped

    def _check(self, latents_BMHW: Tensor) -> None:
        config, shape = self.config, tuple(latents_BMHW.shape)
        check_latents(shape, name=config.name, channels=config.latent_channels)
        side = config.latent_size
        if self.pos_embed is not None and shape[2:] != (side, side):
            raise UsageError(
                f"{config.name} has a positional embedding for {side}x{side} latents, "
                f"got {shape[2]}x{shape[3]}; make it with `latent_size` of the cache"
            )
