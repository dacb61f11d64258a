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
that is whole counts, found by listing; `last.json` is for people and other programs. Three stay:
the last, the one before it in case the last is damaged, and the best (of either, should they not
agree). Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from torch import Tensor

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.errors import CheckpointError, ManifestError, ResourceError
from ci2p_cache.record import Record, json_bytes, read_json, read_regular, regular_file
from ci2p_cache.runs.files import EpochRecord, best_epoch
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver

__all__ = [
    "CHECKPOINTS",
    "MODEL",
    "NAME",
    "Checkpoint",
    "CheckpointStore",
    "TrainState",
    "checkpoint_path",
    "read_state",
    "read_tensors",
    "share_checkpoint",
    "weights_and_digest",
    "weights_of",
]

_MAX_HEADER_BYTES = 4 * 2**20
"""About 100 bytes per tensor; hostile JSON takes about 25 times its size when parsed."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(path: Path, record: FileRecord) -> dict[str, Tensor]:
    """Reads a safetensors file whose size and sha256 are known, in no more memory than its bytes.

    The layout is that of the format: the header's length as little-endian uint64, the header as
    JSON (name -> dtype, shape, data_offsets), then the tensors one after another. The header is
    checked against the size before the rest is read, so memory follows from what is on disk and not
    from what the header says; what is parsed is what the digest was checked of.

    Returns:
        Tensors on CPU that share one buffer of the file's size; writable, they do not overlap.

    Raises:
        CheckpointError: the file is not the recorded one, or its tensors do not fill it exactly.
        ManifestError, OSError: it is a link or no regular file, or cannot be read.
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
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        tensors[name] = torch.empty(shape, dtype=dtype)
        if end > begin:
            flat = torch.frombuffer(
                content, dtype=dtype, count=math.prod(shape), offset=start + begin
            )
            tensors[name] = flat.reshape(shape)
    return tensors


def _layout(
    name: str, file: io.BufferedReader, size: int
) -> tuple[dict[str, tuple[torch.dtype, list[int], int, int]], int]:
    """Returns dtype, shape, begin and end of each tensor, and where the first one begins."""
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
    return entries, 8 + length


def _entry(value: Any) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape = _DTYPES[value["dtype"]], value["shape"]
    begin, end = value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"{value['dtype']} of shape {shape} at {begin} to {end}")
    return dtype, list(shape), begin, end


CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints are."""

VERSION: Final = 1
"""Version of `state.json` and `digests.json`."""

MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, DIGESTS = "state.json", "digests.json"

NAME = re.compile(r"epoch-(\d{4,})-step-(\d{6,})")

_MAX_STATE_BYTES = 16 * 2**20
"""Largest state.json: some 40,000 epochs."""

_DAMAGES = (CheckpointError, ManifestError, OSError, TypeError, ValueError, RecursionError)
"""What reading a damaged folder raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState(Record):
    """Where a run stands. With the spec's seed it fixes everything that comes."""

    version: Literal[1] = VERSION
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

    Raises:
        CheckpointError: the folder or its state are missing, damaged or of another version; the
            message leaves the folder out, the caller knows it.
    """
    try:
        record = listed_files(folder)[STATE]
        size = (folder / STATE).lstat().st_size
        # A file of another size is not read at all: it could be of any size.
        same = size == record.bytes
        content = read_regular(folder / STATE, max_bytes=_MAX_STATE_BYTES) if same else b""
        if len(content) == record.bytes and hashlib.sha256(content).hexdigest() == record.sha256:
            return TrainState.from_dict(json.loads(content))
    except _DAMAGES as error:
        raise CheckpointError(str(error)) from error
    raise CheckpointError(
        f"{STATE} is not what was written: {record.bytes} bytes of sha256 "
        f"{record.sha256[:12]}..., now {size} bytes"
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Returns the weights that gave a checkpoint's accuracy, checked against their digest, on CPU.

    Raises:
        CheckpointError: as `weights_and_digest`.
    """
    return weights_and_digest(folder)[0]


