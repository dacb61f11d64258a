"""A trial: a sample of the images really encoded, timed and weighed, and thrown away.

::

    missing shards --draw--> small shards --ShardEncoder--> scratch folder: files, rates, bad files

A sample that is not the whole source is timed between two marks: when the warm-up has passed and
the pipeline is full, and when the last small shard was handed in and it still is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import read_index, read_sums
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import commit_path, index_path
from ci2p_cache.cache.staging import StagingArea, remove_path
from ci2p_cache.encoding.budget import ErrorBudget
from ci2p_cache.encoding.dry_run.sample import BadFile
from ci2p_cache.encoding.lane import Lane
from ci2p_cache.encoding.plan import ShardPlan
from ci2p_cache.encoding.shard import EncodeSettings, ShardEncoder
from ci2p_cache.images.source import ImageSource
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.specs import LayoutSpec

__all__ = ["EncodeTrial", "shard_index_bytes", "try_encoding"]


@dataclass(slots=True)
class EncodeTrial:
    """What encoding a sample showed."""

    warm_seconds: float = 0.0
    """From the start until the first mark."""
    warm_images: int = 0
    """Images until then."""
    seconds: float = 0.0
    """Between the marks; of a whole source: from start to end."""
    images: int = 0
    """Images between the marks."""
    busy_seconds: float = 0.0
    """Of these seconds, how long g_a ran, averaged over the lanes."""
    drain_seconds: float = 0.0
    """From the last image handed to g_a to its commit."""
    encoded: int = 0
    """Images of the sample, warm-up and bad ones included."""
    view_bytes: dict[str, float] = field(default_factory=dict)
    """Stored bytes of one view in all containers together, by split."""
    shard_bytes: int = 0
    """Bytes of all files that the sample was committed as."""
    index_row_bytes: float = 0.0
    """Bytes that a row adds to an index part."""
    index_part_bytes: float = 0.0
    """Bytes of an index part before its rows."""
    commit_bytes: float = 0.0
    """Bytes of one commit record."""
    clipped: int = 0
    """Symbols saturated at the dtype's limit."""
    symbols: int = 0
    """Stored values."""
    bad: list[BadFile] = field(default_factory=list)
    """Images of the sample that cannot be decoded."""


def shard_index_bytes(record: SplitRecord, layout: LayoutSpec) -> int:
    """Returns what a shard takes beside its samples.

    Of a zarr shard that is the index at its end, offset and size of each chunk; of a tar its end.
    """
    zarr = 16 * record.shard_rows * record.views + 4
    return zarr * layout.has_zarr + 1024 * layout.has_tar


