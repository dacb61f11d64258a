"""`dry_run`: forecasts what `encode` would take, from a sample that it encodes and removes.

::

    source --list, plan--> missing shards --draw--> pieces of neighbouring rows
    pieces       --ShardEncoder, as in a run--> temporary folder: rates, bytes, bad images
    other pieces --read and decode alone-->     the rate of decoding, more bad images

A source of a few hundred images is encoded whole. The cache folder is neither made nor changed.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import read_index, read_sums
from ci2p_cache.cache.lock import LOCK, live_ranges, lock_holder
from ci2p_cache.cache.paths import commit_path, index_path
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path
from ci2p_cache.encoding.intent import Intent, committed_shards, find_intent, load_chosen
from ci2p_cache.encoding.locks import interruptible, refuse_out
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import Plan, ShardPlan
from ci2p_cache.encoding.progress import EncodeObserver, ProgressMeter
from ci2p_cache.encoding.rows import load_image, read_ahead
from ci2p_cache.encoding.shard import (
    EncodeSettings,
    ErrorBudget,
    Replica,
    ShardEncoder,
    make_replicas,
    parse_max_errors,
    single_threaded,
)
from ci2p_cache.encoding.worker import ShardId
from ci2p_cache.errors import (
    CacheError,
    DiskFullError,
    LockedError,
    TooManyBadImagesError,
    UsageError,
)
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.record import Record

__all__ = ["DryRunReport", "dry_run"]

_IMAGES = 256
"""Images timed on a CPU of two cores; about 10 s there."""
_BATCHES_PER_REPLICA = 16
"""On larger machines so many batches of each replica are timed, if that is more."""
_SECONDS = 20.0
"""No other images are handed in after that, warm-up included: a slow machine takes fewer."""
_PIECE_IMAGES = 32
"""Images between two commits of the sample; a run's shards have up to 1,024."""
_DECODED_IMAGES = 2048
_DECODE_SECONDS = 2.0
"""Decoding alone: 2 s are 1,500 images on one core, enough to see a share of 0.2 % bad ones."""

_BAD_SHOWN = 10
_WAITING = 0.1
"""From that share of the time on in which g_a waits, images do not come fast enough."""
_Z = 1.645
"""Standard deviations below which 95 % of a normal distribution are."""
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_FOLDER_BYTES = 16_000
_SPLIT_BYTES = 11_000
_COMMIT_BYTES = 1_250
"""Files that speak of the whole cache, those of each split, and of each shard its commit record and
its lines in checksums.sha256: what caches of 90 images with 192 channels have (measured)."""

_Piece = tuple[str, int, int]
"""(split, shard, the first of its rows within the shard)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunReport(Record):
    """What a run with the same arguments would do, estimated from a sample."""

    path: str
    """The cache folder."""
    source: str
    """The source of images."""
    images: int
    """Images planned, committed ones included."""
    classes: int
    """Number of classes."""
    splits: dict[str, int] = field(hash=False)
    """Images planned per split."""
    views: dict[str, int] = field(hash=False)
    """Views of each image, per split."""
    shards: int
    """Shards planned."""
    committed_shards: int
    """Shards that earlier runs committed."""
    images_left: int
    """Images that would be encoded now; all other figures speak of these."""
    sampled: int
    """Images that were encoded to find out, warm-up included."""
    sampled_seconds: float
    """Time over which the rate was measured, after the warm-up; 0 when nothing is left to do."""
    images_per_second: float
    """Expected rate; 0 when nothing is left to do."""
    encoder_share: float
    """Share of that time in which g_a ran; the rest it waited for images."""
    decode_images_per_second: float
    """Reading, decoding and resizing alone, all decode threads, g_a at rest; 0 with too few
    images left."""
    bottleneck: Literal["g_a", "decoding", ""]
    """What a faster machine should have more of; empty when nothing is left to do, or when other
    programs or the start took the time."""
    seconds: float
    """Expected wall time of the whole call: loading, listing and warm-up included."""
    disk_bytes: int
    """Expected size of all files that would be written."""
    latent_bytes: int
    """The shards with their index parts among these: the cache's size in a run's summary."""
    bytes_per_image: float
    """`latent_bytes` per image, all its views together."""
    free_bytes: int
    """Free space on the folder's disk."""
    checked: int
    """Images that were read and decoded."""
    bad_found: int
    """Images among them that cannot be decoded."""
    bad_files: tuple[str, ...]
    """The first ten of these, as `path: reason`."""
    bad_expected: float
    """Bad images to be expected, those of earlier runs included."""
    bad_bound: float
    """There are 95 of 100 chances that no more are bad (Wilson 1927, "Probable inference, the law
    of succession, and statistical inference", one-sided)."""
    bad_allowed: int
    """Bad images at which a run still continues."""
    clipped_share: float
    """Share of the sample's symbols that saturate at the dtype's limit."""

    @property
    def fits(self) -> bool:
        """Whether what would be written fits the disk."""
        return self.disk_bytes <= self.free_bytes

    def blocker(self) -> CacheError | None:
        """Returns the error that a run is certain to end with; None where none is."""
        if self.bad_found > self.bad_allowed:
            return TooManyBadImagesError(
                f"{self.bad_found} of {self.checked} images could not be decoded, "
                f"{self.bad_allowed} are allowed; the first one is {self.bad_files[0]}",
                hint="mend or remove such files, or say how many may fail: --max-errors 1% "
                "(or a count)",
            )
        if not self.fits:
            return DiskFullError(
                f"about {self.disk_bytes / 1e9:.2f} GB would be written and "
                f"{self.free_bytes / 1e9:.2f} GB are free on the disk of {self.path}",
                hint="make space, or choose an --out folder on another disk",
            )
        return None


