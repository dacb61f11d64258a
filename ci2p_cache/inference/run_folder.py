"""A run folder opened for use: which checkpoint, the model, and the encoder of its latents."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.store import open_cache
from ci2p_cache.errors import (
    CheckpointError,
    DigestError,
    InputDataError,
    ManifestError,
    UsageError,
)
from ci2p_cache.models.registry import AnyModelConfig, build_model
from ci2p_cache.record import differing_fields, read_json
from ci2p_cache.runs.files import ARGS, MODEL_FILE, ModelFile, read_model_file
from ci2p_cache.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    NAME,
    TrainState,
    checkpoint_path,
    read_state,
    weights_of,
)
from ci2p_cache.training.folder import read_run_args
from ci2p_cache.training.records import RunArgs

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["RunFolder", "load_model", "load_run_encoder", "open_run"]


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


def open_run(path: str | Path, *, checkpoint: str | Path = "last") -> RunFolder:
    """Opens a run folder, or a checkpoint folder inside one.

    Args:
        path: `runs/NAME`, or `runs/NAME/checkpoints/epoch-...`, which chooses the checkpoint.
        checkpoint: last, best (highest validation top-1), or a checkpoint folder or its name. Not
            looked at where `path` is a checkpoint folder.

    Raises:
        InputDataError: there is no run, or it has no checkpoint yet.
        ManifestError: `args.yaml` or `model.json` is damaged; names the file.
        CheckpointError: the checkpoint is missing, damaged or of another run; names it.
    """
    path = Path(path)
    if path.parent.name == CHECKPOINTS and not (path / ARGS).exists():
        path, checkpoint = path.parent.parent, path
    args = read_run_args(path)
    if args is None:
        raise InputDataError(f"{path} is no run folder: it has no {ARGS}", hint=_hint(path))
    file, config = read_model_file(path)
    folder = _chosen(path, checkpoint)
    try:
        state = read_state(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    if state.run != args.settings.digest:
        raise CheckpointError(
            f"{folder} is a checkpoint of another run than {path}",
            hint="name one of this run's own: --checkpoint best, or last",
        )
    return RunFolder(path=path, args=args, file=file, config=config, checkpoint=folder, state=state)


def load_model(run: RunFolder, device: torch.device) -> nn.Module:
    """Builds the model with the checkpoint's weights, in eval mode, without gradients.

    torch's own random numbers stay as they were.

    Raises:
        CheckpointError: the weights are damaged or do not fit the model; names the file.
    """
    weights = weights_of(run.checkpoint)
    with torch.random.fork_rng(devices=[]):
        model = build_model(run.config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            f"{run.checkpoint / MODEL} does not fit the model of {run.path / MODEL_FILE}: "
            f"{'; '.join(line.strip() for line in lines[1:4])}",
            hint="name another one: --checkpoint best, or last",
        ) from error
    return model.to(device).eval().requires_grad_(False)


def load_run_encoder(
    run: RunFolder, *, device: torch.device, cache: str | Path | None = None
) -> FrozenEncoder:
    """Loads the encoder that made the latents of a run, and no other.

    It is taken from `cache`, which has the same one, instead of the run folder where one is named.

    Raises:
        InputDataError: the run folder holds none, and no cache is named.
        DigestError: the file is missing, another, or damaged; names it.
        NotACacheError, IncompleteCacheError: the cache cannot be opened.
    """
    # Only here: evaluating from a cache must run where compressai is not installed.
    from ci2p_cache.encoder.load import load_saved_encoder

    wanted = run.file.fingerprint.encoder
    path = _own_copy(run) if cache is None else open_cache(cache, partial=True).encoder_path
    encoder = load_saved_encoder(path, precision=wanted.precision, device=device)
    differences = differing_fields(wanted, encoder.spec)
    if differences:
        listed = "; ".join(f"`{name}` {want!r}, got {got!r}" for name, want, got in differences)
        raise DigestError(
            f"{path} is not the encoder that made the latents of {run.path}: wanted {listed}",
            hint="name the run's own cache: --cache DIR",
        )
    return encoder


def _own_copy(run: RunFolder) -> Path:
    record = run.file.encoder
    if record is None:
        raise InputDataError(
            f"{run.path} holds no encoder: it was begun by a ci2p-cache that did not copy it there",
            hint=f"name the cache that it was trained from: --cache {run.args.cache}",
        )
    path = run.path / record.path
    hint = (
        f"take it from the cache: --cache {run.args.cache}   (or put the file back: it is the "
        "cache's encoder.safetensors)"
    )
    try:
        digest = sha256_file(path)
    except (OSError, ManifestError) as error:
        raise DigestError(f"{path} cannot be read: {error}", hint=hint) from error
    if digest != record.sha256:
        raise DigestError(
            f"{path} is not the encoder that was copied there: sha256 {digest[:12]}..., wanted "
            f"{record.sha256[:12]}...",
            hint=hint,
        )
    return path


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
