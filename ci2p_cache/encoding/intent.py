"""What a cache folder is to become, and which of its shards are committed already.

::

    an empty folder --> the source is listed and planned
    a cache         --> its manifest and plan are read; another fingerprint or layout is refused
    one that grows  --> the source is listed again; new rows follow those of the cache
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ci2p_cache import __version__
from ci2p_cache.cache.commit import CommitRecord, FileRecord, has_its_files, read_commit
from ci2p_cache.cache.growth import GROWTH, growth_of
from ci2p_cache.cache.manifest import Manifest, class_order, read_manifest, refuse_difference
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.survey import gaps, named_ranges
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoding.growth import Growth, compare_originals, failed_rows, merged_classes
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import EarlierRows, Plan, build_plan, read_plan, refuse_no_classes
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.errors import (
    FingerprintMismatchError,
    ManifestError,
    ShardError,
    UsageError,
    command,
)
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import start_decoder_server
from ci2p_cache.images.source import ImageSource
from ci2p_cache.specs import DOWNSAMPLING, FORMAT_VERSION, Fingerprint, LatentSpec, LayoutSpec

__all__ = [
    "Intent",
    "begin",
    "committed_shards",
    "find_intent",
    "fingerprint_of",
    "load_chosen",
    "missing_text",
]

_SORTED = (
    "the images come one class after the other, and rows keep their order. `train` mixes them; "
    "shuffle them first for --order blocks or a stock webdataset reader: batches hold few classes"
)


_NO_VAL = (
    "no class has enough images to give one to `val`, so there is no `val`: raise --val-fraction, "
    "or draw each image for itself with --split hashed"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a cache folder is to become, before anything is written to it."""

    manifest: Manifest
    """The folder's own where it is continued as it is, else the one to be written."""
    is_begun: bool
    """Whether the manifest is there already."""
    plan: Plan
    """All samples: those of the folder, or those that the source lists now."""
    folder: Path
    """Where it is encoded: the cache folder, or that of a growth in it."""
    growth: Growth | None = None
    """What the cache holds, where it is to grow."""
    notices: tuple[str, ...] = ()
    """What the user should know of it."""


def missing_text(intent: Intent, missing: Sequence[tuple[str, int]]) -> str:
    """Names missing shards in ranges, for example `3 of 12 shards (train 3-4; val 0)`."""
    ranges = {}
    for name, record in intent.plan.splits.items():
        own = {number for split, number in missing if split == name}
        there = [number for number in range(record.num_shards) if number not in own]
        ranges[name] = gaps(record.num_shards, there)
    return f"{len(missing)} of {intent.plan.num_shards} shards ({named_ranges(ranges)})"


def committed_shards(
    root: Path, intent: Intent, wanted: Iterable[tuple[str, int]] | None = None
) -> tuple[dict[tuple[str, int], CommitRecord], list[tuple[str, int]]]:
    """Separates what is done from what is left to do.

    A shard is done if its commit record fits the plan and its files are there. Damaged records and
    missing or resized files count as not committed: the shard is encoded again.

    Args:
        root: The cache folder.
        intent: What it is to become.
        wanted: The shards in question, as (split, shard); None for all.

    Returns:
        The commit records that count, and the shards that are missing, in order.
    """
    commits: dict[tuple[str, int], CommitRecord] = {}
    missing: list[tuple[str, int]] = []
    plan, fingerprint = intent.plan, intent.manifest.fingerprint.digest
    for split, shard in plan.shard_numbers() if wanted is None else wanted:
        try:
            commit = read_commit(root, split, shard)
        except ManifestError:
            commit = None
        if (
            commit is not None
            and commit.plan_sha256 == plan.shard_sha256(split, shard)
            and commit.fingerprint == fingerprint
            and commit.format_version == intent.manifest.format_version
            and commit.rows == len(plan.splits[split].rows_of(shard))
            and has_its_files(root, commit)
        ):
            commits[split, shard] = commit
        else:
            missing.append((split, shard))
    return commits, missing


def load_chosen(options: EncodeOptions, observer: EncodeObserver) -> FrozenEncoder:
    """Loads the encoder that the options name, while the decoders' server starts.

    Raises:
        CacheError: as `load_encoder` has them.
    """
    # `encode` has started it before torch was imported; a dry run has not.
    start_decoder_server()
    return load_encoder(
        options.encoder,
        weights=options.weights,
        arch=options.arch,
        quality=options.quality,
        metric=options.metric,
        precision=options.precision,
        progress=observer.download,
    )


