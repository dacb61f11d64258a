"""The device that is measured on: made ready, waited for, and what it can do at best."""

from __future__ import annotations

import time

import torch

from ci2p_cache.machine import checked_device, raise_open_files, tune_allocator

__all__ = ["matmul_flops", "ready_device", "synchronise"]

_SIDE_CPU, _SIDE_CUDA = 1024, 8192
_SECONDS = 1.0


def ready_device(name: str) -> torch.device:
    """Gives a device, with this process set up as training sets itself up.

    Args:
        name: auto (CUDA where there is one), cpu, cuda or cuda:1.

    Raises:
        UsageError: there is no such device.
    """
    device = checked_device(name)
    raise_open_files()
    if device.type == "cpu":
        tune_allocator()
    return device


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
