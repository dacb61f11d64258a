"""`dry_run`: what encoding a source would take, found by encoding a sample of it.

The source is listed and planned as a run would, the folder is held against the options, and a
sample goes through the same shard encoder, into a temporary folder. The cache folder itself is
neither made nor changed.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.lock import LOCK, live_ranges, lock_holder
from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.encoding.dry_run.decode_trial import DecodeTrial, try_decoding
from ci2p_cache.encoding.dry_run.forecast import DryRunReport, Findings, Work, report
from ci2p_cache.encoding.dry_run.sample import draw, small_shards
from ci2p_cache.encoding.dry_run.trial import EncodeTrial, try_encoding
from ci2p_cache.encoding.intent import Intent, committed_shards, load_chosen, survey
from ci2p_cache.encoding.locks import interruptible, refuse_out
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, ProgressMeter
from ci2p_cache.encoding.shard import EncodeSettings, Lane, make_lanes, parse_max_errors
from ci2p_cache.errors import LockedError, UsageError
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource

__all__ = ["dry_run"]

_IMAGES = 256
"""Images timed on a CPU of two cores; about 10 s there."""
_BATCHES_PER_LANE = 16
"""On larger machines so many batches of each lane are timed, if that is more."""
_SECONDS = 10.0
"""No other images are handed in after that; on a slow or busy machine it comes first."""
_DECODED_IMAGES = 2048
_DECODE_SECONDS = 2.0
"""Decoding alone: 2 s are 1,500 images on one core, enough to see a share of 0.2 % bad ones."""


_Place = tuple[str, int]
"""(split, shard)."""


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
        overwrite: Predict for an empty folder in the place of the cache that is in `out`.
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
    root, options = Path(out), options or EncodeOptions()
    if options.plan_only or options.finalise or options.shard_range is not None:
        raise UsageError(
            "a dry run speaks of the whole folder; it takes no `plan_only`, `shard_range` or "
            "`finalise`",
            hint="leave them out: N equal machines take an N-th of the time that it tells",
        )
    observer = observer or EncodeObserver()
    refuse_out(root, Path(source))
    images = open_source(source, options.source_options())
    with interruptible(f"interrupted; nothing was written to {root}"), _scratch(root) as scratch:
        _refuse_busy(root)
        encoder = load_chosen(options, observer)
        # With `overwrite` a run finds an empty folder: so is this one.
        folder = scratch if overwrite else root
        intent = survey(folder, images, options, encoder)
        for text in images.notices:
            observer.notice(text)
        for text in intent.notices:
            observer.notice(text)
        commits, missing = _left(folder, intent)
        work = Work(
            intent,
            missing,
            already_bad=sum(commit.rows - commit.valid_rows for commit in commits.values()),
            bad_allowed=parse_max_errors(options.max_errors, intent.plan.num_samples),
        )
        encoded, decoded = EncodeTrial(), DecodeTrial()
        prepared = time.perf_counter() - started
        if missing:
            lanes = make_lanes(encoder, options.devices)
            settings = EncodeSettings.of(
                intent.manifest, lanes, batch_size=options.batch_size, workers=options.workers
            )
            encoded, decoded = _try(images, work, settings, lanes, scratch, observer)
        free = shutil.disk_usage(_existing(root)).free + (_tree_bytes(root) if overwrite else 0)
    found = Findings(work, encoded, decoded, prepared)
    return report(root, images, found, free)


def _left(folder: Path, intent: Intent) -> tuple[dict[_Place, CommitRecord], list[_Place]]:
    """Tells the shards that a run would leave as they are from those that it would write."""
    if intent.growth is None:
        return committed_shards(intent.folder, intent)
    commits, _ = committed_shards(folder, intent, intent.growth.committed)
    kept = {p: c for p, c in commits.items() if intent.growth.is_carried_whole(intent.plan, *p)}
    return kept, [place for place in intent.plan.shard_numbers() if place not in kept]


def _try(
    images: ImageSource,
    work: Work,
    settings: EncodeSettings,
    lanes: list[Lane],
    scratch: Path,
    observer: EncodeObserver,
) -> tuple[EncodeTrial, DecodeTrial]:
    """Encodes a sample of what is left, or all of it, and decodes some more."""
    plan, left, batch = work.intent.plan, sum(work.rows.values()), settings.batch_size
    # As `ShardEncoder` holds them: images decoded ahead, batches on their way through the lanes.
    ahead = max(32, 2 * batch * len(lanes))
    warm = ahead + (2 * len(lanes) + settings.decode_threads) * batch
    count = max(_IMAGES, _BATCHES_PER_LANE * batch * len(lanes)) + warm + ahead
    seed = settings.layout.seed
    if left <= count:
        meter = ProgressMeter(observer, total=left, done=0, bad=0)
        encoded = try_encoding(
            images, settings, lanes, [plan.shard(*place) for place in work.missing], scratch,
            warm_images=None, seconds=math.inf, on_image=meter.count,
        )  # fmt: skip
        others = draw(plan, work.missing, left, seed=seed)
    else:
        drawn = draw(plan, work.missing, count + _DECODED_IMAGES, seed=seed)
        share = count / sum(map(len, drawn.values()))
        sample = {split: own[: math.ceil(share * len(own))] for split, own in drawn.items()}
        others = {split: own[len(sample[split]) :] for split, own in drawn.items()}
        shards, records = small_shards(sample, settings.splits, batch)
        meter = ProgressMeter(observer, total=sum(map(len, sample.values())), done=0, bad=0)
        encoded = try_encoding(
            images, replace(settings, splits=records), lanes, shards, scratch,
            warm_images=warm, seconds=_SECONDS, on_image=meter.count,
        )  # fmt: skip
    decoded = try_decoding(images, settings, others, seconds=_DECODE_SECONDS)
    if left <= count:
        # The same images again: they say how fast decoding is, and nothing new of bad files.
        decoded = DecodeTrial(images_per_second=decoded.images_per_second)
    return encoded, decoded


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """Makes an empty folder on the disk of `root`, and removes it with all that is in it."""
    place = _existing(root.absolute().parent)
    if root.is_dir() and not os.access(place, os.W_OK):
        # A disk of its own is mounted there; only the files' size counts, not where they are.
        place = Path(tempfile.gettempdir())
    with disk_errors(root):
        folder = Path(tempfile.mkdtemp(prefix=".ci2p-cache-dry-run-", dir=place))
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


def _tree_bytes(root: Path) -> int:
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())


def _refuse_busy(root: Path) -> None:
    """Refuses a folder that another process writes to, as a run would, without touching the lock.

    Raises:
        LockedError: there is one.
    """
    if lock_holder(root / LOCK) is not None or live_ranges(root):
        raise LockedError(
            f"another process works on {root}; what it will leave to do is not known yet",
            hint="wait for it to end, then run the same command again",
        )
