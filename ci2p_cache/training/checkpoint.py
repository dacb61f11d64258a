"""Checkpoints: folders that are complete or not there, checked by digest whenever they are read.

::

    checkpoints/
      epoch-0003-step-000000/     3 epochs done and 0 steps of the next
        model.safetensors         parameters, and BatchNorm statistics estimated for them
        ema.safetensors           their averages under the same names, where the run makes them:
                                  these are what was validated (`weights_of` picks the right file)
        optimizer.safetensors     Adam's moments, exp_avg/<parameter> and so on
        state.json                TrainState: place in the order, running sums, all epochs so far
        digests.json              size and sha256 of these files
      last.json                   which folders are the last and the best

A folder is written under a staging name, its files synced, and renamed into place. The newest one
that is whole counts; `last.json` tells people and other programs what we know from listing. Three
are kept: the last, the one before it in case the last is damaged, and the best (of either, should
they not agree). Nothing is pickled.

Reading safetensors files of ours: checked whole, and in no more memory than the file has bytes.

The layout is that of the safetensors format: the header's length as little-endian uint64, the
header as JSON (name -> dtype, shape, data_offsets), then the tensors one after another.

What a checkpoint folder holds, read without the run around it: its state, and its weights.

`checkpoint.py` draws the folder, and writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.sealed import json_bytes
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path, sync_folder
from ci2p_cache.errors import CheckpointError, ManifestError, ResourceError
from ci2p_cache.record import Record, read_json, read_regular, regular_file
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import EpochRecord, TrainObserver, best_epoch

__all__ = [
    "AVERAGE",
    "CHECKPOINTS",
    "DIGESTS",
    "MODEL",
    "NAME",
    "OPTIMIZER",
    "STATE",
    "VERSION",
    "Checkpoint",
    "CheckpointStore",
    "TrainState",
    "best_name",
    "checkpoint_path",
    "listed_files",
    "place_of",
    "read_state",
    "read_tensors",
    "share_checkpoint",
    "weights_of",
]

_MAX_HEADER_BYTES = 4 * 2**20
"""About 100 bytes per tensor; hostile JSON takes about 25 times its size when parsed."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensors(path: Path, record: FileRecord) -> dict[str, Tensor]:
    """Reads a safetensors file whose size and sha256 are known.

    The header is held against the size before the rest is read, so memory follows from what is
    on disk and not from what the header says; what is parsed is what the digest was checked of.

    Args:
        path: The file.
        record: Its size and digest.

    Returns:
        Tensors on CPU that share one buffer of the file's size; writable, they do not overlap.

    Raises:
        CheckpointError: the file is not the recorded one, or its tensors do not fill it exactly.
        ManifestError: it is a link or no regular file.
        OSError: it cannot be read.
    """
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path.name} is not what was written: {record.bytes} bytes, now {size} bytes"
            )
        entries, start = _layout(path.name, file, size)
        file.seek(0)
        try:
            content = bytearray(size)
        except MemoryError as error:
            raise CheckpointError(f"{path.name} has {size} bytes, more than memory") from error
        file.readinto(content)
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(
            f"{path.name} is not what was written: sha256 {record.sha256[:12]}..., now "
            f"{digest[:12]}..."
        )
    return {
        name: _view(content, dtype, shape, start + begin)
        for name, (dtype, shape, begin) in entries.items()
    }


def _layout(
    name: str, file: io.BufferedReader, size: int
) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], int]:
    """Returns dtype, shape and place of each tensor, and where the first one begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{name} has a header of {length} bytes in {size}")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {key: _entry(value) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged header: {error!r}") from error
    position = 0
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != position:
            raise CheckpointError(f"{name} has tensors that overlap or leave a gap at {begin}")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{name} holds {size - 8 - length} bytes of tensors, its header speaks of {position}"
        )
    found = {key: (dtype, shape, begin) for key, (dtype, shape, begin, _) in entries.items()}
    return found, 8 + length


def _entry(value: Any) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape = _DTYPES[value["dtype"]], value["shape"]
    begin, end = value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"{value['dtype']} of shape {shape} at {begin} to {end}")
    return dtype, list(shape), begin, end


def _view(content: bytearray, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).reshape(shape)


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


_PARTIAL = f"{CHECKPOINTS}/.partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory; all tensors on CPU."""

    state: TrainState
    """Where the run stands."""
    model: dict[str, Tensor]
    """The model's `state_dict`."""
    optimizer: dict[str, Tensor]
    """What `optimizer_tensors` gives."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The averaged weights, named as in `model`; empty where the run makes none."""


