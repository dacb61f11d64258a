"""Encodes what is not committed of a range of shards, beside other processes with other ranges."""

from __future__ import annotations

from pathlib import Path

from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.budget import parse_max_errors, refuse_more_bad
from ci2p_cache.encoding.claims import Claim
from ci2p_cache.encoding.counted import plan_text
from ci2p_cache.encoding.executors.run import encode_shards
from ci2p_cache.encoding.executors.work import Work
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary, summarise, summarise_part
from ci2p_cache.encoding.resume import (
    Intent,
    begin,
    committed_shards,
    load_chosen,
    missing_text,
    survey,
    tell_of_other_source,
)
from ci2p_cache.encoding.whole import meter_of, reopened
from ci2p_cache.errors import command
from ci2p_cache.images.source import ImageSource

__all__ = ["resume_range"]


def resume_range(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    staging: StagingArea,
    observer: EncodeObserver,
    claim: Claim,
) -> EncodeSummary:
    """Does all that is left to do in a range which this process has claimed.

    The first range in a folder without a plan makes it; others wait for it. The last one to end
    finalises, where every shard of the folder is committed.

    Args:
        root: The cache folder.
        images: The source.
        options: As for `encode`.
        staging: Where files are staged, under the range's own name.
        observer: Told of progress and notices.
        claim: The range.

    Raises:
        CacheError: as `encode` has them.
    """
    encoder = load_chosen(options, observer)
    if not (root / MANIFEST).exists():
        with claim.gate():
            if not (root / MANIFEST).exists():
                intent = survey(root, images, options, encoder)
                begin(images, intent, encoder, staging, observer)
    intent = survey(root, images, options, encoder)
    tell_of_other_source(root, images, intent, observer)
    manifest = intent.manifest
    observer.planned(plan_text(intent.plan, intent.classes))
    assert manifest is not None, "a folder with a manifest is gone on with as it is"
    places = tuple(intent.plan.shard_numbers())
    own = [places[at] for at in claim.part.positions(len(places))]
    commits, missing = committed_shards(root, intent, own, retry_failed=options.retry_failed)
    total = sum(len(intent.plan.splits[split].rows_of(number)) for split, number in own)
    meter = meter_of(observer, commits, total)
    if missing:
        with claim.gate():
            # No plan changes while this range is claimed, but another range may have finalised.
            manifest = reopened(read_manifest(root), staging)
        work = Work(root, images, options, encoder, staging, intent, meter, observer)
        commits |= encode_shards(work, missing)
    seconds = meter.seconds
    with claim.gate():
        manifest = _finalised_by_last(root, options, staging, intent, observer, claim)
        claim.release()
    if manifest.is_complete:
        return summarise(root, manifest, meter, seconds)
    return summarise_part(root, manifest, commits.values(), meter, seconds, part=claim.part)


def _finalised_by_last(
    root: Path,
    options: EncodeOptions,
    staging: StagingArea,
    intent: Intent,
    observer: EncodeObserver,
    claim: Claim,
) -> Manifest:
    """Finalises if no other range runs and no shard is missing; returns the manifest as it is."""
    manifest = read_manifest(root)
    if manifest.is_complete:
        return manifest
    others = claim.others()
    if others:
        # One of them may be writing a shard again that is committed: the last one finalises.
        observer.notice(f"range {claim.part} is done; {len(others)} other ranges are at work")
        return manifest
    commits, missing = committed_shards(root, intent, retry_failed=False)
    if missing:
        observer.notice(
            f"range {claim.part} is done; {missing_text(intent, missing)} are missing and no other "
            f"range is at work (see {command('status', root)})"
        )
        return manifest
    bad = sum(commit.rows - commit.valid_rows for commit in commits.values())
    allowed = parse_max_errors(options.max_errors, intent.plan.num_samples)
    refuse_more_bad(bad, allowed, "they are those of all ranges together")
    return finalise(root, manifest, intent.plan, list(commits.values()), staging)
