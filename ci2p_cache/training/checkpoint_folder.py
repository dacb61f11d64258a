"""What a checkpoint folder holds, read without the run around it: its state, and its weights.

`checkpoint.py` draws the folder, and writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import CheckpointError, ManifestError
from ci2p_cache.record import Record, read_json, read_regular
from ci2p_cache.training.records import EpochRecord, best_epoch
from ci2p_cache.training.tensor_file import read_tensors

__all__ = [
    "AVERAGE",
    "CHECKPOINTS",
    "DIGESTS",
    "MODEL",
    "NAME",
    "OPTIMIZER",
    "STATE",
    "VERSION",
    "TrainState",
    "best_name",
    "checkpoint_path",
    "listed_files",
    "place_of",
    "read_state",
    "weights_of",
]

CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints are."""

VERSION = 1
"""Of `state.json` and `digests.json`."""

MODEL, AVERAGE, OPTIMIZER, STATE, DIGESTS = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
    "digests.json",
)

NAME = re.compile(r"epoch-(\d{4,})-step-(\d{6,})")
"""Names of checkpoint folders."""

_MAX_STATE_BYTES = 16 * 2**20
"""Of state.json: some 40,000 epochs."""

_DAMAGES = (ManifestError, OSError, TypeError, ValueError, RecursionError)
"""What reading a damaged folder raises beside CheckpointError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState(Record):
    """Where a run stands. With the spec's seed it fixes everything that comes."""

    version: int = VERSION
    """Version of this record."""
    run: str
    """Digest of the run's settings and data; a checkpoint of another run is refused."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps of the next epoch done; all of them where only its validation is missing."""
    sums: dict[str, float]
    """Sums over these steps, as `TrainTotals.read` gives them; empty at the start of an epoch."""
    train_seconds: float = 0.0
    """Wall time of these steps."""
    waited_seconds: float = 0.0
    """Part of it spent waiting for data."""
    bad_in_a_row: int = 0
    """Steps skipped directly before."""
    history: tuple[EpochRecord, ...] = ()
    """The epochs done; `summary.csv` is written from it."""

    @property
    def name(self) -> str:
        """Name of the checkpoint folder."""
        return _folder_name(self.epoch, self.step)

    @property
    def best_name(self) -> str | None:
        """Name of the folder with the best weights; None before the first epoch's end."""
        return best_name(self.history)


def checkpoint_path(run: Path, name: str) -> Path:
    """Returns the path of a checkpoint of the run in the folder `run`."""
    return run / CHECKPOINTS / name


def read_state(folder: Path) -> TrainState:
    """Returns where training stood at a checkpoint; what is parsed is what its digest was taken of.

    Args:
        folder: A checkpoint folder, `RUN/checkpoints/epoch-0003-step-000000`.

    Raises:
        CheckpointError: the folder or its state are missing, damaged or of another version; the
            message leaves the folder out, the caller knows it.
    """
    try:
        state = TrainState.from_dict(
            json.loads(_checked_bytes(folder, listed_files(folder)[STATE]))
        )
    except _DAMAGES as error:
        raise CheckpointError(str(error)) from error
    if state.version != VERSION:
        raise CheckpointError(f"{STATE} is of another version")
    return state


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Returns the weights that a checkpoint's accuracy is of, held against their digest.

    These are the averages where the run makes them, and otherwise the model's own.

    Args:
        folder: A checkpoint folder, `RUN/checkpoints/epoch-0003-step-000000`.

    Returns:
        Parameters and buffers by their name in the model's `state_dict`, on CPU.

    Raises:
        CheckpointError: the folder or its weights are missing, damaged or of another version.
    """
    try:
        listed = listed_files(folder)
        name = AVERAGE if AVERAGE in listed else MODEL
        return read_tensors(folder / name, listed[name])
    except (CheckpointError, *_DAMAGES) as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {error}",
            hint="name another one; run `train` again to pass over damaged ones",
        ) from error


def listed_files(folder: Path) -> dict[str, FileRecord]:
    """Returns the files of a checkpoint by name, as its `digests.json` lists them.

    Raises:
        CheckpointError: it is of another version, or does not list what a checkpoint has.
        ManifestError, OSError, TypeError, ValueError: it is missing or damaged.
    """
    listing = read_json(folder / DIGESTS)
    records = [FileRecord.from_dict(entry) for entry in listing.get("files", ())]
    names = sorted(record.path for record in records if record.path != AVERAGE)
    if (
        listing.get("version") != VERSION
        or names != sorted((MODEL, OPTIMIZER, STATE))
        or len(records) - len(names) > 1
    ):
        raise CheckpointError(f"{DIGESTS} is of another version or lists other files")
    return {record.path: record for record in records}


def _folder_name(epoch: int, step: int) -> str:
    return f"epoch-{epoch:04d}-step-{step:06d}"


def best_name(history: tuple[EpochRecord, ...]) -> str | None:
    """Returns the name of the folder with the best weights; None before the first epoch's end."""
    return _folder_name(best_epoch(history).epoch, 0) if history else None


def place_of(name: str) -> tuple[int, int]:
    """Returns (epochs done, steps of the next) that the name of a checkpoint folder says."""
    found = NAME.fullmatch(name)
    assert found is not None
    return int(found[1]), int(found[2])


def _checked_bytes(folder: Path, record: FileRecord) -> bytes:
    path = folder / record.path
    # A file of another size is not read at all: it could be of any size.
    same = path.lstat().st_size == record.bytes
    content = read_regular(path, max_bytes=_MAX_STATE_BYTES) if same else b""
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != record.bytes or digest != record.sha256:
        raise CheckpointError(
            f"{record.path} is not what was written: {record.bytes} bytes of sha256 "
            f"{record.sha256[:12]}..., now {path.lstat().st_size} bytes"
        )
    return content
