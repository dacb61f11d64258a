"""What an executor is handed: a cache folder that is begun, and what its shards are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoding.intent import Intent
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, ProgressMeter
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import parse_max_errors, refuse_more_bad
from ci2p_cache.images.source import ImageSource

__all__ = ["Place", "Work"]

Place = tuple[str, int]
"""(split, shard)."""


@dataclass(frozen=True, slots=True)
class Work:
    """A cache folder that is begun, and what its missing shards are to be encoded with."""

    root: Path
    images: ImageSource
    options: EncodeOptions
    encoder: FrozenEncoder
    staging: StagingArea
    intent: Intent
    meter: ProgressMeter
    observer: EncodeObserver

    @property
    def bad_allowed(self) -> int:
        """Bad images that the whole cache may hold."""
        return parse_max_errors(self.options.max_errors, self.intent.plan.num_samples)

    def read_of(self, record: CommitRecord) -> tuple[int, int]:
        """Returns the rows of a shard for which an image was read: valid ones and failed ones."""
        carrier = Carrier.of(self.root)
        good, bad = carrier.count(record.split, record.shard) if carrier is not None else (0, 0)
        return record.valid_rows - good, record.rows - record.valid_rows - bad

    def count(self, good: int, bad: int, busy_seconds: float) -> None:
        """Counts images that workers told of.

        Args:
            good: Images with latents.
            bad: Images that could not be decoded.
            busy_seconds: How long g_a has run so far, averaged over the workers.

        Raises:
            TooManyBadImagesError: all workers together found too many.
        """
        for number in range(good + bad):
            self.meter.count(number < good, busy_seconds)
        if bad:
            refuse_more_bad(self.meter.bad, self.bad_allowed, "several workers found them")
