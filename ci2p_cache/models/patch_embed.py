"""`CI2PPatchEmbed`: PatchReshape in the place of a patch embedding, for timm's VisionTransformer.

::

    from timm.models import VisionTransformer
    model = VisionTransformer(img_size=256, in_chans=192, embed_layer=CI2PPatchEmbed, embed_dim=384)
    logits = model(latents)                    # (B, 192, 16, 16), what the encoder gives at 256 px

Shape suffixes: B batch, M latent channels, D width of a token, H and W rows and columns of the
latents, N tokens in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UsageError
from ci2p_cache.models.patch_reshape import PatchReshape, init_convolutions, to_tokens
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = ["CI2PPatchEmbed"]

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
        UsageError: a size is no multiple of 32, padding is asked for, or `in_chans` is 3.
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
        """Returns the side of a token in pixels, or its rows and columns.

        Args:
            as_scalar: Whether to give one number.
        """
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
        if len(shape) != 4 or shape[1] != self.in_chans:
            raise UsageError(
                f"CI2PPatchEmbed wants latents (batch, {self.in_chans}, height, width), got {shape}"
            )
        if shape[2] % 2 or shape[3] % 2 or not shape[2] or not shape[3]:
            raise UsageError(
                f"CI2PPatchEmbed wants latents of even height and width, got {shape[2]}x{shape[3]}"
            )
        if self.img_size is None or not self.strict_img_size:
            return
        wanted = tuple(side // DOWNSAMPLING for side in self.img_size)
        if shape[2:] != wanted:
            raise UsageError(
                f"CI2PPatchEmbed was made for {wanted[0]}x{wanted[1]} latents, those of "
                f"{self.img_size[0]}x{self.img_size[1]} px; got {shape[2]}x{shape[3]}"
            )
