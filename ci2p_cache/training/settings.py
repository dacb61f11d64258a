"""What a run folder is bound to, and what else was known when it was started: `args.yaml`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record, differing_fields
from ci2p_cache.specs import Fingerprint
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.spec import TrainSpec

__all__ = ["RunArgs", "RunSettings", "require_same_settings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Record):
    """What binds a run folder: everything that the numbers of a run depend on."""

    spec: TrainSpec
    """How it trains."""
    fingerprint: Fingerprint
    """How the cache's latents were made."""
    data_sha256: str
    """Digest of which samples the cache holds, their order, labels and validity."""
    loader: str
    """Kind of the loader: LatentLoader reads the cache, others may give other numbers."""

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of all that binds, 64 hex digits."""
        fields = self.to_dict() | {"spec": self.spec.binding()}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunArgs(Record):
    """The content of `args.yaml`."""

    version: int = 1
    """Version of this record."""
    cache: str
    """Where the cache was; information only."""
    numerics: dict[str, str]
    """Device, threads and versions at the start; others may change the last bits."""
    settings: RunSettings
    """What binds the folder."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(f"`version` is {self.version}; this ci2p-cache reads 1")


def require_same_settings(settings: RunSettings, ranks: Ranks) -> None:
    """Refuses ranks that were asked for other things, or read other caches; waits for all.

    Args:
        settings: This rank's.
        ranks: Those that train together.

    Raises:
        UsageError: this rank's differ from those of rank 0; the message lists them.
    """
    if ranks.world_size == 1:
        return
    wanted = ranks.share(json.dumps(settings.to_dict()).encode())
    lines = [
        f"  {name}: {ours!r} on rank 0, {theirs!r} on rank {ranks.rank}"
        for name, ours, theirs in differing_fields(
            RunSettings.from_dict(json.loads(wanted)), settings
        )
    ]
    if lines:
        raise UsageError("the ranks were started with other settings:\n" + "\n".join(lines))
    # Nothing is written before all agree.
    ranks.wait()