def find_intent(
    root: Path, images: ImageSource, options: EncodeOptions, encoder: FrozenEncoder
) -> Intent:
    """Reads the manifest and plan of a begun cache, or lists the source; writes nothing.

    A cache that grows is listed again; only its records are read.

    Args:
        root: The cache folder; it need not be there.
        images: The source; its notices are complete afterwards, if it was listed.
        options: What is asked for.
        encoder: The encoder that they name.

    Raises:
        FingerprintMismatchError: the folder holds a cache made with other settings.
        ManifestError: the folder's own records are damaged.
        SourceError, ResourceError: listing failed, or there is no image.
        UsageError: the encoder has no symbols, and symbols are asked for.
    """
    fingerprint = fingerprint_of(options, encoder)
    if not (root / MANIFEST).exists():
        layout = options.layout_spec(FORMAT_VERSION)
        if problem := layout.problem(FORMAT_VERSION, fingerprint.latent):
            raise UsageError(problem)
        counts: Counter[tuple[str | None, int]] = Counter()
        plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, counts=counts)
        refuse_no_classes(images, counts)
        classes = images.classes, images.class_titles
        manifest = _manifest(images, encoder, plan, fingerprint, layout, classes, FORMAT_VERSION)
        notices = [_NO_VAL] if _lacks_val(plan, layout, counts) else []
        return Intent(
            manifest=manifest, is_begun=False, plan=plan, folder=root, notices=tuple(notices)
        )
    folder = growth_of(root) or root
    manifest = read_manifest(folder)
    layout = options.layout_spec(manifest.format_version)
    labels = "auto" if manifest.classes else "none"
    # A source of the user's own may have no classes; it is asked last, for it may have to list.
    if options.labels != labels and (manifest.classes or images.classes):
        raise FingerprintMismatchError(
            f"{root} was made with `labels` {labels!r}, {options.labels!r} is asked for; nothing "
            "was changed",
            hint=f"choose another --out folder, or repeat the command with --labels {labels}",
        )
    made = manifest.layout
    if options.split == "auto":
        layout = replace(layout, split=made.split)
    is_larger = made.limit is not None and (layout.limit or math.inf) > made.limit
    if (
        options.rescan
        or options.retry_failed
        or options.add_views
        or (is_larger and replace(layout, limit=made.limit) == made)
    ):
        return _grown(root, images, options, encoder, fingerprint, layout)
    refuse_difference(root, manifest, fingerprint, layout)
    here, notices = _location_text(images), []
    if folder != root:
        notices.append(f"{root} continues with the new images that were found before")
    if manifest.source != here:
        notices.append(
            f"{root} was planned from {manifest.source}; {here} is taken for the same images in "
            "another place and was not listed (--rescan lists it)"
        )
    elif folder == root:
        notices.append(f"{here} was not listed again (--rescan lists it and takes in new images)")
    return Intent(
        manifest=manifest,
        is_begun=True,
        plan=read_plan(folder, manifest),
        folder=folder,
        notices=tuple(notices),
    )


def _lacks_val(plan: Plan, layout: LayoutSpec, counts: Counter[tuple[str | None, int]]) -> bool:
    """Whether a share of each class was asked for, and every class is too small to give one."""
    was_drawn = layout.val_fraction > 0 and any(split is None for split, _ in counts)
    return was_drawn and layout.split == "stratified" and "val" not in plan.splits


def fingerprint_of(options: EncodeOptions, encoder: FrozenEncoder) -> Fingerprint:
    """Returns the fingerprint of a cache that is made with these options and this encoder.

    Raises:
        UsageError: the encoder has no symbols, and symbols are asked for.
    """
    if options.dtype in ("int8", "int16") and not encoder.has_symbols:
        raise UsageError(
            f"`dtype` is {options.dtype}, but {options.arch} has no symbols of its own: their "
            "means depend on a hyperprior",
            hint="repeat the command with --dtype float16",
        )
    side = options.size // DOWNSAMPLING
    return Fingerprint(
        image=options.image_spec(decoder_name()),
        views=options.view_spec(),
        encoder=encoder.spec,
        latent=LatentSpec(
            dtype=options.dtype,
            step=options.step,
            channels=encoder.num_channels,
            height=side,
            width=side,
        ),
    )


