"""The encoder of a run: the copy in its folder, or that of a cache, held to the run's records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.store import open_cache
from ci2p_cache.errors import DigestError, InputDataError, ManifestError
from ci2p_cache.inference.run_folder import RunFolder
from ci2p_cache.record import differing_fields

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["load_run_encoder"]


def load_run_encoder(
    run: RunFolder, *, device: torch.device, cache: str | Path | None = None
) -> FrozenEncoder:
    """Loads the encoder that made the latents of a run, and no other.

    Args:
        run: The run.
        device: Where it runs.
        cache: A cache with the same encoder, to take it from instead of the run folder.

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
        told = "; ".join(f"`{name}` {want!r}, got {got!r}" for name, want, got in differences)
        raise DigestError(
            f"{path} is not the encoder that made the latents of {run.path}: wanted {told}",
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
