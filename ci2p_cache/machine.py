"""What this machine offers: devices, processor cores, memory."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from ci2p_cache.errors import UsageError

__all__ = [
    "BF16_GAIN",
    "bf16_notice",
    "checked_device",
    "chosen_devices",
    "free_memory_bytes",
    "has_bf16",
    "ieee_float32",
    "matmul_flops",
    "num_cores",
    "synchronise",
]


BF16_GAIN = "--precision bf16 encodes about twice as fast and changes 0.4 % of the symbols, by one"
"""For CPUs that have it: from 1.8 (AVX-512) to 3.5 times (AMX); measured with the bundled encoder,
tests/benchmarks/results/bf16_2-core-epyc-avx512_202611.md."""


def checked_device(device: str | torch.device) -> torch.device:
    """Returns the device of that name; auto is CUDA where there is one.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"`device` is {device!r}; wanted auto, cpu, cuda or cuda:1") from error
    if checked.type not in ("cpu", "cuda"):
        raise UsageError(f"`device` is {str(checked)!r}; wanted auto, cpu, cuda or cuda:1")
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"`device` is {str(checked)!r}; torch can use {torch.cuda.device_count()} CUDA devices "
            "here"
        )
    return checked


def chosen_devices(devices: str) -> list[torch.device]:
    """Returns the devices that `devices` stands for; the CPU once per core that is to work.

    Args:
        devices: auto (every CUDA device, else cpu), cpu, cpu:2 (two cores), cuda or cuda:0,1;
            `EncodeOptions` refuses other texts.

    Raises:
        UsageError: this machine lacks such a device.
    """
    kind, _, numbers = devices.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = [int(number) for number in numbers.split(",") if number]
    if kind == "cpu":
        return [torch.device("cpu")] * (wanted[0] if wanted else num_cores())
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = wanted or list(range(there))
    if not chosen or max(chosen) >= there:
        raise UsageError(f"`device` is {devices!r}; this machine has {there} CUDA devices")
    return [torch.device("cuda", number) for number in chosen]


def has_bf16(device: torch.device) -> bool | None:
    """Returns whether a device has instructions for bfloat16; None for a CPU that does not say."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    # x86 has `flags`, Arm `Features`, one line per core.
    return bool(re.search(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", cpu, re.M))


def bf16_notice(device: torch.device) -> str | None:
    """Returns what someone who wants bfloat16 on a device should know; None where nothing is wrong.

    A processor without such instructions computes all the same, in software: slower than float32.
    """
    if has_bf16(device) is not False:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    return f"{name} has no bfloat16 instructions: float32 will be faster than bf16"


def free_memory_bytes(device: torch.device) -> int:
    """Returns the memory that can still be had on a device, in bytes.

    On a CPU what the kernel calls available, or what the process's control group leaves of it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def synchronise(device: torch.device) -> None:
    """Waits until a CUDA device has done all it was given; a CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, precision: str) -> float:
    """Measures the best rate of a large square matrix product, in FLOP per second.

    With as many threads as torch uses here; it takes about a second.

    Args:
        device: Where.
        precision: float32 (IEEE, no TF32) or bf16.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    best, started = 0.0, time.perf_counter()
    while (now := time.perf_counter()) - started < 1.0:
        for _ in range(4):
            torch.mm(a, b, out=out)
        synchronise(device)
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - now))
    return best


@contextlib.contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Makes float32 mean IEEE float32 on CUDA too, where convolutions otherwise round to TF32."""
    if device.type != "cuda":
        yield
        return
    # torch makes these attributes at run time.
    switches: tuple[Any, ...] = (
        cast("Any", torch.backends.cudnn).conv,
        torch.backends.cuda.matmul,
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def num_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
