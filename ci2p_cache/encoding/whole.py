"""Encodes what is not committed of a cache folder that this process holds, and completes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.growth import drop_growth, growth_of, settle
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.verify import verify
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoding.carry import Carrier
from ci2p_cache.encoding.counted import plan_text
from ci2p_cache.encoding.drive import encode_shards
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.growth import begin_growth
from ci2p_cache.encoding.intent import Intent, committed_shards, missing_text
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import (
    EncodeObserver,
    EncodeSummary,
    ProgressMeter,
    summarise,
    summarise_part,
)
from ci2p_cache.encoding.repair.run import restore
from ci2p_cache.encoding.resume import begin, load_chosen, survey
from ci2p_cache.encoding.worker import Work
from ci2p_cache.errors import IncompleteCacheError, ShardError, command
from ci2p_cache.images.source import ImageSource

__all__ = ["meter_of", "resume"]


def resume(
    root: Path, images: ImageSource, options: EncodeOptions, observer: EncodeObserver
) -> EncodeSummary:
    """Does all that is left to do in a cache folder which this process has locked.

    Args:
        root: The cache folder; empty to begin with.
        images: The source.
        options: As for `encode`.
        observer: Receives progress and notices.

    Raises:
        CacheError: as `encode` has them.
    """
    encoder = load_chosen(options, observer)
    intent = survey(root, images, options, encoder)
    for text in intent.notices:
        observer.notice(text)
    if options.finalise and intent.manifest is None:
        raise IncompleteCacheError(
            f"{root} has no plan yet, so there is nothing to finalise",
            hint="repeat the command without --finalise",
        )
    was_begun = growth_of(root) is not None
    if intent.folder == root:
        # What was begun of another growth: now there is nothing new.
        drop_growth(root)
    if intent.growth is not None and begin_growth(root, intent.plan, intent.growth):
        # The very same growth was begun before.
        intent = replace(intent, manifest=read_manifest(intent.folder))
    if was_begun and growth_of(root) is None:
        observer.notice(
            f"what an earlier run had begun to take into {root} was dropped, as this one asks for "
            "other images (--rescan lists them all again)"
        )
    with StagingArea(intent.folder) as staging:
        manifest = intent.manifest or begin(images, intent, encoder, staging, observer)
        observer.planned(plan_text(intent.plan, intent.classes))
        if options.plan_only:
            return _planned(root, manifest, intent, observer)
        summary = _encoded(root, manifest, images, options, encoder, intent, staging, observer)
    settle(root)
    return summary


def _encoded(
    root: Path,
    manifest: Manifest,
    images: ImageSource,
    options: EncodeOptions,
    encoder: FrozenEncoder,
    intent: Intent,
    staging: StagingArea,
    observer: EncodeObserver,
) -> EncodeSummary:
    """Encodes what is missing, and finalises."""
    folder = intent.folder
    commits, missing = committed_shards(folder, intent)
    restored = 0
    if missing and manifest.is_complete:
        # An original may have gone or changed since: only the same bytes are put back.
        observer.notice(f"{missing_text(intent, missing)} are damaged; they are encoded again")
        found = verify(root, quick=True)
        restored = restore(root, found, images, options.weights, observer).images
        commits, missing = committed_shards(folder, intent)
        if missing:
            raise ShardError(
                f"{missing_text(intent, missing)} of {root} cannot be put back",
                hint=command("verify", root, "--repair", note="says why"),
            )
        manifest = read_manifest(root)
    meter = meter_of(observer, intent, commits, missing)
    if not missing and manifest.is_complete:
        return replace(summarise(root, manifest, meter, 0.0), encoded_now=restored)
    if missing and options.finalise:
        raise IncompleteCacheError(
            f"{root} is not encoded to its end: {missing_text(intent, missing)} are missing; "
            "nothing was changed",
            hint=command("status", root, note="gives a command for each missing range"),
        )
    if missing:
        work = Work(folder, images, options, encoder, staging, intent, meter, observer)
        commits |= encode_shards(work, missing)
    seconds = meter.seconds
    ordered = [commits[place] for place in intent.plan.shard_numbers()]
    manifest = finalise(folder, manifest, intent.plan, ordered, staging)
    return summarise(root, manifest, meter, seconds)


def _planned(
    root: Path, manifest: Manifest, intent: Intent, observer: EncodeObserver
) -> EncodeSummary:
    """Sums up a folder in which nothing was encoded by this run."""
    commits, missing = committed_shards(intent.folder, intent)
    meter = meter_of(observer, intent, commits, missing)
    if manifest.is_complete and not missing:
        return summarise(root, manifest, meter, 0.0)
    return summarise_part(root, manifest, commits.values(), meter, 0.0, part=None)


def meter_of(
    observer: EncodeObserver,
    intent: Intent,
    commits: Mapping[tuple[str, int], CommitRecord],
    missing: Iterable[tuple[str, int]],
) -> ProgressMeter:
    """Returns a meter over some shards that starts from what needs no original.

    Args:
        observer: Receives progress.
        intent: What the folder is to become.
        commits: The shards that are committed.
        missing: The others; of a growth they may hold rows that are carried over.
    """
    places = [*commits, *(missing := list(missing))]
    total = sum(len(intent.plan.splits[split].rows_of(shard)) for split, shard in places)
    done = sum(commit.rows for commit in commits.values())
    bad = done - sum(commit.valid_rows for commit in commits.values())
    carrier = Carrier.of(intent.folder)
    if carrier is not None:
        for place in missing:
            good, failed = carrier.count(*place)
            done, bad = done + good + failed, bad + failed
    return ProgressMeter(observer, total=total, done=done, bad=bad)
