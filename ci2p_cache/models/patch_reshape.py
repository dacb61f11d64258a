"""The two convolutional modules that turn latents into tokens: PatchReshape and CnnReshape.

Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120. Both are made of
MobileNetV3's inverted residuals (Howard et al. 2019, arXiv 1905.02244) with squeeze-and-excitation
(Hu et al. 2018, arXiv 1709.01507), which timm provides.

Shape suffixes: B batch, M latent channels, C channels of a map, D width of a token, H and W rows
and columns of a map, N = H * W tokens in row-major order.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

__all__ = ["CnnReshape", "PatchReshape", "init_convolutions", "to_map", "to_tokens"]


def _inverted_residual(
    in_channels: int, out_channels: int, *, expansion: int, kernel_size: int, stride: int
) -> nn.Module:
    """Gives one MobileNetV3 block; its residual exists where the map keeps its shape.

    Args:
        in_channels: C of the map that comes in.
        out_channels: C of the map that goes out.
        expansion: Width of the depthwise convolution as a multiple of `in_channels`; timm rounds
            the product to a multiple of 8, which changes nothing for `in_channels` divisible by 4.
        kernel_size: Side of the depthwise kernel, odd; padded by half of it.
        stride: 1, or 2 to halve both sides.
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

    The first block has a residual, the second only where it keeps its shape (`halve` False and
    D = M, as in the paper's CI2P-ViTds). M other than the paper's 192 is our extension.

    Args:
        latent_channels: M.
        width: D.
        halve: Whether the second block halves both sides.
    """

    def __init__(self, latent_channels: int, width: int, *, halve: bool) -> None:
        first = _inverted_residual(
            latent_channels, latent_channels, expansion=4, kernel_size=3, stride=1
        )
        second = _inverted_residual(
            latent_channels,
            width,
            expansion=6 if halve else 4,
            kernel_size=5 if halve else 3,
            stride=2 if halve else 1,
        )
        super().__init__(first, second)
        init_convolutions(self)


class CnnReshape(nn.Sequential):
    """Takes a map from one scale to the next: (B, C, H, W) -> (B, D, H / 2, W / 2).

    One inverted residual, C -> 6C -> D, k5, stride 2, between the two scales of CI2P-ViTds.

    Args:
        in_width: C.
        width: D.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(_inverted_residual(in_width, width, expansion=6, kernel_size=5, stride=2))
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