def _manifest(
    images: ImageSource,
    encoder: FrozenEncoder,
    plan: Plan,
    fingerprint: Fingerprint,
    layout: LayoutSpec,
    classes: tuple[tuple[str, ...], tuple[str, ...]],
    format_version: int,
) -> Manifest:
    """Returns the manifest of a new cache; `classes` are names and titles."""
    names, titles = classes
    medians = encoder.medians.tolist() if fingerprint.latent.is_symbols else None
    return Manifest(
        format_version=format_version,
        software=f"ci2p-cache {__version__}",
        state="encoding",
        fingerprint=fingerprint,
        layout=layout,
        source=_location_text(images),
        classes=names,
        class_titles=titles,
        class_order=class_order(names),
        splits=plan.splits,
        plan=_file_record(PLAN, plan.to_bytes()),
        encoder=_file_record(ENCODER, encoder.to_bytes()),
        offset=tuple(medians or (0.0,) * fingerprint.latent.channels),
    )


def _file_record(path: str, data: bytes) -> FileRecord:
    return FileRecord(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _location_text(images: ImageSource) -> str:
    """Returns where a source is as JSON can hold it: what is not UTF-8 is shown with escapes."""
    return images.location().encode("utf-8", "backslashreplace").decode()


def _grown(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    encoder: FrozenEncoder,
    fingerprint: Fingerprint,
    layout: LayoutSpec,
) -> Intent:
    """Lists the source again; the committed rows of the cache stay as they are."""
    manifest = read_manifest(root)
    made = manifest.layout
    if made.limit is None or (layout.limit or math.inf) >= made.limit:
        made = replace(made, limit=layout.limit)
    had, wanted = manifest.fingerprint.views, fingerprint.views
    adds_views = options.add_views and had.kind == "crops" and wanted.num_crops > had.num_crops
    asked = replace(wanted, num_crops=had.num_crops) if adds_views else wanted
    refuse_difference(
        root, replace(manifest, layout=made), replace(fingerprint, views=asked), layout
    )
    earlier = read_plan(root, manifest)
    cache = Intent(manifest=manifest, is_begun=True, plan=earlier, folder=root)
    commits, missing = committed_shards(root, cache)
    if missing and manifest.is_complete:
        raise ShardError(
            f"{root} is damaged: {missing_text(cache, missing)} are not what was committed; "
            "nothing was changed",
            hint=command("verify", root, "--repair"),
        )
    plan, classes = earlier, (manifest.classes, manifest.class_titles)
    if adds_views:
        plan = earlier.with_views(layout, wanted, fingerprint.latent)
    notices: list[str] = []
    again: dict[str, frozenset[int]] = {}
    if options.rescan or layout != manifest.layout:
        names, titles, labels = merged_classes(manifest, images)
        classes = names, titles
        rows = EarlierRows(earlier, labels)
        plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, earlier=rows)
        notices, changed = compare_originals(root, images, rows, plan, list(commits))
        if rows.moved:
            plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, earlier=rows)
        if options.reencode_changed:
            again = dict(changed)
            plan = plan.with_paths({s: {r: rows.paths[s][r] for r in changed[s]} for s in changed})
        if new := names[len(manifest.classes) :]:
            notices.append(
                f"new classes come after those of the cache: {', '.join(new[:3])}"
                + (f" and {len(new) - 3:,} more" if len(new) > 3 else "")
            )
    if options.retry_failed:
        for split, failed in failed_rows(root, list(commits)).items():
            again[split] = again.get(split, frozenset()) | failed
    is_larger = plan.num_samples > earlier.num_samples or adds_views
    if not is_larger and not again and layout == manifest.layout:
        return replace(cache, notices=(*notices, f"nothing new for {root}"))
    return Intent(
        manifest=_manifest(
            images, encoder, plan, fingerprint, layout, classes, manifest.format_version
        ),
        is_begun=False,
        plan=plan,
        folder=root / GROWTH,
        growth=Growth(
            plan=earlier, committed=frozenset(() if adds_views else commits), again=again
        ),
        notices=tuple(notices),
    )


def begin(
    images: ImageSource,
    intent: Intent,
    encoder: FrozenEncoder,
    staging: StagingArea,
    observer: EncodeObserver,
) -> None:
    """Writes plan, encoder and manifest: a cache is begun.

    The caller holds the folder's lock; the observer receives what listing the source has found.

    Raises:
        ResourceError: writing failed.
    """
    for text in images.notices:
        observer.notice(text)
    if "train" in intent.plan.splits and intent.plan.is_sorted_by_class("train"):
        observer.notice(_SORTED)
    staging.put(PLAN, intent.plan.to_bytes())
    staging.put(ENCODER, encoder.to_bytes())
    staging.put_sealed(MANIFEST, intent.manifest.to_dict())