def try_encoding(
    images: ImageSource,
    settings: EncodeSettings,
    lanes: list[Lane],
    shards: Sequence[ShardPlan],
    scratch: Path,
    *,
    warm_images: int | None,
    seconds: float,
    on_image: Callable[[bool, float], None],
) -> EncodeTrial:
    """Encodes shards into a scratch folder the way a run does, and removes them again.

    Args:
        images: The source.
        settings: What a run would take, with the shape of `shards` in its splits.
        lanes: What a run would take.
        shards: What to encode.
        scratch: An empty folder.
        warm_images: Images that are not timed; None to time all from start to end.
        seconds: Time between the marks after which no other shard is begun.
        on_image: Called after each image, with whether it was good and how long g_a has run.

    Raises:
        TooManyBadImagesError: the first 64 images could all not be decoded.
        SaturationError: the symbols do not fit the dtype.
        ResourceError: reading or writing failed.
    """
    clock = _Clock(warm_images, seconds, on_image)
    found = EncodeTrial()
    scale = _Scale(scratch, settings, found)
    # What counts against the budget is what a run finds; a sample only counts.
    budget = ErrorBudget(sum(len(shard.samples) for shard in shards))
    with (
        StagingArea(scratch) as staging,
        ShardEncoder(
            images, settings, lanes, staging, budget=budget, on_image=clock.count
        ) as encoder,
    ):
        clock.busy = lambda: encoder.busy_seconds
        for record in encoder.encode(clock.until_enough(shards)):
            scale.weigh(record)
        clock.finish(found)
    scale.finish()
    return found


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment of a trial."""

    seconds: float
    images: int
    busy_seconds: float


class _Clock:
    """Says when a trial is past its warm-up and when it was long enough."""

    def __init__(
        self, warm_images: int | None, seconds: float, on_image: Callable[[bool, float], None]
    ) -> None:
        self._warm_images = warm_images
        self._seconds = seconds
        self._on_image = on_image
        self._start = time.perf_counter()
        self._images = 0
        self._warm: _Mark | None = None
        self._full: _Mark | None = None
        self._last = 0.0
        self.busy: Callable[[], float] = lambda: 0.0

    def _mark(self) -> _Mark:
        return _Mark(time.perf_counter() - self._start, self._images, self.busy())

    def count(self, good: bool) -> None:
        """Counts an image that is handed to g_a, or is bad."""
        self._images += 1
        self._on_image(good, self.busy())
        self._last = time.perf_counter() - self._start
        if (
            self._warm is None
            and self._warm_images is not None
            # A slow machine is not to warm up for minutes.
            and (self._images >= self._warm_images or self._last > self._seconds)
        ):
            self._warm = self._mark()

    def until_enough(self, shards: Iterable[ShardPlan]) -> Iterator[ShardPlan]:
        """Yields shards until the time is up."""
        for shard in shards:
            if self._warm is not None and self._mark().seconds - self._warm.seconds > self._seconds:
                break
            yield shard
        self._full = self._mark()

    def finish(self, found: EncodeTrial) -> None:
        """Writes down what was timed."""
        end, warm, full = self._mark(), self._warm, self._full
        if warm is None or full is None or full.images <= warm.images:
            warm, full = _Mark(0.0, 0, 0.0), end
        found.warm_seconds, found.warm_images = warm.seconds, warm.images
        found.seconds, found.images = full.seconds - warm.seconds, full.images - warm.images
        found.busy_seconds = full.busy_seconds - warm.busy_seconds
        found.drain_seconds = end.seconds - self._last
        found.encoded = end.images


class _Scale:
    """Weighs what was committed, and takes it away so that a trial needs little room."""

    def __init__(self, scratch: Path, settings: EncodeSettings, found: EncodeTrial) -> None:
        self._scratch = scratch
        self._settings = settings
        self._found = found
        self._views: dict[str, int] = {}
        self._latent_bytes: dict[str, int] = {}
        self._records: list[int] = []
        self._parts: list[pa.Table] = []

    def weigh(self, record: CommitRecord) -> None:
        """Takes in one committed shard."""
        shape, found = self._settings.splits[record.split], self._found
        table = read_index(self._scratch, record.split, record.shard)
        commit = self._scratch / commit_path(record.split, record.shard)
        views = record.valid_rows * shape.views
        self._views[record.split] = self._views.get(record.split, 0) + views
        index = index_path(record.split, record.shard)
        latents = sum(file.bytes for file in record.files if file.path != index)
        stored = latents - shard_index_bytes(shape, self._settings.layout)
        self._latent_bytes[record.split] = self._latent_bytes.get(record.split, 0) + stored
        self._records.append(commit.stat().st_size)
        self._parts.append(table)
        found.shard_bytes += sum(file.bytes for file in record.files)
        found.clipped += int(read_sums(table).clipped.sum())
        found.symbols += views * int(np.prod(self._settings.fingerprint.latent.shape))
        for row in table.select(["path", "status", "error"]).to_pylist():
            if row["status"] != "ok":
                found.bad.append(BadFile(row["path"], row["error"]))
        for file in record.files:
            remove_path(self._scratch / file.path)
        remove_path(commit)

    def finish(self) -> None:
        """Writes down means."""
        found = self._found
        found.view_bytes = {
            split: self._latent_bytes[split] / views
            for split, views in self._views.items()
            if views
        }
        if not self._parts:
            return
        found.commit_bytes = sum(self._records) / len(self._records)
        metadata = self._parts[0].schema.metadata
        rows = pa.concat_tables([part.replace_schema_metadata(None) for part in self._parts])
        rows = rows.replace_schema_metadata(metadata)
        # Two sizes give the line: what any part has, and what each row adds.
        half = rows.num_rows // 2
        whole_bytes, half_bytes = (
            len(parquet_bytes(rows)),
            len(parquet_bytes(rows.slice(0, half))),
        )
        found.index_row_bytes = (whole_bytes - half_bytes) / (rows.num_rows - half)
        found.index_part_bytes = max(0.0, whole_bytes - found.index_row_bytes * rows.num_rows)
