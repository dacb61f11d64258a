"""`OnlineLoader`: the encoder in the loop, the reference that training from a cache must equal.

It gives the batches of `LatentLoader`, in the same order and views, from the source images: read,
decoded, encoded and quantised as the cache's fingerprint says, each time anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ci2p_cache.encoder.frozen import FrozenEncoder, saturate
from ci2p_cache.encoder.load import load_saved_encoder
from ci2p_cache.loader.pixels import SourceLoader

__all__ = ["OnlineLoader"]


class OnlineLoader(SourceLoader):
    """Loads batches by running the frozen encoder on the source images.

    Arguments and errors are those of `__init__`; the encoder runs on the batches' device.

    Raises:
        WeightsError: the cache's encoder.safetensors is damaged.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._encoder: FrozenEncoder = load_saved_encoder(
            self.split.cache.encoder_path,
            precision=self._fingerprint.encoder.precision,
            device=self.device,
        )

    def _stored(self, images_B3HW: Tensor) -> Tensor:
        """Encodes images to what the cache would store, (B, M, h, w) of its dtype."""
        latent = self._fingerprint.latent
        dtype = getattr(torch, latent.dtype)
        if not len(images_B3HW):
            return torch.empty((0, *latent.shape), dtype=dtype, device=self.device)
        y = self._encoder(images_B3HW.to(torch.float32).div_(255))
        if not latent.is_symbols:
            return y.to(dtype)
        symbols = self._encoder.quantize(y, step=latent.step)
        stored, _ = saturate(symbols, latent.symbol_limit)
        return stored.to(dtype)
