"""Encoding shards: read, decode, g_a, quantise, compress, commit, each stage overlapping the next.

::

    readers: file -> bytes -> decoder processes: views --+
                                                         +--> lanes: g_a, quantise --+
    (bounded look-ahead) --------------------------------+                           |
       committer: shard, index, record  <--  readers: crc32c, compress  <------------+

Images are decoded ahead across shards, so lanes do not run dry at a shard's end; batches never
cross a shard and are filled in row order whatever the timing: the same plan gives the same bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import put_shard
from ci2p_cache.cache.index import ChannelSums, IndexRow
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.budget import ErrorBudget, SaturationProbe
from ci2p_cache.encoding.carry import Carrier
from ci2p_cache.encoding.lane import Lane, encode_views, numerics, single_threaded
from ci2p_cache.encoding.plan import ShardPlan
from ci2p_cache.encoding.read_ahead import Awaited, LoadedImage, ReadAhead
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.source import ImageReader
from ci2p_cache.specs import Fingerprint, LatentSpec, LayoutSpec

__all__ = ["EncodeSettings", "ShardEncoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSettings:
    """Everything that encoding a shard needs to know besides the plan and the devices."""

    fingerprint: Fingerprint
    layout: LayoutSpec
    splits: dict[str, SplitRecord]
    classes: tuple[str, ...]
    batch_size: int
    """Views per call of g_a; changes no value."""
    decode_threads: int
    """Threads that read and compress, each with a process that decodes."""


@dataclass(slots=True)
class _Shard:
    """One shard while it is being built."""

    plan: ShardPlan
    rows: list[IndexRow] = field(default_factory=list)
    chunks: list[bytes | None] = field(default_factory=list)
    raw: dict[tuple[int, int], memoryview] = field(default_factory=dict)
    batches: list[Future[Future[ChannelSums]]] = field(default_factory=list)
    carried: list[Future[ChannelSums]] = field(default_factory=list)
    crc32c: dict[tuple[int, int], int] = field(default_factory=dict)
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)


class ShardEncoder:
    """Encodes planned shards and commits each; a context manager that owns its threads, processes.

    Host memory is bounded by two shards of encoded chunks or raw latents (at most 128 MiB each,
    uncompressed; with format `both`, chunks and raw latents),
    the images decoded ahead (their views), two batches per lane, and one full-size image per
    decoder process (at most 24 bytes times `max_pixels`, where it ends as a bad image).

    Args:
        source: Where the images are read from.
        settings: What to make of them.
        lanes: The encoders; all give the same values.
        staging: Where committed files go.
        budget: Counts images that cannot be decoded, and ends the run when they are too many.
        on_image: Called in the caller's thread after each image, with whether it was good.
        carrier: Gives rows that were committed before, of a cache that grows; they are neither read
            nor counted. None where all are encoded.
    """

    def __init__(
        self,
        source: ImageReader,
        settings: EncodeSettings,
        lanes: list[Lane],
        staging: StagingArea,
        *,
        budget: ErrorBudget,
        on_image: Callable[[bool], None],
        carrier: Carrier | None = None,
    ) -> None:
        self._settings = settings
        self._staging = staging
        self._budget = budget
        self._on_image = on_image
        self._latent: LatentSpec = settings.fingerprint.latent
        self._probe = SaturationProbe(self._latent)
        self._codec = codec_of(settings.layout, self._latent)
        self._free_lanes: deque[Lane] = deque(lanes)
        self._num_lanes = len(lanes)
        self._numerics = numerics(lanes[0], settings.batch_size)
        self._slots = threading.Semaphore(2 * len(lanes) + settings.decode_threads)
        self._num_threads = torch.get_num_threads()
        self._busy_lock = threading.Lock()
        self._busy_seconds = 0.0
        self._decoders = Decoders(settings.fingerprint.image, settings.fingerprint.views)
        self._readers = ThreadPoolExecutor(settings.decode_threads, "read", single_threaded)
        self._ahead = ReadAhead(
            source,
            self._decoders,
            self._readers,
            classes=settings.classes,
            most=max(32, 2 * settings.batch_size * len(lanes)),
            carrier=carrier,
        )
        self._lanes = ThreadPoolExecutor(len(lanes), "lane", single_threaded)
        self._committer = ThreadPoolExecutor(1, "commit")

    def __enter__(self) -> ShardEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()
        for pool in (self._readers, self._lanes, self._committer):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._lanes, self._committer):
            pool.shutdown(wait=True)
        # Set in a lane it also reaches MKL's global count; the caller gets its own back.
        torch.set_num_threads(self._num_threads)

    @property
    def busy_seconds(self) -> float:
        """Seconds that g_a ran so far, averaged over the lanes."""
        with self._busy_lock:
            return self._busy_seconds / self._num_lanes

    def encode(self, shards: Iterable[ShardPlan]) -> Iterator[CommitRecord]:
        """Encodes and commits shards in order, yielding each once it is committed.

        Raises:
            TooManyBadImagesError: the error budget is used up; the shard is not committed.
            SaturationError: the symbols do not fit the dtype; the shard is not committed.
            ResourceError: reading or writing failed for good; the same command continues later.
        """
        committing: Future[CommitRecord] | None = None
        for _, loads in groupby(
            self._ahead.read(shards), key=lambda item: (item[0].split, item[0].shard)
        ):
            built = self._encode_shard(loads)
            if committing is not None:
                yield committing.result()
            committing = self._committer.submit(self._finish, built)
        if committing is not None:
            yield committing.result()

    def _encode_shard(self, loads: Iterator[Awaited]) -> _Shard:
        shard: _Shard | None = None
        views: list[torch.Tensor] = []
        places: list[tuple[int, int]] = []
        for plan, sample, future in loads:
            if shard is None:
                record = self._settings.splits[plan.split]
                shard = _Shard(plan, chunks=[None] * (record.shard_rows * record.views))
            loaded = future.result()
            shard.rows.append(loaded.row)
            if loaded.is_carried:
                shard.carried.append(self._readers.submit(self._carry, shard, loaded))
                continue
            self._budget.count(loaded.row)
            self._on_image(loaded.views is not None)
            if loaded.views is None:
                continue
            for number, view in enumerate(loaded.views):
                views.append(view)
                places.append((sample.row - plan.first_row, number))
                if len(views) == self._settings.batch_size:
                    self._submit(shard, views, places)
                    views, places = [], []
        assert shard is not None, "a planned shard holds at least one sample"
        if views:
            self._submit(shard, views, places)
        return shard

    def _carry(self, shard: _Shard, loaded: LoadedImage) -> ChannelSums:
        """Takes a row over; its place in the shard, its sums, and those of clipped values."""
        row, channels = loaded.row, self._latent.channels
        zeros = np.zeros(channels)
        sums = ChannelSums.empty(channels)
        if loaded.stored is not None:
            places = [(row.row - shard.plan.first_row, view) for view in range(len(loaded.stored))]
            self._keep(shard, loaded.stored, places)
            shard.clipped |= dict.fromkeys(places, 0) | {places[0]: row.clipped or 0}
            sums = ChannelSums.of(loaded.stored, zeros)
        return sums if loaded.clipped is None else replace(sums, clipped=loaded.clipped)

    def _submit(
        self, shard: _Shard, views: list[torch.Tensor], places: list[tuple[int, int]]
    ) -> None:
        self._slots.acquire()
        shard.batches.append(self._lanes.submit(self._run_batch, shard, views, places))

    def _run_batch(
        self, shard: _Shard, views: list[torch.Tensor], places: list[tuple[int, int]]
    ) -> Future[ChannelSums]:
        try:
            lane = self._free_lanes.popleft()
            started = time.perf_counter()
            try:
                stored, clipped = encode_views(lane, views, self._latent)
            finally:
                self._free_lanes.append(lane)
                with self._busy_lock:
                    self._busy_seconds += time.perf_counter() - started
            return self._readers.submit(self._pack, shard, stored, clipped, places)
        except BaseException:
            self._slots.release()
            raise

    def _pack(
        self,
        shard: _Shard,
        stored: npt.NDArray[Any],
        clipped: npt.NDArray[Any],
        places: list[tuple[int, int]],
    ) -> ChannelSums:
        try:
            self._keep(shard, stored, places)
            for place, lost in zip(places, clipped.sum(axis=1).tolist(), strict=True):
                shard.clipped[place] = lost
            return ChannelSums.of(stored, clipped.sum(axis=0))
        finally:
            self._slots.release()

    def _keep(self, shard: _Shard, stored: npt.NDArray[Any], places: list[tuple[int, int]]) -> None:
        """Compresses latents, each to its place (row of the shard, view)."""
        num_views = self._settings.splits[shard.plan.split].views
        for latent, (offset, view) in zip(stored, places, strict=True):
            raw = memoryview(latent.reshape(-1).view(np.uint8))
            if self._settings.layout.has_zarr:
                shard.chunks[offset * num_views + view] = self._codec.encode(raw)
            if self._settings.layout.has_tar:
                shard.raw[shard.plan.first_row + offset, view] = raw
            shard.crc32c[offset, view] = google_crc32c.value(bytes(raw))

    def _finish(self, shard: _Shard) -> CommitRecord:
        sums = ChannelSums.empty(self._latent.channels)
        for carried in shard.carried:
            sums = sums + carried.result()
        for batch in shard.batches:
            sums = sums + batch.result().result()
        self._probe.check(sums)
        plan, settings = shard.plan, self._settings
        views = range(settings.splits[plan.split].views)
        good = [row for row in shard.rows if row.status == "ok"]
        for row in good:
            offset = row.row - plan.first_row
            row.latent_crc32c = [shard.crc32c[offset, view] for view in views]
            row.clipped = sum(shard.clipped[offset, view] for view in views)
        return put_shard(
            self._staging,
            partial(
                CommitRecord,
                first_row=plan.first_row,
                rows=len(plan.samples),
                valid_rows=len(good),
                plan_sha256=plan.sha256,
                fingerprint=settings.fingerprint.digest,
                numerics=self._numerics,
            ),
            place=(plan.split, plan.shard),
            layout=settings.layout,
            shape=settings.splits[plan.split],
            latent=self._latent,
            rows=shard.rows,
            sums=sums,
            chunks=shard.chunks,
            raw=shard.raw,
        )
