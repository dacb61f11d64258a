"""Checkpoints of a codec's training: whole or not there, checked by digest when they are read.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ci2p_cache.encoder.codec_spec import CodecSpec
from ci2p_cache.errors import (
    CheckpointError,
    DiskFullError,
    ManifestError,
    ResourceError,
    UsageError,
)
from ci2p_cache.record import Record, read_json, read_regular

__all__ = ["CodecPlace", "CodecState", "CodecStore"]

_RECORD = "checkpoint.json"
_TENSORS = "checkpoint-{:08d}.safetensors"
_MAX_BYTES = 2**30
"""Of the tensors: quality 8, the largest, takes 120 MB."""


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


@dataclass(frozen=True, slots=True)
class CodecState:
    """All that a run needs to continue."""

    place: CodecPlace
    """Which run, and where."""
    tensors: Mapping[str, Tensor]
    """By kind and parameter, as at the top of this file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _CheckpointRecord(Record):
    """checkpoint.json."""

    version: int = 1
    """Version of this record."""
    place: CodecPlace
    """Which run, and where."""
    bytes: int
    """Size of the tensors file."""
    sha256: str
    """Its digest."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(
                f"codec checkpoint version {self.version} is not 1, the one known here"
            )


class CodecStore:
    """The checkpoint in a folder; one process at a time may use it.

    Args:
        folder: Where it is; made by the first save.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> CodecState | None:
        """Gives the saved state; None where there is none.

        Raises:
            CheckpointError: it is damaged, incomplete or of an unknown version.
        """
        path = self._folder / _RECORD
        try:
            record = _CheckpointRecord.from_dict(read_json(path))
            path = self._folder / _TENSORS.format(record.place.step)
            content = read_regular(path, max_bytes=_MAX_BYTES)
            _check_digest(path, content, record)
            tensors = safetensors.torch.load(content)
        except FileNotFoundError as error:
            if path.name == _RECORD:
                return None
            raise self._damaged(f"{path} is missing") from error
        except (ManifestError, safetensors.SafetensorError, OSError) as error:
            raise self._damaged(str(error)) from error
        return CodecState(record.place, tensors)

    def save(self, state: CodecState) -> None:
        """Writes a state: tensors, then the record, each synced and renamed; then older ones go.

        Raises:
            ResourceError: it cannot be written; the earlier checkpoint is as it was.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        content = bytes(safetensors.torch.save(plain))
        record = _CheckpointRecord(
            place=state.place, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        name = _TENSORS.format(state.place.step)
        with _disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._put(name, content)
            self._put(_RECORD, (json.dumps(record.to_dict(), indent=2) + "\n").encode())
            for path in self._folder.glob("checkpoint-*.safetensors*"):
                if path.name != name:
                    path.unlink()

    def _put(self, name: str, content: bytes) -> None:
        staged = self._folder / f"{name}.partial"
        try:
            with staged.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
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


def _check_digest(path: Path, content: bytes, record: _CheckpointRecord) -> None:
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise ManifestError(
            f"{path} is not what was written: wanted {record.bytes} bytes with sha256 "
            f"{record.sha256[:12]}..., got {len(content)} bytes with another"
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind: type[ResourceError] = DiskFullError if full else ResourceError
        raise kind(
            f"cannot write a checkpoint to {folder}: {error.strerror or error}. The one before it "
            "is safe.",
            hint="make space, then run the same command again" if full else None,
        ) from error
