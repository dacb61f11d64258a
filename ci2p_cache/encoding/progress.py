"""What stage one tells while it runs and when it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.record import Record

__all__ = ["EncodeObserver", "EncodeProgress", "EncodeSummary", "ProgressMeter", "summarise"]

_TICK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeProgress:
    """How far a run is; counts cover the whole cache, rates this run."""

    done: int
    """Images encoded or found bad, earlier runs included."""
    total: int
    """Images planned."""
    bad: int
    """Images that could not be decoded, earlier runs included."""
    images_per_second: float
    """Of this run so far."""
    eta_seconds: float | None
    """Expected rest; None before the first image."""
    waiting_share: float
    """Share of the time that g_a stood still, waiting for images: 0 is best."""


class EncodeObserver:
    """Receives what a run has to say; the base class ignores it. Called in the caller's thread."""

    def notice(self, text: str) -> None:
        """Takes one sentence that the user should read."""

    def progress(self, progress: EncodeProgress) -> None:
        """Takes the state of the run, at most ten times a second."""

    def download(self, done_bytes: int, total_bytes: int) -> None:
        """Takes the state of the one-time download of official weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSummary(Record):
    """What a run ended with; totals cover the whole cache."""

    path: str
    """The cache folder."""
    images: int
    """Images with latents."""
    bad: int
    """Images that could not be decoded; `errors.parquet` lists them."""
    views: int
    """Latents stored."""
    classes: int
    """Number of classes."""
    splits: dict[str, int]
    """Images with latents per split."""
    encoded_now: int
    """Images that this run encoded; fewer than `images` when it resumed."""
    seconds: float
    """Wall time of encoding in this run."""
    images_per_second: float
    """`encoded_now` over `seconds`; 0 when nothing was left to do."""
    waiting_share: float
    """Share of the encoding time that g_a waited for images."""
    cache_bytes: int
    """Bytes of all shards and index parts."""
    source_bytes: int
    """Bytes of the source files behind them."""
    clipped: int
    """Symbols saturated at the dtype's limit."""
    exif_turned: int
    """Images whose EXIF orientation asks for a turn."""

    @property
    def bytes_per_image(self) -> float:
        """Cache bytes per image, all its views together."""
        return self.cache_bytes / max(self.images, 1)


class ProgressMeter:
    """Counts images and reports to an observer now and then.

    Args:
        observer: Who is told.
        total: Images planned.
        done: Images committed by earlier runs.
        bad: Bad ones among these.
    """

    def __init__(self, observer: EncodeObserver, *, total: int, done: int, bad: int) -> None:
        self._observer = observer
        self._total = total
        self._first = done
        self._done = done
        self._bad = bad
        self._started = time.perf_counter()
        self._next_tick = 0.0
        self.busy_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the meter was made."""
        return time.perf_counter() - self._started

    @property
    def images_now(self) -> int:
        """Images counted by this meter."""
        return self._done - self._first

    @property
    def waiting_share(self) -> float:
        """Share of the time in which g_a did not run."""
        return max(0.0, 1.0 - self.busy_seconds / max(self.seconds, 1e-9))

    def count(self, good: bool, busy_seconds: float) -> None:
        """Counts one image; `busy_seconds` is how long g_a has run so far."""
        self._done += 1
        self._bad += not good
        self.busy_seconds = busy_seconds
        if self.seconds >= self._next_tick:
            self._next_tick = self.seconds + _TICK_SECONDS
            self.report()

    def report(self) -> None:
        """Tells the observer."""
        rate = self.images_now / max(self.seconds, 1e-9)
        self._observer.progress(
            EncodeProgress(
                done=self._done,
                total=self._total,
                bad=self._bad,
                images_per_second=rate,
                eta_seconds=(self._total - self._done) / rate if rate else None,
                waiting_share=self.waiting_share,
            )
        )


def summarise(
    root: Path, manifest: Manifest, meter: ProgressMeter, seconds: float
) -> EncodeSummary:
    """Builds the summary of a completed cache."""
    splits = manifest.splits
    valid = {name: record.valid_rows or 0 for name, record in splits.items()}
    images = sum(valid.values())
    return EncodeSummary(
        path=str(root),
        images=images,
        bad=sum(record.rows for record in splits.values()) - images,
        views=sum(valid[name] * record.views for name, record in splits.items()),
        classes=len(manifest.classes),
        splits=valid,
        encoded_now=meter.images_now,
        seconds=seconds,
        images_per_second=meter.images_now / seconds if meter.images_now else 0.0,
        waiting_share=meter.waiting_share if meter.images_now else 0.0,
        cache_bytes=sum(record.bytes or 0 for record in splits.values()),
        source_bytes=sum(record.source_bytes or 0 for record in splits.values()),
        clipped=sum(record.clipped or 0 for record in splits.values()),
        exif_turned=sum(record.exif_turned or 0 for record in splits.values()),
    )
