"""The run folder as training writes it: whose it is, what it is bound to, who may write there.

`runs/files.py` draws it. Rank 0 alone reads and writes it, for all ranks. A copy of the frozen
encoder is in it, so the folder alone classifies pictures.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.paths import ENCODER
from ci2p_cache.cache.staging import StagingArea, disk_errors
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import (
    DigestError,
    InputDataError,
    ManifestError,
    RunMismatchError,
    UsageError,
)
from ci2p_cache.models.own_models import OwnConfig
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.record import read_regular
from ci2p_cache.runs.files import (
    ARGS,
    CODE,
    MODEL_FILE,
    SUMMARY,
    args_bytes,
    read_args,
    summary_csv,
)
from ci2p_cache.training.checkpoint import Checkpoint, CheckpointStore, TrainState
from ci2p_cache.training.inputs import model_record
from ci2p_cache.training.records import RunArgs, RunSettings, TrainObserver
from ci2p_cache.training.trainer import Learner

__all__ = [
    "RunWriter",
    "copy_encoder",
    "open_writer",
    "read_args_file",
    "read_run_args",
    "run_path",
]


def copy_encoder(cache: Cache, config: AnyModelConfig, staging: StagingArea) -> FileRecord | None:
    """Copies a cache's encoder into a run folder, checked against the cache's manifest.

    A copy and not a link: a run outlives its cache, and what damages one file damages its links. It
    has 12 MB for quality 5.

    Args:
        cache: The cache; of a remote one the file is fetched.
        config: The model that is trained.
        staging: The open staging area of the run folder.

    Returns:
        The copy's size and digest; None where the model reads images and needs no encoder.

    Raises:
        DigestError: the cache's encoder is missing or is not the one that was committed.
        ResourceError: the copy cannot be written, or the remote cache's server does not answer.
    """
    if config.reads == "images":
        return None
    committed = cache.manifest.encoder
    path = cache.encoder_path
    try:
        content = read_regular(path, max_bytes=committed.bytes)
    except (OSError, ManifestError) as error:
        raise DigestError(f"{path} cannot be read: {error}", hint=cache.repair_hint) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != committed.sha256:
        raise DigestError(
            f"{path} has sha256 {digest[:12]}..., {committed.sha256[:12]}... was committed",
            hint=cache.repair_hint,
        )
    return staging.put(ENCODER, content)


_OWN_WORK = {".lock", ".staging"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunWriter:
    """The run folder as it is written: checkpoints and `summary.csv`.

    The observer receives epochs that are safe on disk.
    """

    def __init__(self, staging: StagingArea, args: RunArgs, *, observer: TrainObserver) -> None:
        self._staging = staging
        self._observer = observer
        has_average = args.settings.spec.ema > 0
        self._store = CheckpointStore(staging, runs=args.digests, has_average=has_average)
        self._num_epochs = 0

    def load(self) -> Checkpoint | None:
        """Reads the newest whole checkpoint; what was written beyond it is dropped.

        Returns:
            None where the run has not saved one yet.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
            ResourceError: the folder cannot be written.
        """
        checkpoint = self._store.load(self._observer)
        history = checkpoint.state.history if checkpoint is not None else ()
        # Whatever a killed process left there beyond its last checkpoint.
        self._staging.put(SUMMARY, summary_csv(history))
        self._num_epochs = len(history)
        return checkpoint

    def save(self, state: TrainState, learner: Learner) -> None:
        """Writes a checkpoint, and the epoch that has ended with it, if one has.

        Raises:
            ResourceError: it cannot be written; earlier checkpoints are safe.
        """
        self._store.save(learner.checkpoint(state))
        new = state.history[self._num_epochs :]
        if new:
            self._num_epochs = len(state.history)
            self._staging.put(SUMMARY, summary_csv(state.history))
            self._observer.epoch(new[0])


def run_path(runs_dir: Path, name: str | None, settings: RunSettings) -> Path:
    """Returns the folder of a run; without a name its settings give one, always the same.

    Raises:
        UsageError: the name is no plain folder name.
    """
    if name is None:
        # Names of timm's models hold a colon: "timm:deit_tiny_patch16_224".
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", settings.spec.model.partition("#")[0])
        name = f"{model[:90]}-{settings.digest[:8]}"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`name` is {name!r}; wanted up to 100 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    return runs_dir / name


@contextmanager
def open_writer(
    path: Path,
    args: RunArgs,
    *,
    cache: Cache,
    config: AnyModelConfig,
    overwrite: bool,
    observer: TrainObserver,
) -> Iterator[RunWriter]:
    """Makes a run folder, or opens one to continue it; holds its lock while the block runs.

    `args` is what is asked for; with `overwrite` the run that is there is removed first. The
    observer receives epochs, and a notice where device, threads or versions have changed.

    Yields:
        What writes there; `args.yaml`, `model.json` and the encoder's copy stand.

    Raises:
        RunMismatchError: a run with other settings is there, or something else than a run.
        LockedError: another process trains there.
        DigestError: the cache's encoder is missing or is not the one that was committed.
        ResourceError: the folder cannot be written.
    """
    _refuse_foreign(path)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path / ".lock", what="train"):
        _refuse_foreign(path)
        try:
            started = read_run_args(path)
        except ManifestError as error:
            raise RunMismatchError(
                f"cannot read which run this is: {error}",
                hint="choose another --name, or remove the folder by hand",
            ) from error
        if started is not None and overwrite:
            _clear(path)
            started = None
        held = args if started is None else _continued(path, started, args.settings)
        with StagingArea(path, name="train") as staging:
            if held != started:
                # Checkpoints of the shorter run count as well: whatever ends this process here.
                staging.put(ARGS, args_bytes(held.to_dict()))
            if started is not None and started.numerics != args.numerics:
                observer.notice(_changed_numerics(started.numerics, args.numerics))
            if not (path / MODEL_FILE).exists():
                encoder = copy_encoder(cache, config, staging)
                if isinstance(config, OwnConfig) and config.code is not None:
                    staging.put(CODE, config.code.content)
                staging.put_json(MODEL_FILE, model_record(cache, config, encoder))
            yield RunWriter(staging, held, observer=observer)


def read_run_args(path: Path) -> RunArgs | None:
    """Reads a run's `args.yaml`; None where the folder has none, so that it is no run.

    Raises:
        ManifestError: it is damaged or of another version.
    """
    file = path / ARGS
    return read_args_file(file) if file.exists() else None


def read_args_file(file: Path) -> RunArgs:
    """Reads an `args.yaml`, wherever it is and whatever it is called.

    Raises:
        InputDataError: there is no such file.
        ManifestError: it is damaged or of another version.
    """
    try:
        return RunArgs.from_dict(read_args(file.parent, file.name))
    except FileNotFoundError as error:
        raise InputDataError(
            f"there is no file {file}", hint="name the args.yaml of a run: --config RUN/args.yaml"
        ) from error
    except (ManifestError, OSError) as error:
        raise ManifestError(f"{file} is damaged or of another version: {error}") from error


def _refuse_foreign(path: Path) -> None:
    """Raises RunMismatchError where something other than a run, or a run's beginning, is."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir():
        links = sorted(child.name for child in path.iterdir() if child.is_symlink())
        if links:
            raise RunMismatchError(
                f"{path / links[0]} is a link, which may lead anywhere; nothing was changed",
                hint="choose another --name; to keep runs elsewhere, name that place with --out",
            )
        names = {child.name for child in path.iterdir()}
        if ARGS in names or not names - _OWN_WORK:
            return
    raise RunMismatchError(
        f"{path} exists and is no run folder: it has no {ARGS}; nothing was changed",
        hint="choose another --name",
    )


