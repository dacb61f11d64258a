"""What is exported: the model alone, or encoder, quantisation and model as one module.

::

    model:  latents (B, M, h, w), or images (B, 3, size, size) ----------------------> logits (B, K)
    full:   images -> g_a -> stored as the cache did -> dequantised -> the model ----> logits (B, K)

Shape suffixes: B batch, M latent channels, h w latent rows and columns, K classes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ci2p_cache.inference.classifier import Classifier

__all__ = ["full_graph", "model_graph"]


class FullGraph(nn.Module):
    """Images (B, 3, size, size) in [0, 1] to logits, the arithmetic of `Classifier` in floats.

    Symbols are whole numbers in float32, exact up to 2**24; the stored dtypes end at 32,767.

    Args:
        classifier: On the CPU; its weights are copied.
        g_a: The encoder.
    """

    offset: Tensor

    def __init__(self, classifier: Classifier, g_a: nn.Module) -> None:
        super().__init__()
        self.g_a = g_a
        self.model = copy.deepcopy(classifier.model)
        file, latent = classifier.run.file, classifier.fingerprint.latent
        self.register_buffer("offset", torch.tensor(file.offset)[:, None, None])
        self._step = file.scale
        self._limit = latent.symbol_limit if latent.is_symbols else None
        self._is_half = latent.dtype == "float16"

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        y_BMhw = self.g_a(images)
        if self._limit is not None:
            symbols_BMhw = torch.round((y_BMhw - self.offset) / self._step)
            stored_BMhw = symbols_BMhw.clamp(-self._limit, self._limit)
            y_BMhw = stored_BMhw * self._step + self.offset
        elif self._is_half:
            y_BMhw = y_BMhw.to(torch.float16).to(torch.float32)
        logits_BK: Tensor = self.model(y_BMhw)
        return logits_BK


class ModelGraph(nn.Module):
    """What the model reads, to logits.

    Args:
        classifier: On the CPU; its weights are copied.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier.model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        logits_BK: Tensor = self.model(inputs)
        return logits_BK


def full_graph(classifier: Classifier) -> nn.Module:
    """Returns the module from images to logits.

    Raises:
        UsageError: the encoder computes in bfloat16.
        InputDataError, DigestError: the run's encoder is not there or another.
    """
    if classifier.reads == "images":
        return ModelGraph(classifier).eval()
    from ci2p_cache.encoder.frozen import analysis_transform

    return FullGraph(classifier, analysis_transform(classifier.encoder)).eval()


def model_graph(classifier: Classifier) -> nn.Module:
    """Returns the module from what the model reads to logits."""
    return ModelGraph(classifier).eval()
