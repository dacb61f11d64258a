"""Whether the decoders here are those that a cache was made with: others give other pixels."""

from __future__ import annotations

from ci2p_cache.errors import FingerprintMismatchError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.specs import Fingerprint

__all__ = ["refuse_other_decoder"]


def refuse_other_decoder(fingerprint: Fingerprint) -> None:
    """Holds this machine's decoders against those of a cache.

    Raises:
        FingerprintMismatchError: they differ, so images would give other pixels.
    """
    made, here = fingerprint.image.decoder, decoder_name()
    if made != here:
        raise FingerprintMismatchError(
            f"the cache was made with {made}; here is {here}, which may give other pixels. "
            "Nothing was changed",
            hint=f"install {made}, then run the same command",
        )