class CheckpointStore:
    """The checkpoints of one run folder; one process at a time, which the run's lock sees to.

    Args:
        staging: The open staging area of the run folder.
        run: Digest of the run's settings and data.
        has_average: Whether the run averages its weights: a checkpoint then is whole only with
            them.
    """

    def __init__(self, staging: StagingArea, *, run: str, has_average: bool = False) -> None:
        self._staging = staging
        self._run = run
        self._has_average = has_average
        self._folder = staging.root / CHECKPOINTS
        self._newest: str | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, points `last.json` to it and removes those no longer needed.

        Does nothing where the newest checkpoint is of the same place, because it is the same.

        Raises:
            DiskFullError: no space is left; earlier checkpoints are safe.
            ResourceError: another write error; earlier checkpoints are safe.
        """
        state, root = checkpoint.state, self._staging.root
        if state.name == self._newest:
            return
        remove_path(root / _PARTIAL)
        contents = {
            MODEL: _tensor_bytes(checkpoint.model),
            OPTIMIZER: _tensor_bytes(checkpoint.optimizer),
            STATE: json_bytes(state.to_dict()),
        }
        if self._has_average:
            contents[AVERAGE] = _tensor_bytes(checkpoint.average)
        target = checkpoint_path(root, state.name)
        try:
            files = []
            for name, content in contents.items():
                written = self._staging.put(f"{_PARTIAL}/{name}", content)
                files.append({"path": name, "bytes": written.bytes, "sha256": written.sha256})
            self._staging.put_json(f"{_PARTIAL}/{DIGESTS}", {"version": VERSION, "files": files})
            # Only a damaged folder can be there: the run would have continued from a good one.
            remove_path(target)
            with disk_errors(target):
                (root / _PARTIAL).rename(target)
                sync_folder(self._folder)
        except ResourceError:
            # A full disk is not left fuller.
            shutil.rmtree(root / _PARTIAL, ignore_errors=True)
            raise
        self._newest = state.name
        pointer = {"version": VERSION, "last": state.name, "best": state.best_name}
        self._staging.put_json(f"{CHECKPOINTS}/last.json", pointer)
        self._remove_old(state)

    def load(self, observer: TrainObserver) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones are passed over, and the observer is told which, why, and what counts instead.

        Returns:
            None where the run has not saved one yet.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        remove_path(self._staging.root / _PARTIAL)
        names = self._names()
        pointed = self._pointed_to(observer)
        if pointed is not None and pointed not in names:
            names.append(pointed)
        damaged: list[str] = []
        for name in sorted(names, key=place_of, reverse=True):
            try:
                checkpoint = self._read(name)
            except CheckpointError as error:
                damaged.append(f"{name} ({error})")
                continue
            if damaged:
                observer.notice(
                    f"damaged checkpoint passed over: {'; '.join(damaged)}. Training continues "
                    f"from {name}; what came after it is trained again."
                )
            self._newest = name
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is whole: {'; '.join(damaged)}",
                hint="put one back from a backup, or start again with --overwrite",
            )
        return None

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return [path.name for path in self._folder.iterdir() if NAME.fullmatch(path.name)]

    def _pointed_to(self, observer: TrainObserver) -> str | None:
        path = self._folder / "last.json"
        try:
            name = read_json(path).get("last")
        except FileNotFoundError:
            return None
        except (ManifestError, OSError) as error:
            observer.notice(f"{path} is damaged ({error}); the newest whole checkpoint counts.")
            return None
        return name if isinstance(name, str) and NAME.fullmatch(name) else None

    def _read(self, name: str) -> Checkpoint:
        """Reads one checkpoint; what is parsed is the very bytes whose digest was checked.

        Raises:
            CheckpointError: anything about it is not as it was written.
        """
        folder = self._folder / name
        if folder.is_symlink():
            raise CheckpointError("it is a link, which may lead anywhere")
        try:
            listed = listed_files(folder)
            if (AVERAGE in listed) != self._has_average:
                raise CheckpointError(f"{DIGESTS} lists other files than this run saves")
            state = read_state(folder)
            if state.run != self._run or state.name != name:
                raise CheckpointError(f"{STATE} is of another run or place")
            model = read_tensors(folder / MODEL, listed[MODEL])
            optimizer = read_tensors(folder / OPTIMIZER, listed[OPTIMIZER])
            average = {}
            if self._has_average:
                average = read_tensors(folder / AVERAGE, listed[AVERAGE])
        except (ManifestError, OSError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(str(error)) from error
        return Checkpoint(state, model, optimizer, average)

    def _remove_old(self, state: TrainState) -> None:
        before = [name for name in self._names() if place_of(name) < place_of(state.name)]
        keep = {state.name, state.best_name}
        if before:
            previous = max(before, key=place_of)
            keep |= {previous, best_name(state.history[: place_of(previous)[0]])}
        for name in self._names():
            if name not in keep:
                remove_path(self._folder / name)


def share_checkpoint(checkpoint: Checkpoint | None, ranks: Ranks) -> Checkpoint | None:
    """Returns rank 0's checkpoint on all ranks; what the others give is not looked at."""
    if ranks.world_size == 1:
        return checkpoint
    contents = [b"", b"", b"", b""]
    if ranks.is_writer and checkpoint is not None:
        contents = [
            json_bytes(checkpoint.state.to_dict()),
            _tensor_bytes(checkpoint.model),
            _tensor_bytes(checkpoint.optimizer),
            _tensor_bytes(checkpoint.average),
        ]
    state, model, optimizer, average = (ranks.share(content) for content in contents)
    if ranks.is_writer or not state:
        return checkpoint
    return Checkpoint(
        TrainState.from_dict(json.loads(state)),
        safetensors.torch.load(model),
        safetensors.torch.load(optimizer),
        safetensors.torch.load(average),
    )


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialises tensors, on any device and in any memory format, to safetensors."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
