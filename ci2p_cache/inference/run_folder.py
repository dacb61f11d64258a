"""What a run folder needs to classify: its model with weights, and the encoder of its latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.store import open_cache
from ci2p_cache.errors import CheckpointError, DigestError, InputDataError, ManifestError
from ci2p_cache.models.own_models import with_own_code
from ci2p_cache.models.registry import build_model
from ci2p_cache.record import differing_fields
from ci2p_cache.runs.files import CODE, MODEL_FILE
from ci2p_cache.training.checkpoint import MODEL
from ci2p_cache.training.opened import RunFolder, open_run

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["encoder_file", "load_model", "load_run_encoder", "open_model"]


def open_model(path: str | Path, *, checkpoint: str | Path, named: str | Path | None) -> RunFolder:
    """Opens a run whose model is going to run: one of the user's own only if its file is named.

    Args:
        path: As for `open_run`.
        checkpoint: As for `open_run`.
        named: The file of the run's own model, `FILE.py`; None: it has none.

    Raises:
        RefusedError: the run has a model of its own, and no file is named.
        RunMismatchError: the file has changed since the run was started.
        UsageError: the run's model needs no file, or the file cannot be used.
        CacheError: whatever `open_run` raises.
    """
    run = open_run(path, checkpoint=checkpoint)
    return replace(run, config=with_own_code(run.config, named, run=run.path, copy=run.path / CODE))


def load_model(run: RunFolder, device: torch.device) -> nn.Module:
    """Builds the model with the checkpoint's weights, in eval mode, without gradients.

    torch's own random numbers stay as they were.

    Raises:
        CheckpointError: the weights are damaged or do not fit the model; names the file.
    """
    weights, _ = run.weights()
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

    wanted, path = run.file.fingerprint.encoder, encoder_file(run, cache)
    encoder = load_saved_encoder(path, precision=wanted.precision, device=device)
    differences = differing_fields(wanted, encoder.spec)
    if differences:
        listed = "; ".join(f"`{name}` {want!r}, got {got!r}" for name, want, got in differences)
        raise DigestError(
            f"{path} is not the encoder that made the latents of {run.path}: wanted {listed}",
            hint="name the run's own cache: --cache DIR",
        )
    return encoder


def encoder_file(run: RunFolder, cache: str | Path | None) -> Path:
    """Returns the encoder's file: the run's own, checked by its digest, or that of the cache.

    Raises:
        InputDataError, DigestError, NotACacheError, IncompleteCacheError: as `load_run_encoder`.
    """
    if cache is not None:
        return open_cache(cache, partial=True).encoder_path
    record = run.file.encoder
    if record is None:
        raise InputDataError(
            f"{run.path} holds no encoder: it was begun by a ci2p-cache that did not copy it there",
            hint=f"name the cache that it was trained from: --cache {run.args.cache or 'DIR'}",
        )
    path = run.path / record.path
    hint = (
        f"take it from the cache: --cache {run.args.cache or 'DIR'}   (or put the file back: it is "
        "the cache's encoder.safetensors)"
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