def weights_and_digest(
    folder: Path, listed: Mapping[str, FileRecord] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Returns the weights that a checkpoint's accuracy is of, on CPU, and their file's sha256.

    These are the averages where the run makes them, and otherwise the model's own. `listed` are the
    files of the folder by name; None: what its `digests.json` lists.

    Raises:
        CheckpointError: the folder or its weights are missing, damaged or of another version.
    """
    try:
        files = listed_files(folder) if listed is None else listed
        name = AVERAGE if AVERAGE in files else MODEL
        return read_tensors(folder / name, files[name]), files[name].sha256
    except _DAMAGES as error:
        again = "name another one; run `train` again to pass over damaged ones"
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {error}",
            hint=again if listed is None else "get the folder again where it came from",
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory; all tensors on CPU."""

    state: TrainState
    model: dict[str, Tensor]
    """The model's `state_dict`."""
    optimizer: dict[str, Tensor]
    """What `optimizer_tensors` gives."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The averaged weights, named as in `model`; empty where the run makes none."""


class CheckpointStore:
    """The checkpoints of one run folder; one process at a time, which the run's lock sees to.

    They are of the run of these digests, the first of which new ones get, and whole only with
    averaged weights if `has_average`.
    """

    def __init__(
        self, staging: StagingArea, *, runs: Sequence[str], has_average: bool = False
    ) -> None:
        self._staging = staging
        self._runs = runs
        self._has_average = has_average
        self._folder = staging.root / CHECKPOINTS
        self._newest: str | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, points `last.json` to it and removes those no longer needed.

        Does nothing where the newest checkpoint is of the same place, because it is the same.

        Raises:
            ResourceError: it cannot be written; earlier checkpoints are safe.
        """
        state, root = checkpoint.state, self._staging.root
        if state.name == self._newest:
            return
        contents = {
            MODEL: _tensor_bytes(checkpoint.model),
            OPTIMIZER: _tensor_bytes(checkpoint.optimizer),
            STATE: json_bytes(state.to_dict()),
        }
        if self._has_average:
            contents[AVERAGE] = _tensor_bytes(checkpoint.average)
        scratch = self._staging.scratch("checkpoint")
        within = scratch.relative_to(root).as_posix()
        try:
            files = []
            for name, content in contents.items():
                written = self._staging.put(f"{within}/{name}", content)
                files.append({"path": name, "bytes": written.bytes, "sha256": written.sha256})
            self._staging.put_json(f"{within}/{DIGESTS}", {"version": VERSION, "files": files})
            # Only a damaged folder can be there: the run would have continued from a good one.
            self._staging.put_folder(scratch, f"{CHECKPOINTS}/{state.name}")
        except ResourceError:
            # A full disk is not left fuller.
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._newest = state.name
        pointer = {"version": VERSION, "last": state.name, "best": state.best_name}
        self._staging.put_json(f"{CHECKPOINTS}/last.json", pointer)
        self._remove_old(state)

    def load(self, observer: TrainObserver) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; None where the run has not saved one yet.

        Damaged ones are passed over, and the observer learns which, why, and what counts instead.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        names = {*self._names(), *self._pointed_to(observer)}
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
            name = shlex.quote(self._folder.parent.name)
            raise CheckpointError(
                f"no checkpoint in {self._folder} is whole: {'; '.join(damaged)}",
                hint="put one back from a backup, or start again with "
                f"`train --name {name} --overwrite {name}`",
            )
        return None

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return [path.name for path in self._folder.iterdir() if NAME.fullmatch(path.name)]

    def _pointed_to(self, observer: TrainObserver) -> list[str]:
        path = self._folder / "last.json"
        try:
            name = read_json(path).get("last")
        except FileNotFoundError:
            return []
        except (ManifestError, OSError) as error:
            observer.notice(f"{path} is damaged ({error}); the newest whole checkpoint counts.")
            return []
        return [name] if isinstance(name, str) and NAME.fullmatch(name) else []

    def _read(self, name: str) -> Checkpoint:
        """Reads one checkpoint; what is parsed is the very bytes whose digest was checked."""
        folder = self._folder / name
        if folder.is_symlink():
            raise CheckpointError("it is a link, which may lead anywhere")
        try:
            listed = listed_files(folder)
            if (AVERAGE in listed) != self._has_average:
                raise CheckpointError(f"{DIGESTS} lists other files than this run saves")
            state = read_state(folder)
            if state.run not in self._runs or state.name != name:
                raise CheckpointError(f"{STATE} is of another run or place")
            state = dataclasses.replace(state, run=self._runs[0])
            names = (MODEL, OPTIMIZER, *([AVERAGE] if self._has_average else []))
            return Checkpoint(state, *(read_tensors(folder / each, listed[each]) for each in names))
        except _DAMAGES as error:
            raise CheckpointError(str(error)) from error

    def _remove_old(self, state: TrainState) -> None:
        before = [name for name in self._names() if place_of(name) < place_of(state.name)]
        keep = {state.name, state.best_name}
        if before:
            previous = max(before, key=place_of)
            keep |= {previous, best_name(state.history[: place_of(previous)[0]])}
        for name in self._names():
            if name not in keep:
                self._staging.remove(f"{CHECKPOINTS}/{name}")


def share_checkpoint(checkpoint: Checkpoint | None, ranks: Ranks) -> Checkpoint | None:
    """Returns rank 0's checkpoint on all ranks; what the others give is not looked at."""
    if ranks.world_size == 1:
        return checkpoint
    contents = [b""] * 4
    if ranks.is_writer and checkpoint is not None:
        tensors = (checkpoint.model, checkpoint.optimizer, checkpoint.average)
        contents = [json_bytes(checkpoint.state.to_dict()), *map(_tensor_bytes, tensors)]
    state, *shared = (ranks.share(content) for content in contents)
    if ranks.is_writer or not state:
        return checkpoint
    return Checkpoint(TrainState.from_dict(json.loads(state)), *map(safetensors.torch.load, shared))


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialises tensors, on any device and in any memory format, to safetensors."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
