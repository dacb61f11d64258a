"""Settings and checkpoints of a codec's training; these are whole or not there, and checked.

::

    checkpoint-00001000.safetensors   model/, mean/ (averaged weights), step/, exp_avg/, exp_avg_sq/
    checkpoint.json                   CodecPlace and that file's name, size, sha256; renamed last

The tensors are there before the record that names them; older tensors go afterwards. Nothing is
pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
from torch import Tensor

from ci2p_cache.errors import (
    CheckpointError,
    DiskFullError,
    ManifestError,
    ResourceError,
    UsageError,
)
from ci2p_cache.fields import check_options, option
from ci2p_cache.record import Record, read_json, read_regular, write_synced

__all__ = ["CodecPlace", "CodecSpec", "CodecStore"]

_RECORD = "checkpoint.json"
_TENSORS = "checkpoint-{:08d}.safetensors"
_MAX_BYTES = 2**30
"""Limit for the tensors: quality 8, the largest, takes 120 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSpec(Record):
    """Every setting that changes the numbers of a codec's training; it binds the output folder.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    version: int = option(1, "Version of this record.", low=1, high=1)
    quality: int = option(
        5, "CompressAI quality; fixes N and M. 5 is what CI2P caches (128, 192).", low=1, high=8
    )
    steps: int = option(
        20_000, "Optimiser steps; the learning rate ends at 0 with the last one.", low=1, high=10**9
    )
    batch_size: int = option(
        8, "Crops per step; steps count for more than smooth gradients.", low=1, high=2**16
    )
    crop_px: int = option(
        128, "Side of the square crops, a multiple of 16; g_a sees 128.", low=16, high=2**13
    )
    lmbda: float = option(
        0.025, "Weight of the distortion; CompressAI's for quality 5 and mse.", above=0
    )
    lr: float = option(
        2e-4,
        "Peak learning rate of g_a and g_s, of Adam's scale; between CompressAI's 1e-4 and the "
        "4e-4 that the bundled encoder began with from scratch.",
        above=0,
    )
    optimizer: Literal["muon", "adam"] = option(
        "muon", "For the kernels inside g_a and g_s, `Muon` or as CompressAI; all else is Adam's."
    )
    entropy_lr: float = option(
        1e-3, "Peak learning rate of the entropy model, which follows g_a; Adam's.", above=0
    )
    aux_lr: float = option(1e-3, "Learning rate of the quantiles' own Adam; CompressAI's.", above=0)
    warmup_steps: int = option(
        100, "Linear warm-up for Adam's scales; at most half of `steps` count.", low=0, high=10**9
    )
    clip_norm: float = option(
        1.0, "Largest L2 norm of all gradients together; CompressAI's.", above=0
    )
    ema_decay: float = option(
        0.998, "Average of the weights: the last 500 steps; rises from 0.1.", above=0, below=1
    )
    min_scale: float = option(
        0.5,
        "Half of the crops are shrunk, antialiased, by a factor from here to 1; 1: none. Shrunk "
        "photographs are sharper and less marked by JPEG.",
        above=0,
        high=1,
    )
    precision: Literal["bfloat16", "float32"] = option(
        "bfloat16",
        "Arithmetic of g_a and g_s (autocast) and inside Muon; weights, entropy model and loss are "
        "float32.",
    )
    seed: int = option(
        0, "Seed of the initial weights, the crops and the noise.", low=0, high=2**63 - 1
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.crop_px % 16:
            raise UsageError(f"`crop_px` is {self.crop_px}; wanted a multiple of 16")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecPlace(Record):
    """Which run it is, and where it stands."""

    step: int
    """Steps done."""
    spec: CodecSpec
    """The settings."""
    images: str
    """`TrainingImages.digest`."""
    start: str
    """`tensor_digest` of the weights that the run began with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _CheckpointRecord(Record):
    """checkpoint.json."""

    version: Literal[1] = 1
    place: CodecPlace
    bytes: int
    sha256: str


class CodecStore:
    """The checkpoint in a folder, which the first save makes; one process at a time may use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> tuple[CodecPlace, Mapping[str, Tensor]] | None:
        """Returns the saved state; None where there is none.

        Raises:
            CheckpointError: it is damaged, incomplete or of an unknown version.
        """
        path = self._folder / _RECORD
        try:
            record = _CheckpointRecord.from_dict(read_json(path))
            path = self._folder / _TENSORS.format(record.place.step)
            content = read_regular(path, max_bytes=_MAX_BYTES)
            intact = hashlib.sha256(content).hexdigest() == record.sha256
            tensors = safetensors.torch.load(content) if intact else {}
        except FileNotFoundError as error:
            if path.name == _RECORD:
                return None
            raise self._damaged(f"{path} is missing") from error
        except (ManifestError, safetensors.SafetensorError, OSError) as error:
            raise self._damaged(str(error)) from error
        if not intact:
            raise self._damaged(
                f"{path} is not what was written: wanted {record.bytes} bytes with sha256 "
                f"{record.sha256[:12]}..., got {len(content)} bytes with another"
            )
        return record.place, tensors

    def save(self, place: CodecPlace, tensors: Mapping[str, Tensor]) -> None:
        """Writes a state: tensors, then the record, each synced and renamed; then older ones go.

        Raises:
            ResourceError: it cannot be written; the earlier checkpoint is as it was.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = bytes(safetensors.torch.save(plain))
        record = _CheckpointRecord(
            place=place, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        name = _TENSORS.format(place.step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._put(name, content)
            self._put(_RECORD, (json.dumps(record.to_dict(), indent=2) + "\n").encode())
            for path in self._folder.glob("checkpoint-*.safetensors*"):
                if path.name != name:
                    path.unlink()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind: type[ResourceError] = DiskFullError if full else ResourceError
            raise kind(
                f"cannot write a checkpoint to {self._folder}: {error.strerror or error}. The one "
                "before it is safe.",
                hint="make space, then run the same command again" if full else None,
            ) from error

    def _put(self, name: str, content: bytes) -> None:
        staged = self._folder / f"{name}.partial"
        try:
            write_synced(staged, content)
            staged.replace(self._folder / name)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint in {self._folder} is damaged: {reason}",
            hint="begin anew in another folder, with --start and the weights there, if there are",
        )