def dry_run(
    source: str | Path,
    out: str | Path,
    options: EncodeOptions | None = None,
    *,
    overwrite: bool = False,
    observer: EncodeObserver | None = None,
) -> DryRunReport:
    """Predicts what `encode` with the same arguments would take, and changes nothing.

    It lists the source, and for some 10 s encodes images drawn from it into a temporary folder
    beside `out`, which is removed again; only SIGKILL leaves it behind. Sources of a few hundred
    images are encoded whole.

    Args:
        source: As for `encode`.
        out: As for `encode`; it need not be there.
        options: As for `encode`; `seed` also draws the sample.
        overwrite: Predict as if the cache in `out` were removed first.
        observer: Receives progress and notices.

    Raises:
        UsageError, SourceError, FingerprintMismatchError, NotACacheError, LockedError,
        WeightsError, WeightsUnavailableError, DigestError, ManifestError: as `encode` has them.
        SaturationError: the symbols of the sample do not fit the dtype.
        TooManyBadImagesError: the first 64 images of the sample could all not be decoded.
        ResourceError: reading failed, or nothing can be written beside `out`.
        InterruptedRunError: a signal stopped it.
    """
    started = time.perf_counter()
    root, options, observer = Path(out), options or EncodeOptions(), observer or EncodeObserver()
    if options.plan_only or options.finalise or options.shard_range is not None:
        raise UsageError(
            "a dry run speaks of the whole folder; it takes no `plan_only`, `shard_range` or "
            "`finalise`",
            hint="leave them out: N equal machines take an N-th of the time that it prints",
        )
    refuse_out(root, Path(source))
    images = open_source(source, options.source_options())
    with interruptible(f"interrupted; nothing was written to {root}"), _scratch(root) as scratch:
        if lock_holder(root / LOCK) is not None or live_ranges(root):
            raise LockedError(
                f"another process works on {root}; what it will leave to do is not known yet",
                hint="wait for it to end, then run the same command again",
            )
        encoder = load_chosen(options, observer)
        # With `overwrite` a run finds an empty folder: so is this one.
        intent = find_intent(scratch if overwrite else root, images, options, encoder)
        for text in (*images.notices, *intent.notices):
            observer.notice(text)
        commits, missing = _left(root, intent)
        trial = _Trial(images, intent, missing, time.perf_counter() - started)
        trial.already_bad = sum(commit.rows - commit.valid_rows for commit in commits.values())
        trial.bad_allowed = parse_max_errors(options.max_errors, intent.plan.num_samples)
        if missing:
            replicas = make_replicas(encoder, options.devices)
            trial.run(
                EncodeSettings.of(intent.manifest, replicas, options), replicas, scratch, observer
            )
        free = shutil.disk_usage(_existing(root)).free
        if overwrite:
            free += sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
    return trial.report(root, free_bytes=free)


