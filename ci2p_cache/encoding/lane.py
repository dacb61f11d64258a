"""Lanes: an encoder on a device, and how uint8 views become stored values on it.

On CPU there is one lane per core, each with one torch thread: that is the reference setting (two
threads inside one convolution change about 3 in a million symbols, two lanes change none). A CUDA
device has two lanes that share its encoder, each with a stream and pinned memory of its own: one
uploads and downloads while the other computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.encoder.frozen import FrozenEncoder, saturate
from ci2p_cache.encoder.zoo import ARCH
from ci2p_cache.errors import SaturationError
from ci2p_cache.machine import chosen_devices, tune_allocator
from ci2p_cache.specs import LatentSpec

__all__ = [
    "Lane",
    "changed_numerics",
    "encode_views",
    "make_lanes",
    "numerics",
    "single_threaded",
]


_LANES_PER_CUDA_DEVICE = 2
"""Not measured: two are what overlap takes."""


@dataclass(slots=True)
class Lane:
    """One encoder on one device; used by one thread at a time."""

    encoder: FrozenEncoder
    """Lanes of one device share it."""
    device: torch.device
    stream: torch.cuda.Stream | None = None
    """Where its work is queued; None on CPU."""
    _pinned: torch.Tensor | None = field(default=None, repr=False)

    def queue(self) -> contextlib.AbstractContextManager[object]:
        """Makes what is computed inside run on the lane's own stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def upload(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Gives views as one tensor on the device, uint8 (B, 3, size, size).

        On CUDA by way of pinned memory, which holds them until the stream has come that far: a
        lane waits for its results before it takes other views.
        """
        if self.stream is None:
            return torch.stack(views).to(self.device)
        if self._pinned is None or len(self._pinned) < len(views):
            shape = (len(views), *views[0].shape)
            self._pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        stacked = torch.stack(views, out=self._pinned[: len(views)])
        return stacked.to(self.device, non_blocking=True)


def make_lanes(encoder: FrozenEncoder, devices: str) -> list[Lane]:
    """Builds the lanes for `--devices`.

    Args:
        encoder: The encoder, on CPU.
        devices: auto (every CUDA device, else cpu), cpu, cpu:N (N lanes), cuda, cuda:0,1.

    Raises:
        UsageError: the text is none of these, or such a device is not there.
    """
    chosen = chosen_devices(devices)
    if chosen[0].type == "cpu":
        tune_allocator()
        return [Lane(encoder, device) for device in chosen]
    lanes = []
    for device in chosen:
        own = copy.deepcopy(encoder).to(device)
        # The lanes' streams do not wait for the one on which the weights were laid out.
        torch.cuda.synchronize(device)
        for _ in range(_LANES_PER_CUDA_DEVICE):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch stub
            lanes.append(Lane(own, device, stream))
    return lanes


def single_threaded() -> None:
    """Makes torch use one thread in the calling thread."""
    torch.set_num_threads(1)


def encode_views(
    lane: Lane, views: list[torch.Tensor], latent: LatentSpec
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Runs g_a over a batch and turns y into what is stored.

    Args:
        lane: Where to run it.
        views: B tensors, uint8 (3, size, size).
        latent: What to store.

    Returns:
        stored (B, M, h, w) of the stored dtype, and the number of saturated symbols per sample and
        channel, int64 (B, M).

    Raises:
        SaturationError: y holds values that the float dtype cannot hold.
    """
    with lane.queue():
        images = lane.upload(views).to(torch.float32).div_(255)
        y = lane.encoder(images)
        if latent.is_symbols:
            symbols = lane.encoder.quantize(y, step=latent.step)
            stored, clipped = saturate(symbols, latent.symbol_limit)
            return stored.cpu().numpy(), clipped.cpu().numpy()
        values = y.to(getattr(torch, latent.dtype)).cpu()
    if not bool(torch.isfinite(values).all()):
        raise SaturationError(
            f"the encoder gives values that {latent.dtype} cannot hold",
            hint="repeat the command with --dtype float32 into a new --out folder",
        )
    return values.numpy(), np.zeros(values.shape[:2], np.int64)


def numerics(lane: Lane, batch_size: int) -> dict[str, str | int]:
    """Returns what a bit-identical repetition needs to know; every commit record holds it."""
    cpu = lane.device.type == "cpu"
    own = lane.encoder.spec.arch == ARCH
    return {
        "device_type": lane.device.type,
        "device": torch.backends.cpu.get_cpu_capability()
        if cpu
        else torch.cuda.get_device_name(lane.device),
        "batch_size": batch_size,
        "threads": 1,
        "memory_format": "channels_last",
        "torch": torch.__version__,
        "numcodecs": version("numcodecs"),
        **({"encoder": "ci2p_cache"} if own else {"compressai": version("compressai")}),
    }


def changed_numerics(
    then: Mapping[str, str | int], now: Mapping[str, str | int]
) -> dict[str, tuple[str | int | None, str | int | None]]:
    """Returns what of `numerics` was another then, and may have given other bits: name -> both.

    Who computed the paper's encoder is left out, compressai once or this package: the bits are the
    same.
    """
    left_out = {"encoder", "compressai"} if "encoder" in now else set()
    names = [name for name in {**now, **then} if name not in left_out]
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}
