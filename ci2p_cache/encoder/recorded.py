"""The encoder that is in a cache, held to what the cache's manifest says of it."""

from __future__ import annotations

from pathlib import Path

from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_saved_encoder
from ci2p_cache.errors import DigestError, command
from ci2p_cache.record import differing_fields, regular_file
from ci2p_cache.specs import EncoderSpec

__all__ = ["load_recorded_encoder"]


def load_recorded_encoder(path: Path, spec: EncoderSpec) -> FrozenEncoder:
    """Loads an encoder file that must hold a certain encoder, and no other.

    Args:
        path: What `FrozenEncoder.save` wrote, such as a cache's encoder.safetensors.
        spec: The encoder that made the latents, as the cache's fingerprint has it.

    Raises:
        DigestError: the file holds another encoder, intact as it may be.
        ManifestError: it is a link or no regular file.
        WeightsError: it is missing, foreign or damaged.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
    """
    try:
        with regular_file(path):
            pass
    except OSError:
        # Loading says it better.
        pass
    encoder = load_saved_encoder(path, precision=spec.precision)
    differences = differing_fields(spec, encoder.spec)
    if differences:
        told = "; ".join(f"`{name}` {wanted!r}, got {got!r}" for name, wanted, got in differences)
        raise DigestError(
            f"{path} is not the encoder that made the latents of this cache: wanted {told}",
            hint=command("verify", path.parent, "--repair"),
        )
    return encoder
