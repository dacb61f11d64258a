"""What a device can do at best: its rate of matrix products; utilisation is a share of that."""

from __future__ import annotations

import time

import torch

__all__ = ["matmul_flops", "synchronise"]

_SIDE_CPU, _SIDE_CUDA = 1024, 8192
_SECONDS = 1.0


def synchronise(device: torch.device) -> None:
    """Waits until a CUDA device has done all it was given; a CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, precision: str) -> float:
    """Measures the best rate of a large square matrix product, in FLOP per second.

    With as many threads as torch uses here; about two seconds.

    Args:
        device: Where.
        precision: float32 (IEEE, no TF32) or bf16.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = _SIDE_CUDA if device.type == "cuda" else _SIDE_CPU
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    best = 0.0
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < _SECONDS:
        for _ in range(4):
            torch.mm(a, b, out=out)
        synchronise(device)
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - now))
    return best
