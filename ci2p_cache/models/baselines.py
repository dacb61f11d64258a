"""Models on images that CI2P is held against: `ViTB16`.

Shape suffixes: B batch, H and W rows and columns of an image, D width, N tokens, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ci2p_cache.models.ci2p_vit import transformer_blocks
from ci2p_cache.models.patch_reshape import to_tokens

__all__ = ["ViTB16"]

_PATCH_PX, _WIDTH, _DEPTH = 16, 768, 12


class ViTB16(nn.Module):
    """ViT-B/16 as the paper compares with: no class token, learned positions, mean pooling.

    Dosovitskiy et al. 2021, arXiv 2010.11929. Images (B, 3, H, W), normalised, to logits (B, K).

    Args:
        size: Side of the square image in pixels, a multiple of 16.
        num_classes: K; 0 gives pooled features (B, D) instead.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(self, size: int, num_classes: int, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, _WIDTH, _PATCH_PX, stride=_PATCH_PX)
        self.pos_embed = nn.Parameter(torch.empty(1, (size // _PATCH_PX) ** 2, _WIDTH))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = tuple(drop_path_rate * block / (_DEPTH - 1) for block in range(_DEPTH))
        self.blocks = transformer_blocks(_WIDTH, rates)
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, num_classes) if num_classes else nn.Identity()

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Gives logits, or features where there are no classes."""
        tokens_BND = to_tokens(self.patch_embed(images_B3HW)) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens_BND)).mean(dim=1))  # type: ignore[no-any-return]  # modules' calls are untyped
