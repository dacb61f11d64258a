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
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

import safetensors.torch
from torch import Tensor

from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path, sync_folder
from ci2p_cache.errors import CheckpointError, ManifestError, ResourceError
from ci2p_cache.record import json_bytes, read_json
from ci2p_cache.training.checkpoint_folder import (
    AVERAGE,
    CHECKPOINTS,
    DIGESTS,
    MODEL,
    NAME,
    OPTIMIZER,
    STATE,
    VERSION,
    TrainState,
    best_name,
    checkpoint_path,
    listed_files,
    place_of,
    read_state,
)
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.tensor_file import read_tensors

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "share_checkpoint",
]

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
