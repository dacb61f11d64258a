"""Encodes what is not committed of a range of shards, beside other processes with other ranges."""

from __future__ import annotations

from pathlib import Path

from ci2p_cache.cache.growth import settle
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoding.budget import parse_max_errors, refuse_more_bad
from ci2p_cache.encoding.claims import Claim
from ci2p_cache.encoding.counted import plan_text
from ci2p_cache.encoding.drive import encode_shards
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.intent import Intent, committed_shards, missing_text
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary, summarise, summarise_part
from ci2p_cache.encoding.resume import begin, load_chosen, survey
from ci2p_cache.encoding.whole import meter_of
from ci2p_cache.encoding.worker import Work
from ci2p_cache.errors import ShardError, command
from ci2p_cache.images.source import ImageSource

__all__ = ["resume_range"]


def resume_range(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
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
        observer: Receives progress and notices.
        claim: The range.

    Raises:
        CacheError: as `encode` has them.
    """
    encoder = load_chosen(options, observer)
    if not (root / MANIFEST).exists():
        with claim.gate():
            if not (root / MANIFEST).exists():
                intent = survey(root, images, options, encoder)
                with StagingArea(root, name=claim.part.label) as staging:
                    begin(images, intent, encoder, staging, observer)
    intent = survey(root, images, options, encoder)
    for text in intent.notices:
        observer.notice(text)
    with StagingArea(intent.folder, name=claim.part.label) as staging:
        return _encoded(root, images, options, encoder, intent, staging, observer, claim)


def _encoded(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    encoder: FrozenEncoder,
    intent: Intent,
    staging: StagingArea,
    observer: EncodeObserver,
    claim: Claim,
) -> EncodeSummary:
    """Encodes what is missing of the range."""
    manifest, folder = intent.manifest, intent.folder
    observer.planned(plan_text(intent.plan, intent.classes))
    assert manifest is not None, "a folder with a manifest is continued as it is"
    places = tuple(intent.plan.shard_numbers())
    own = [places[at] for at in claim.part.positions(len(places))]
    commits, missing = committed_shards(folder, intent, own)
    meter = meter_of(observer, intent, commits, missing)
    if missing:
        if manifest.is_complete:
            raise ShardError(
                f"{root} is complete and damaged: {missing_text(intent, missing)} are not what was "
                "committed; nothing was changed",
                hint=command("verify", root, "--repair"),
            )
        work = Work(folder, images, options, encoder, staging, intent, meter, observer)
        commits |= encode_shards(work, missing)
    seconds = meter.seconds
    with claim.gate():
        manifest = _finalised_by_last(root, options, staging, intent, observer, claim)
        settle(root)
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
    manifest = read_manifest(intent.folder)
    if manifest.is_complete:
        return manifest
    others = claim.others()
    if others:
        # One of them may be writing a shard again that is committed: the last one finalises.
        observer.notice(f"range {claim.part} is done; {len(others)} other ranges are at work")
        return manifest
    commits, missing = committed_shards(intent.folder, intent)
    if missing:
        observer.notice(
            f"range {claim.part} is done; {missing_text(intent, missing)} are missing and no other "
            f"range is at work (see {command('status', root)})"
        )
        return manifest
    bad = sum(commit.rows - commit.valid_rows for commit in commits.values())
    allowed = parse_max_errors(options.max_errors, intent.plan.num_samples)
    refuse_more_bad(bad, allowed, "they are those of all ranges together")
    return finalise(intent.folder, manifest, intent.plan, list(commits.values()), staging)
