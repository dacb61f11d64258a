"""Encodes what is not committed of a cache folder, or of a range of its shards; then completes it.

The first range in a folder without a plan makes it; others wait for it. The last one to end
finalises, where every shard of the folder is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.growth import drop_growth, growth_of, settle
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.verify import verify
from ci2p_cache.encoding.drive import encode_shards
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.growth import begin_growth
from ci2p_cache.encoding.intent import (
    Intent,
    begin,
    committed_shards,
    find_intent,
    load_chosen,
    missing_text,
)
from ci2p_cache.encoding.locks import Hold
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import plan_text
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary, ProgressMeter, summarise
from ci2p_cache.encoding.repair import restore
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import refuse_more_bad
from ci2p_cache.encoding.worker import Work
from ci2p_cache.errors import IncompleteCacheError, ShardError, UsageError, command
from ci2p_cache.images.source import ImageSource
from ci2p_cache.machine import chosen_devices

__all__ = ["resume"]

_Commits = dict[tuple[str, int], CommitRecord]


def resume(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    observer: EncodeObserver,
    hold: Hold,
) -> EncodeSummary:
    """Does all that is left to do in a cache folder, or in a range of it.

    Args:
        root: The cache folder; empty to begin with.
        images: The source.
        options: As for `encode`.
        observer: As for `encode`.
        hold: What this process holds of the folder.

    Raises:
        CacheError: as `encode` has them.
    """
    if not (root / MANIFEST).exists() and not options.plan_only and options.executor != "ray":
        # A device that is not here is refused before the folder is begun.
        chosen_devices(options.devices)
    encoder, part = load_chosen(options, observer), hold.part
    if part is not None and not (root / MANIFEST).exists():
        with hold.gate():
            if not (root / MANIFEST).exists():
                intent = find_intent(root, images, options, encoder)
                with StagingArea(root, name=part.label) as staging:
                    begin(images, intent, encoder, staging, observer)
    intent = find_intent(root, images, options, encoder)
    for text in intent.notices:
        observer.notice(text)
    if options.finalise and not intent.is_begun:
        raise IncompleteCacheError(
            f"{root} has no plan yet, so there is nothing to finalise",
            hint="repeat the command without --finalise",
        )
    if part is None:
        intent = _with_growth(root, intent, observer)
    elif not intent.is_begun:
        raise UsageError(
            "a larger `limit` changes the plan, which the ranges of a folder share",
            hint="once: --plan-only with the new --limit; then each range with it",
        )
    manifest, folder = intent.manifest, intent.folder
    with StagingArea(folder, name="all" if part is None else part.label) as staging:
        if not intent.is_begun:
            begin(images, intent, encoder, staging, observer)
        observer.planned(plan_text(intent.plan, manifest.classes))
        own = list(intent.plan.shard_numbers())
        if part is not None:
            own = [own[at] for at in part.positions(len(own))]
        commits, missing = committed_shards(folder, intent, own)
        restored = 0
        if missing and manifest.is_complete and not options.plan_only:
            restored = _put_back(hold, intent, missing, images, options, observer)
            commits, missing = committed_shards(folder, intent, own)
            manifest = read_manifest(root)
        meter = _meter(observer, intent, commits, missing)
        if options.plan_only or (manifest.is_complete and not missing):
            counted = commits.values() if missing or not manifest.is_complete else None
            return replace(summarise(root, manifest, meter, 0.0, counted), encoded_now=restored)
        if missing and options.finalise:
            raise IncompleteCacheError(
                f"{root} is not encoded to its end: {missing_text(intent, missing)} are missing; "
                "nothing was changed",
                hint=command("status", root, note="gives a command for each missing range"),
            )
        work = Work(folder, images, options, encoder, staging, intent, meter, observer)
        commits |= encode_shards(work, missing) if missing else {}
        seconds = meter.seconds
        with hold.gate():
            manifest = _finalised(hold, work, commits)
            settle(root)
            hold.release()
    counted = None if manifest.is_complete else commits.values()
    return summarise(root, manifest, meter, seconds, counted, part=part)


def _with_growth(root: Path, intent: Intent, observer: EncodeObserver) -> Intent:
    """Makes the folder of a growth, or removes one that was not asked for again."""
    was_begun = growth_of(root) is not None
    if intent.folder == root:
        # An earlier growth was begun, and now there is nothing new.
        drop_growth(root)
    if intent.growth is not None and begin_growth(
        root, intent.growth, intent.plan, intent.manifest.plan.sha256
    ):
        # The very same growth was begun before.
        intent = replace(intent, manifest=read_manifest(intent.folder), is_begun=True)
    if was_begun and growth_of(root) is None:
        observer.notice(
            f"what an earlier run had begun to take into {root} was dropped, as this one asks for "
            "other images (--rescan lists them all again)"
        )
    return intent


def _put_back(
    hold: Hold,
    intent: Intent,
    missing: Sequence[tuple[str, int]],
    images: ImageSource,
    options: EncodeOptions,
    observer: EncodeObserver,
) -> int:
    """Repairs a complete cache that is damaged; returns how many images were encoded again.

    An original may have gone or changed since: only the same bytes are put back.
    """
    root, text = hold.root, missing_text(intent, missing)
    if hold.part is not None:
        raise ShardError(
            f"{root} is complete and damaged: {text} are not what was committed; nothing was "
            "changed",
            hint=command("verify", root, "--repair"),
        )
    observer.notice(f"{text} are damaged; they are encoded again")
    found = verify(root, quick=True)
    restored = restore(root, found, images, options.weights, observer).images
    _, left = committed_shards(root, intent, missing)
    if left:
        raise ShardError(
            f"{missing_text(intent, left)} of {root} cannot be put back",
            hint=command("verify", root, "--repair", note="says why"),
        )
    return restored


def _meter(
    observer: EncodeObserver, intent: Intent, commits: _Commits, missing: Sequence[tuple[str, int]]
) -> ProgressMeter:
    """Returns a meter over some shards; what needs no original is done: committed or carried."""
    splits = intent.plan.splits
    done = sum(commit.rows for commit in commits.values())
    bad = done - sum(commit.valid_rows for commit in commits.values())
    total = done + sum(len(splits[split].rows_of(shard)) for split, shard in missing)
    carrier = Carrier.of(intent.folder)
    if carrier is not None:
        for split, shard in missing:
            good, failed = carrier.count(split, shard)
            done, bad = done + good + failed, bad + failed
    return ProgressMeter(observer, total=total, done=done, bad=bad)


def _finalised(hold: Hold, work: Work, commits: _Commits) -> Manifest:
    """Finalises, unless other ranges run or a shard is missing; returns the manifest as it is."""
    intent, folder, observer = work.intent, work.root, work.observer
    manifest = intent.manifest
    if hold.part is not None:
        manifest = read_manifest(folder)
        if manifest.is_complete:
            return manifest
        others = hold.others()
        if others:
            # One of them may be writing a shard again that is committed: the last one finalises.
            observer.notice(f"range {hold.part} is done; {len(others)} other ranges are at work")
            return manifest
        commits, missing = committed_shards(folder, intent)
        if missing:
            observer.notice(
                f"range {hold.part} is done; {missing_text(intent, missing)} are missing and no "
                f"other range is at work (see {command('status', hold.root)})"
            )
            return manifest
        bad = sum(commit.rows - commit.valid_rows for commit in commits.values())
        refuse_more_bad(bad, work.bad_allowed, "they are those of all ranges together")
    ordered = [commits[shard_id] for shard_id in intent.plan.shard_numbers()]
    return finalise(folder, manifest, intent.plan, ordered, work.staging)
