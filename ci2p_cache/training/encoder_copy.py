"""The frozen encoder's copy in a run folder: with it the folder alone classifies pictures."""

from __future__ import annotations

import hashlib

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import DigestError, ManifestError
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.record import read_regular

__all__ = ["ENCODER", "copy_encoder"]

ENCODER = "encoder.safetensors"
"""Its name in the run folder; `model.json` records its size and digest."""


def copy_encoder(cache: Cache, config: AnyModelConfig, staging: StagingArea) -> FileRecord | None:
    """Copies a cache's encoder into a run folder, held against the cache's manifest on the way.

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
