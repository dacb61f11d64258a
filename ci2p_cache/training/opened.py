"""`open_run`: a run folder opened for use, and which of its checkpoints is meant.

A folder to share (`export --format huggingface`) opens as a run with one checkpoint.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import (
    CacheError,
    CheckpointError,
    InputDataError,
    ManifestError,
    UsageError,
)
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.record import read_json
from ci2p_cache.runs.files import ARGS, SHARED, ModelFile, read_model, read_model_file
from ci2p_cache.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    NAME,
    TrainState,
    checkpoint_path,
    read_state,
    weights_and_digest,
)
from ci2p_cache.training.folder import read_run_args
from ci2p_cache.training.records import RunArgs

__all__ = ["SHARED_KEY", "SHARED_VERSION", "RunFolder", "open_run"]

SHARED_KEY, SHARED_VERSION = "ci2p_cache", 1
"""Where the `config.json` of a folder to share has what it is opened by, and its version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run, and one of its checkpoints."""

    path: Path
    """The run folder."""
    args: RunArgs
    """What it is bound to, and where its cache was."""
    file: ModelFile
    """Its `model.json`."""
    config: AnyModelConfig
    """Its model."""
    checkpoint: Path
    """The folder of the chosen checkpoint."""
    state: TrainState
    """Where training stood there."""
    shared: dict[str, FileRecord] | None = None
    """The files of a folder to share, by name, which is its own checkpoint; None: it is a run."""

    def weights(self) -> tuple[dict[str, Tensor], str]:
        """Returns the chosen weights, on CPU, and the sha256 of their file.

        Raises:
            CheckpointError: they are missing, damaged or of another version.
        """
        return weights_and_digest(self.checkpoint, self.shared)


def open_run(path: str | Path, *, checkpoint: str | Path = "last") -> RunFolder:
    """Opens a run folder, a checkpoint folder inside one, or a folder to share.

    Args:
        path: `runs/NAME`, or `runs/NAME/checkpoints/epoch-...`, which chooses the checkpoint.
        checkpoint: last, best (highest validation top-1), or a checkpoint folder or its name. Not
            looked at where `path` is a checkpoint folder or a folder to share.

    Raises:
        InputDataError: there is no run, or it has no checkpoint yet, or is of another library.
        ManifestError: `args.yaml` or `model.json` is damaged; names the file.
        CheckpointError: the checkpoint is missing, damaged or of another run; names it.
    """
    path = Path(path)
    if path.parent.name == CHECKPOINTS and not (path / ARGS).exists():
        path, checkpoint = path.parent.parent, path
    args = read_run_args(path)
    if args is None and (path / SHARED).exists():
        return _shared(path)
    if args is None:
        raise InputDataError(f"{path} is no run folder: it has no {ARGS}", hint=_hint(path))
    file, config = read_model_file(path)
    folder = _chosen(path, checkpoint)
    try:
        state = read_state(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    if state.run not in args.digests:
        raise CheckpointError(
            f"{folder} is a checkpoint of another run than {path}",
            hint="name one of this run's own: --checkpoint best, or last",
        )
    return RunFolder(path=path, args=args, file=file, config=config, checkpoint=folder, state=state)


def _shared(path: Path) -> RunFolder:
    """Opens a folder to share, which may come from a stranger."""
    data = read_json(path / SHARED)
    own = data.get(SHARED_KEY)
    if not isinstance(own, dict):
        known = data.get("model_type") or data.get("architecture") or data.get("architectures")
        raise InputDataError(
            f"{path / SHARED} is not of ci2p-cache but of {str(known or 'something else')[:80]!r}",
            hint="name a run, or a folder of `ci2p-cache export --format huggingface`",
        )
    if own.get("version") != SHARED_VERSION:
        raise ManifestError(
            f"{path / SHARED} has `version` {str(own.get('version'))[:40]}; this ci2p-cache reads "
            f"{SHARED_VERSION}",
            hint="use the version of ci2p-cache that wrote it",
        )
    try:
        args, state = RunArgs.from_dict(own["args"]), TrainState.from_dict(own["state"])
        file, config = read_model(own["model"] | _classes(data["id2label"], own["model"]))
        weights = FileRecord.from_dict(own["weights"])
    except (CacheError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(
            f"{path / SHARED} is damaged: {error!r}", hint="get the folder again where it came from"
        ) from error
    return RunFolder(
        path=path, args=args, file=file, config=config, checkpoint=path, state=state,
        shared={MODEL: weights},
    )  # fmt: skip


def _classes(labels: dict[str, str], model: dict[str, Any]) -> dict[str, list[str]]:
    """Returns names and titles of the classes; one that was renamed has its name for a title."""
    classes = [labels[str(number)] for number in range(len(labels))]
    if len({*filter(None, classes)}) < len(classes):
        raise ValueError("`id2label` has a name twice, or an empty one")
    known = zip(classes, model["classes"], model["class_titles"], strict=False)
    titles = [title if name == old else name for name, old, title in known]
    return {"classes": classes, "class_titles": titles}


def _hint(path: Path) -> str:
    """Returns what to name instead: the newest run in that folder or in `runs`, if there is one."""
    found = [args.parent for runs in (path, Path("runs")) for args in runs.glob(f"*/{ARGS}")]
    if not found:
        return "name a folder that `ci2p-cache train` made, for example runs/NAME"
    newest = max(found, key=lambda run: run.stat().st_mtime)
    return f"did you mean {shlex.quote(str(newest))}?"


def _chosen(run: Path, checkpoint: str | Path) -> Path:
    """Returns the folder of the checkpoint that is asked for."""
    name: Any = str(checkpoint)
    if name in ("best", "last"):
        pointer = run / CHECKPOINTS / "last.json"
        try:
            name = read_json(pointer).get(name)
        except FileNotFoundError as error:
            raise InputDataError(
                f"{run} has no checkpoint yet", hint="wait until `train` has saved one"
            ) from error
        except (ManifestError, OSError) as error:
            raise CheckpointError(
                f"{pointer} is damaged: {error}",
                hint="name the folder: --checkpoint epoch-0001-step-000000; `train` repairs it",
            ) from error
        if name is None:
            raise InputDataError(
                f"{run} has no {checkpoint} checkpoint yet: its first epoch has not ended",
                hint="repeat the command with --checkpoint last",
            )
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(f"{pointer} is damaged: it points to {str(name)[:80]!r}")
    folder = checkpoint_path(run, name) if NAME.fullmatch(name) else Path(checkpoint)
    if not NAME.fullmatch(name) and not folder.exists():
        raise UsageError(f"`checkpoint` is {name!r}; wanted best, last or a checkpoint folder")
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder, or a link")
    return folder