def _continued(path: Path, made: RunArgs, asked: RunSettings) -> RunArgs:
    """Returns what the folder holds from now on: the same run, or the same with more epochs.

    Raises:
        RunMismatchError: the run has other settings, or cannot be given other epochs.
    """
    differences = made.settings.differences(asked)
    if not differences:
        return made
    before, now = made.settings.spec.epochs, asked.spec.epochs
    if [name for name, *_ in differences] == ["spec.epochs"] and before < now:
        if asked.spec.is_extensible:
            return replace(
                made,
                # Where the initial weights are now may be said anew.
                settings=replace(made.settings, spec=asked.spec),
                extended_from=(*made.extended_from, before),
            )
        raise RunMismatchError(
            f"{path} is a run of {before} `epochs` (--epochs), {now} are asked for: every learning "
            "rate of its schedule follows from their number; nothing was changed",
            hint=f"--init-from {shlex.quote(str(path))} with another --name trains on from its "
            "weights. Runs with --min-lr as high as --lr, and --warmup-epochs, take more --epochs.",
        )
    lines = [
        f"  {name}: {ours!r} in the folder, {theirs!r} asked for"
        for name, ours, theirs in differences
    ]
    raise RunMismatchError(
        f"{path} holds a run with other settings; nothing was changed:\n" + "\n".join(lines),
        hint="choose another --name, or leave it out and get a folder for these settings",
    )


def _clear(path: Path) -> None:
    """Removes a run; `args.yaml` last, so that an interrupted removal still leaves a run."""
    children = [child for child in path.iterdir() if child.name not in _OWN_WORK]
    with disk_errors(path):
        for child in sorted(children, key=lambda child: child.name == ARGS):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def _changed_numerics(started: dict[str, str], now: dict[str, str]) -> str:
    changes = [
        f"{name} {started.get(name)} -> {now.get(name)}"
        for name in sorted(started.keys() | now.keys())
        if started.get(name) != now.get(name)
    ]
    return (
        "this run was started with other devices, thread count or versions, so its numbers may "
        f"differ in their last bits from one that was not: {', '.join(changes)}"
    )
