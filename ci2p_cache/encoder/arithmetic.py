"""The device and the arithmetic that g_a and g_s run on, fixed around each call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch

__all__ = ["fixed_arithmetic"]

# cuDNN's switches belong to the process: two threads must not set them at the same time.
_CUDNN_LOCK = threading.Lock()


@contextlib.contextmanager
def fixed_arithmetic(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Holds convolutions to one arithmetic for a while, whatever the process has switched on.

    float32 means IEEE products and sums; an autocast region around the call does not reach in. On
    CUDA cuDNN chooses among deterministic algorithms, and not by timing them.

    Args:
        device: cpu or cuda.
        tf32: Whether CUDA may round products to TF32; nothing on cpu.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type == "cpu":
            # oneDNN computes in bfloat16 or tf32 only where somebody asks for it ("none": no one).
            onednn: Any = cast("Any", torch.backends.mkldnn).conv
            before = onednn.fp32_precision
            onednn.fp32_precision = "none" if before == "none" else "ieee"
            try:
                yield
            finally:
                onednn.fp32_precision = before
            return
        cudnn: Any = torch.backends.cudnn
        with _CUDNN_LOCK:
            before = (cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark)
            cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
            cudnn.deterministic, cudnn.benchmark = True, False
            try:
                yield
            finally:
                cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before
