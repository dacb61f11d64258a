"""What stage one reports while it runs and when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.record import Record

if TYPE_CHECKING:
    from ci2p_cache.cache.summary import StoredSize

__all__ = [
    "EncodeObserver", "EncodeProgress", "EncodeSummary", "ProgressMeter", "summarise",
]  # fmt: skip

_TICK_SECONDS = 0.1
_WARM_UP_SECONDS = 2.0
"""From the first image on: decoders start and fill the queues, which no rate should count."""


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
    """Speed of this run so far."""
    eta_seconds: float | None
    """Expected rest, by the rate since the warm-up; None until then."""
    waiting_share: float
    """Share of the time that g_a stood still, waiting for images: 0 is best."""


class EncodeObserver:
    """Receives what a run has to say; the base class ignores it. Called in the caller's thread."""

    def notice(self, text: str) -> None:
        """Takes one sentence that the user should read."""

    def planned(self, text: str) -> None:
        """Takes the splits, classes and counts, in one line, before the first image is encoded."""

    def progress(self, progress: EncodeProgress) -> None:
        """Takes the state of the run, at most ten times a second."""

    def download(self, done_bytes: int, total_bytes: int) -> None:
        """Takes the state of the one-time download of official weights.

        Args:
            done_bytes: Fetched so far.
            total_bytes: Of the whole file.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSummary(Record):
    """What a run ended with; totals cover the whole cache, or its range if others are missing."""

    path: str
    """The cache folder."""
    complete: bool
    """Whether every shard is committed and the cache finalised."""
    shards: int
    """Shards planned, of the whole cache."""
    shard_range: str | None
    """The range that the totals speak of, for example 2/4; None for the whole cache."""
    images: int
    """Images with latents."""
    bad: int
    """Images that could not be decoded; `errors.parquet` lists them."""
    views: int
    """Latents stored."""
    classes: int
    """Number of classes."""
    splits: dict[str, int] = field(hash=False)
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
    source_bytes: int | None
    """Bytes of the source files behind them; None until the cache is complete."""
    clipped: int | None
    """Symbols saturated at the dtype's limit; None until the cache is complete."""
    exif_turned: int | None
    """Images whose EXIF orientation asks for a turn; None until the cache is complete."""

    @property
    def bytes_per_image(self) -> float:
        """Cache bytes per image, all its views together."""
        return self.stored.bytes_per_image or 0.0

    @property
    def stored(self) -> StoredSize:
        """`cache_bytes` per view and per image."""
        # Here, because `encode` needs this module before pyarrow, which starts a thread.
        from ci2p_cache.cache.summary import stored_size

        return stored_size(
            self.cache_bytes, images=self.images, views=self.views, source_bytes=self.source_bytes
        )


@dataclass
class ProgressMeter:
    """Counts images and reports to an observer now and then."""

    observer: EncodeObserver
    total: int
    """Images planned."""
    done: int
    """Images encoded or found bad, earlier runs included."""
    bad: int
    """Images that could not be decoded, earlier runs included."""
    clock: Callable[[], float] = time.perf_counter
    busy_seconds: float = 0.0
    """How long g_a has run."""

    def __post_init__(self) -> None:
        self._first, self._started, self._next_tick = self.done, self.clock(), 0.0
        self._first_image: float | None = None
        self._warm: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the meter was made."""
        return self.clock() - self._started

    @property
    def images_now(self) -> int:
        """Images counted by this meter."""
        return self.done - self._first

    @property
    def waiting_share(self) -> float:
        """Share of the time in which g_a did not run."""
        return max(0.0, 1.0 - self.busy_seconds / max(self.seconds, 1e-9))

    def count(self, good: bool, busy_seconds: float) -> None:
        """Counts one image; `busy_seconds` is how long g_a has run so far."""
        self.done += 1
        self.bad += not good
        self.busy_seconds = busy_seconds
        if self._first_image is None:
            self._first_image = self.seconds
        if self._warm is None and self.seconds >= self._first_image + _WARM_UP_SECONDS:
            self._warm = (self.seconds, self.images_now)
        if self.seconds >= self._next_tick:
            self._next_tick = self.seconds + _TICK_SECONDS
            self.report()

    def take_back(self, good: int, bad: int) -> None:
        """Uncounts images whose worker was lost: they are encoded, and counted, again."""
        self.done -= good + bad
        self.bad -= bad

    def report(self) -> None:
        """Calls the observer."""
        eta = 0.0 if self.done == self.total else None
        if self._warm is not None and self.images_now > self._warm[1]:
            since, counted = self._warm
            left = self.total - self.done
            eta = left * (self.seconds - since) / (self.images_now - counted)
        self.observer.progress(
            EncodeProgress(
                done=self.done,
                total=self.total,
                bad=self.bad,
                images_per_second=self.images_now / max(self.seconds, 1e-9),
                eta_seconds=eta,
                waiting_share=self.waiting_share,
            )
        )


def summarise(
    root: Path,
    manifest: Manifest,
    meter: ProgressMeter,
    seconds: float,
    commits: Iterable[CommitRecord] | None = None,
    *,
    part: ShardRange | None = None,
) -> EncodeSummary:
    """Builds the summary of a cache, or of what is committed of one that is not complete.

    Without `commits`, the records of a range or of what is there, it sums up all of a complete one.
    """
    splits, size = manifest.splits, 0
    valid, planned = dict.fromkeys(splits, 0), 0
    if commits is None:
        valid = {name: record.valid_rows or 0 for name, record in splits.items()}
        planned = sum(record.rows for record in splits.values())
        size = sum(record.bytes or 0 for record in splits.values())
    for commit in commits or ():
        valid[commit.split] += commit.valid_rows
        planned += commit.rows
        size += sum(file.bytes for file in commit.files)
    images = sum(valid.values())

    def total(name: str) -> int | None:
        if not manifest.is_complete:
            return None
        return sum(getattr(record, name) or 0 for record in splits.values())

    return EncodeSummary(
        path=str(root),
        complete=manifest.is_complete,
        shards=sum(record.num_shards for record in splits.values()),
        shard_range=None if part is None or commits is None else str(part),
        images=images,
        bad=planned - images,
        views=sum(valid[name] * record.views for name, record in splits.items()),
        classes=len(manifest.classes),
        splits=valid,
        encoded_now=meter.images_now,
        seconds=seconds,
        images_per_second=meter.images_now / seconds if meter.images_now else 0.0,
        waiting_share=meter.waiting_share if meter.images_now else 0.0,
        cache_bytes=size,
        source_bytes=total("source_bytes"),
        clipped=total("clipped"),
        exif_turned=total("exif_turned"),
    )
