"""What a repair found, did and left."""

from __future__ import annotations

from dataclasses import dataclass

from ci2p_cache.cache.verify import Finding
from ci2p_cache.record import Record

__all__ = ["RepairSummary"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSummary(Record):
    """What a repair found, did and left."""

    path: str
    """The cache folder."""
    found: tuple[Finding, ...]
    """What was wrong."""
    repaired: tuple[str, ...]
    """Files written anew, relative to the cache folder, sorted."""
    shards: int
    """Shards encoded again."""
    images: int
    """Images encoded again, bad ones included."""
    identical: bool
    """Whether every repaired byte is known to be as first committed."""
    remaining: tuple[Finding, ...]
    """What is still wrong: foreign files, and what cannot be restored, with the reason."""
