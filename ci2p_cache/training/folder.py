"""The run folder: whose it is, what it is bound to, and who may write there.

::

    runs/<name>/
      args.yaml       what binds the folder (RunSettings), and what it was started with
      model.json      everything needed to rebuild the model and to read its latents
      encoder.safetensors   the cache's, so that the folder alone classifies pictures
      summary.csv     a row per epoch
      tensorboard/    the same as events
      checkpoints/    see checkpoint.py
      evaluations/    what `evaluate` found, see inference/evaluation.py
      .lock           only while somebody trains here
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.staging import StagingArea, disk_errors
from ci2p_cache.errors import ManifestError, RunMismatchError, UsageError
from ci2p_cache.record import differing_fields, read_yaml
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.settings import RunArgs, RunSettings

__all__ = ["open_run_folder", "read_run_args", "run_path"]

_ARGS = "args.yaml"
_MAX_ARGS_BYTES = 2**16
"""Ours have a few thousand."""
_OWN_WORK = {".lock", ".staging"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def run_path(runs_dir: Path, name: str | None, settings: RunSettings) -> Path:
    """Returns the folder of a run; without a name its settings give one, always the same.

    Raises:
        UsageError: the name is no plain folder name.
    """
    if name is None:
        # Names of timm's models hold a colon: "timm:deit_tiny_patch16_224".
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", settings.spec.model)
        name = f"{model[:90]}-{settings.digest[:8]}"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`name` is {name!r}; wanted up to 100 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    return runs_dir / name


@contextmanager
def open_run_folder(
    path: Path, args: RunArgs, *, overwrite: bool, observer: TrainObserver
) -> Iterator[StagingArea]:
    """Makes or takes up a run folder and holds its lock while the block runs.

    Args:
        path: The folder.
        args: What is asked for.
        overwrite: Whether to remove the run that is there first.
        observer: Receives a notice where device, threads or versions have changed since the start.

    Yields:
        The folder's staging area; `args.yaml` stands.

    Raises:
        RunMismatchError: a run with other settings is there, or something else than a run.
        LockedError: another process trains there.
        ResourceError: the folder cannot be written.
    """
    _refuse_foreign(path)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path / ".lock", what="train"):
        _refuse_foreign(path)
        started = _read_args(path)
        if started is not None and overwrite:
            _clear(path)
            started = None
        if started is not None:
            _refuse_difference(path, started.settings, args.settings)
        with StagingArea(path, name="train") as staging:
            if started is None:
                text = yaml.safe_dump(args.to_dict(), sort_keys=False, allow_unicode=True)
                staging.put(_ARGS, text.encode())
            elif started.numerics != args.numerics:
                observer.notice(_changed_numerics(started.numerics, args.numerics))
            yield staging


def _refuse_foreign(path: Path) -> None:
    """Raises RunMismatchError where something other than a run, or a run's beginning, is."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir():
        links = sorted(child.name for child in path.iterdir() if child.is_symlink())
        if links:
            raise RunMismatchError(
                f"{path / links[0]} is a link, which may lead anywhere; nothing was changed",
                hint="choose another --name; to keep runs elsewhere, name that place with --runs",
            )
        names = {child.name for child in path.iterdir()}
        if _ARGS in names or not names - _OWN_WORK:
            return
    raise RunMismatchError(
        f"{path} exists and is no run folder: it has no {_ARGS}; nothing was changed",
        hint="choose another --name",
    )


def read_run_args(path: Path) -> RunArgs | None:
    """Reads a run's `args.yaml`; None where the folder has none, so that it is no run.

    Raises:
        ManifestError: it is damaged or of another version.
    """
    file = path / _ARGS
    if not file.exists():
        return None
    try:
        return RunArgs.from_dict(read_yaml(file, max_bytes=_MAX_ARGS_BYTES))
    except (ManifestError, OSError) as error:
        raise ManifestError(f"{file} is damaged or of another version: {error}") from error


def _read_args(path: Path) -> RunArgs | None:
    try:
        return read_run_args(path)
    except ManifestError as error:
        raise RunMismatchError(
            f"the run cannot be told apart: {error}",
            hint="choose another --name, or remove the folder by hand",
        ) from error


def _refuse_difference(path: Path, made: RunSettings, asked: RunSettings) -> None:
    if made == asked:
        return
    lines = [
        f"  {name}: {ours!r} in the folder, {theirs!r} asked for"
        for name, ours, theirs in differing_fields(made, asked)
    ]
    raise RunMismatchError(
        f"{path} holds a run with other settings; nothing was changed:\n" + "\n".join(lines),
        hint="choose another --name, or leave it out and get a folder for these settings",
    )


def _clear(path: Path) -> None:
    """Removes a run; `args.yaml` goes last, so that what is left stays recognised as a run."""
    children = [child for child in path.iterdir() if child.name not in _OWN_WORK]
    with disk_errors(path):
        for child in sorted(children, key=lambda child: child.name == _ARGS):
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
