"""Encodes what is not committed of a cache folder that this process holds, and completes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.counted import plan_text
from ci2p_cache.encoding.executors.run import encode_shards
from ci2p_cache.encoding.executors.work import Work
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import (
    EncodeObserver,
    EncodeSummary,
    ProgressMeter,
    summarise,
    summarise_part,
)
from ci2p_cache.encoding.resume import (
    Intent,
    begin,
    committed_shards,
    load_chosen,
    missing_text,
    survey,
    tell_of_other_source,
)
from ci2p_cache.errors import IncompleteCacheError, command
from ci2p_cache.images.source import ImageSource

__all__ = ["meter_of", "reopened", "resume"]


def resume(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    staging: StagingArea,
    observer: EncodeObserver,
) -> EncodeSummary:
    """Does all that is left to do in a cache folder which this process has locked.

    Args:
        root: The cache folder; empty to begin with.
        images: The source.
        options: As for `encode`.
        staging: Where files are staged, in `root`.
        observer: Told of progress and notices.

    Raises:
        CacheError: as `encode` has them.
    """
    encoder = load_chosen(options, observer)
    intent = survey(root, images, options, encoder)
    tell_of_other_source(root, images, intent, observer)
    if options.finalise and intent.manifest is None:
        raise IncompleteCacheError(
            f"{root} has no plan yet, so there is nothing to finalise",
            hint="repeat the command without --finalise",
        )
    manifest = intent.manifest or begin(images, intent, encoder, staging, observer)
    observer.planned(plan_text(intent.plan, intent.classes))
    if options.plan_only:
        return _planned(root, manifest, intent, observer)
    commits, missing = committed_shards(root, intent, retry_failed=options.retry_failed)
    meter = meter_of(observer, commits, intent.plan.num_samples)
    if not missing and manifest.is_complete:
        return summarise(root, manifest, meter, 0.0)
    if missing and options.finalise:
        raise IncompleteCacheError(
            f"{root} is not encoded to its end: {missing_text(intent, missing)} are missing; "
            "nothing was changed",
            hint=command("status", root, note="gives a command for each missing range"),
        )
    if missing:
        manifest = reopened(manifest, staging)
        work = Work(root, images, options, encoder, staging, intent, meter, observer)
        commits |= encode_shards(work, missing)
    seconds = meter.seconds
    ordered = [commits[place] for place in intent.plan.shard_numbers()]
    manifest = finalise(root, manifest, intent.plan, ordered, staging)
    return summarise(root, manifest, meter, seconds)


def _planned(
    root: Path, manifest: Manifest, intent: Intent, observer: EncodeObserver
) -> EncodeSummary:
    """Sums up a folder in which nothing was encoded by this run."""
    commits, missing = committed_shards(root, intent, retry_failed=False)
    meter = meter_of(observer, commits, intent.plan.num_samples)
    if manifest.is_complete and not missing:
        return summarise(root, manifest, meter, 0.0)
    return summarise_part(root, manifest, commits.values(), meter, 0.0, part=None)


def meter_of(
    observer: EncodeObserver, commits: Mapping[tuple[str, int], CommitRecord], total: int
) -> ProgressMeter:
    """Returns a meter that starts from what is committed; `total` is the images of this run."""
    done = sum(commit.rows for commit in commits.values())
    bad = done - sum(commit.valid_rows for commit in commits.values())
    return ProgressMeter(observer, total=total, done=done, bad=bad)


def reopened(manifest: Manifest, staging: StagingArea) -> Manifest:
    """Takes back that the cache is complete, before a shard of it is written again."""
    if manifest.is_complete:
        manifest = dataclasses.replace(manifest, state="encoding", files=())
        staging.put_sealed(MANIFEST, manifest.to_dict())
    return manifest