def _left(root: Path, intent: Intent) -> tuple[dict[ShardId, CommitRecord], list[ShardId]]:
    """Returns the shards that a run would leave as they are, and those that it would write."""
    if intent.growth is None:
        return committed_shards(intent.folder, intent)
    commits, _ = committed_shards(root, intent, intent.growth.committed)
    whole = {s: c for s, c in commits.items() if intent.growth.is_carried_whole(intent.plan, *s)}
    return whole, [shard for shard in intent.plan.shard_numbers() if shard not in whole]


@dataclass(slots=True)
class _Trial:
    """A sample of what is missing, or all of it, really encoded: what that showed."""

    source: ImageSource
    intent: Intent
    """What the folder is to become."""
    missing: Sequence[ShardId]
    """The shards that a run would write."""
    seconds: float
    """From the start of the call to the last commit."""
    already_bad: int = 0
    """Bad images in the other shards."""
    bad_allowed: int = 0
    """Bad images at which a run still continues."""
    images: int = 0
    """Images encoded, warm-up and bad ones included."""
    timed_images: int = 0
    """Images among these that g_a got while the pipeline was full; all, for a whole source."""
    timed_seconds: float = 0.0
    """How long these took."""
    busy_seconds: float = 0.0
    """How long g_a ran in that time, averaged over the replicas."""
    views: int = 0
    """Views of all images, bad ones included."""
    latent_bytes: int = 0
    """Bytes of the containers."""
    index_bytes: int = 0
    """Bytes of the index parts."""
    index: list[pa.Table] = field(default_factory=list)
    """The index parts."""
    clipped: int = 0
    """Symbols saturated at the dtype's limit."""
    symbols: int = 0
    """Stored values."""
    decoded: int = 0
    """Images that were read and decoded, and not encoded."""
    decode_rate: float = 0.0
    """Images per second of decoding alone; 0 where there were too few."""
    bad: list[str] = field(default_factory=list)
    """Images that cannot be decoded, as `path: reason`."""

    @property
    def left(self) -> int:
        """Images of the missing shards."""
        splits = self.intent.plan.splits
        return sum(len(splits[split].rows_of(number)) for split, number in self.missing)

    def run(
        self,
        settings: EncodeSettings,
        replicas: list[Replica],
        scratch: Path,
        observer: EncodeObserver,
    ) -> None:
        """Encodes a sample of what is missing, or all of it, and decodes some more."""
        plan, left, batch = self.intent.plan, self.left, settings.batch_size
        # As `ShardEncoder` holds them: images decoded ahead, batches on their way through replicas.
        in_flight = max(32, 2 * batch * len(replicas))
        in_flight += (2 * len(replicas) + settings.decode_threads) * batch
        count = max(_IMAGES, _BATCHES_PER_REPLICA * batch * len(replicas)) + 2 * in_flight
        if left <= count:
            shards = [plan.shard(*shard) for shard in self.missing]
            self._encode(shards, settings, replicas, scratch, observer, warm_images=0)
            # The same images again: they show how fast decoding is, and nothing new of bad files.
            self._decode(shards, settings, counts=False)
            return
        sizes = {
            name: min(record.shard_rows, max(_PIECE_IMAGES, batch // record.views))
            for name, record in plan.splits.items()
        }
        small = {name: replace(plan.splits[name], shard_rows=sizes[name]) for name in sizes}
        settings = replace(settings, splits=small)
        pieces = _draw(plan, self.missing, sizes, seed=settings.layout.seed)
        first = math.ceil(len(pieces) * count / left)
        last = math.ceil(len(pieces) * (count + _DECODED_IMAGES) / left)
        shards = _cut(plan, pieces[:first], sizes)
        self._encode(shards, settings, replicas, scratch, observer, warm_images=in_flight)
        self._decode(_cut(plan, pieces[first:last], sizes), settings, counts=True)

    def _encode(
        self,
        shards: Sequence[ShardPlan],
        settings: EncodeSettings,
        replicas: list[Replica],
        scratch: Path,
        observer: EncodeObserver,
        *,
        warm_images: int,
    ) -> None:
        """Encodes shards into a scratch folder the way a run does, and times it.

        The first `warm_images` are not timed, nor those after the last shard was handed in; 0 times
        all from start to end, and sets no limit to it.
        """
        total = sum(len(shard.samples) for shard in shards)
        meter = ProgressMeter(observer, total=total, done=0, bad=0)
        # When the n-th image was handed to g_a, or was bad, and how long g_a had run.
        marks = [(time.perf_counter(), 0.0)]
        full = 0

        def count(good: bool) -> None:
            marks.append((time.perf_counter(), encoder.busy_seconds))
            meter.count(good, encoder.busy_seconds)

        def until_enough() -> Iterator[ShardPlan]:
            nonlocal full
            for shard in shards:
                if warm_images and time.perf_counter() - marks[0][0] > _SECONDS:
                    break
                yield shard
            full = len(marks) - 1

        # What counts against the budget is what a run finds; a sample only counts.
        budget = ErrorBudget(total)
        with (
            StagingArea(scratch) as staging,
            ShardEncoder(
                self.source, settings, replicas, staging, budget=budget, on_image=count
            ) as encoder,
        ):
            for record in encoder.encode(until_enough()):
                self._weigh(scratch, record)
            end = time.perf_counter(), encoder.busy_seconds
        self.images = len(marks) - 1
        self.seconds += end[0] - marks[0][0]
        first, last = min(warm_images, full // 2), full
        if not warm_images or not full:
            first, last, marks[-1] = 0, self.images, end
        self.timed_images = last - first
        self.timed_seconds = marks[last][0] - marks[first][0]
        self.busy_seconds = marks[last][1] - marks[first][1]

    def _weigh(self, scratch: Path, record: CommitRecord) -> None:
        """Takes in a committed shard, and removes its files so that a sample needs little room."""
        table = read_index(scratch, record.split, record.shard)
        sizes = {file.path: file.bytes for file in record.files}
        self.index.append(table)
        self.index_bytes += sizes[index_path(record.split, record.shard)]
        self.latent_bytes += sum(sizes.values()) - sizes[index_path(record.split, record.shard)]
        self.views += record.rows * self.intent.plan.splits[record.split].views
        sums = read_sums(table)
        self.clipped += int(sums.clipped.sum())
        self.symbols += sums.count * len(sums.clipped)
        for row in table.select(["path", "error"]).to_pylist():
            self._note_bad(row["path"], row["error"])
        for path in (*sizes, commit_path(record.split, record.shard)):
            remove_path(scratch / path)

    def _decode(
        self, shards: Sequence[ShardPlan], settings: EncodeSettings, *, counts: bool
    ) -> None:
        """Reads, decodes and resizes images on all decode threads, while g_a is at rest."""
        started, ends = time.perf_counter(), []
        threads = settings.decode_threads
        decoders = Decoders(settings.fingerprint.image, settings.fingerprint.views)
        pool = ThreadPoolExecutor(threads, "read", single_threaded)
        most = max(32, 2 * threads)
        try:
            load = functools.partial(load_image, self.source, decoders, settings.classes)
            for _, _, future in read_ahead(shards, pool, load, most=most):
                row = future.result().row
                ends.append(time.perf_counter())
                if counts:
                    self.decoded += 1
                    self._note_bad(row.path, row.error)
                if ends[-1] - started > _DECODE_SECONDS:
                    break
        finally:
            decoders.close()
            pool.shutdown(cancel_futures=True)
        # With the first few the decoders start.
        count, first = len(ends), 2 * threads
        if count > 2 * first:
            self.decode_rate = (count - 1 - first) / (ends[-1] - ends[first])

    def _note_bad(self, path: str, error: str | None) -> None:
        if error is not None:
            self.bad.append(f"{path}: {error}")

    def _shard_bytes(self) -> float:
        """Returns the expected bytes of the missing shards and their index parts."""
        if self.images == self.left:
            return self.latent_bytes + self.index_bytes
        rows = pa.concat_tables([part.replace_schema_metadata(None) for part in self.index])
        # In a part's metadata are its channel sums.
        rows = rows.replace_schema_metadata(self.index[0].schema.metadata)

        @functools.cache
        def row_bytes(count: int) -> float:
            # A part has some bytes before its rows, so its size depends on their number.
            return len(parquet_bytes(rows.slice(0, count))) / count

        total = 0.0
        for split, number in self.missing:
            record = self.intent.plan.splits[split]
            count = len(record.rows_of(number))
            total += count * record.views * self.latent_bytes / self.views
            total += count * row_bytes(min(count, rows.num_rows))
        return total

    def report(self, root: Path, *, free_bytes: int) -> DryRunReport:
        """Makes the forecast."""
        intent, plan, left = self.intent, self.intent.plan, self.left
        rate = self.timed_images / max(self.timed_seconds, 1e-9)
        # A batch counts when it has ended, so a short time may hold more than its own.
        share = min(1.0, self.busy_seconds / max(self.timed_seconds, 1e-9))
        latents, disk = self._shard_bytes(), 0.0
        manifest = intent.manifest
        if self.missing or not manifest.is_complete:
            disk = latents + len(self.missing) * _COMMIT_BYTES
            disk += _FOLDER_BYTES + len(plan.splits) * _SPLIT_BYTES
            disk += 0 if intent.is_begun else manifest.plan.bytes + manifest.encoder.bytes
        checked, bad = self.images + self.decoded, len(self.bad)
        bottleneck: Literal["g_a", "decoding", ""] = ""
        if self.images and share >= 1 - _WAITING:
            bottleneck = "g_a"
        elif self.images and self.decode_rate < 2 * rate:
            bottleneck = "decoding"
        return DryRunReport(
            path=str(root),
            source=self.source.location().encode("utf-8", "backslashreplace").decode(),
            images=plan.num_samples,
            classes=len(manifest.classes),
            splits={name: record.rows for name, record in plan.splits.items()},
            views={name: record.views for name, record in plan.splits.items()},
            shards=plan.num_shards,
            committed_shards=plan.num_shards - len(self.missing),
            images_left=left,
            sampled=self.images,
            sampled_seconds=self.timed_seconds,
            images_per_second=rate,
            encoder_share=share,
            decode_images_per_second=self.decode_rate,
            bottleneck=bottleneck,
            # The sample has the start and the end of a run in it; the rest comes at its rate.
            seconds=self.seconds + (left - self.images) / max(rate, 1e-9),
            disk_bytes=round(disk),
            latent_bytes=round(latents),
            bytes_per_image=latents / max(1, left),
            free_bytes=free_bytes,
            checked=checked,
            bad_found=self.already_bad + bad,
            bad_files=tuple(self.bad[:_BAD_SHOWN]),
            bad_expected=self.already_bad + left * bad / max(1, checked),
            bad_bound=self.already_bad + left * _highest_share(bad, checked),
            bad_allowed=self.bad_allowed,
            clipped_share=self.clipped / max(1, self.symbols),
        )


def _draw(
    plan: Plan, missing: Sequence[ShardId], sizes: dict[str, int], *, seed: int
) -> list[_Piece]:
    """Divides shards into pieces, and returns them in an order whose every prefix is a fair sample.

    Args:
        plan: All samples.
        missing: The shards.
        sizes: Rows of a piece, per split.
        seed: The same seed gives the same order.
    """
    pieces = [
        (split, number, first)
        for split, number in missing
        for first in range(0, len(plan.splits[split].rows_of(number)), sizes[split])
    ]
    # Multiples of the golden ratio modulo 1: those below any limit are evenly spaced (Weyl 1916,
    # "Ueber die Gleichverteilung von Zahlen mod. Eins"), so each split has its share.
    ranks = (np.arange(len(pieces)) * _GOLDEN_RATIO + np.random.default_rng(seed).random()) % 1
    return [pieces[at] for at in np.argsort(ranks)]


def _cut(plan: Plan, pieces: Sequence[_Piece], sizes: dict[str, int]) -> list[ShardPlan]:
    """Returns pieces as separate shards, in the order of rows, those of all splits mixed."""
    shards = []
    for at, (split, number, first) in enumerate(pieces):
        samples = plan.shard(split, number).samples[first : first + sizes[split]]
        shards.append(ShardPlan(split, at, samples, ""))
    # Packed archives can only be read forward.
    return sorted(shards, key=lambda shard: shard.first_row / plan.splits[shard.split].rows)


def _highest_share(found: int, checked: int) -> float:
    """Returns the upper end of Wilson's interval for a share, 1 where nothing was looked at."""
    if not checked:
        return 1.0
    share, ratio = found / checked, _Z**2 / checked
    spread = math.sqrt(share * (1 - share) * ratio + ratio**2 / 4)
    return min(1.0, (share + ratio / 2 + spread) / (1 + ratio))


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """Makes an empty folder on the disk of `root`, and removes it with all that is in it."""
    above = _existing(root.absolute().parent)
    if root.is_dir() and not os.access(above, os.W_OK):
        # A separate disk is mounted there; only the files' size counts, not where they are.
        above = Path(tempfile.gettempdir())
    with disk_errors(root):
        folder = Path(tempfile.mkdtemp(prefix=".ci2p-cache-dry-run-", dir=above))
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except BaseException:
            # Ctrl-C in the middle of it: the second one would end the process.
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _existing(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
