"""Opens a begun cache or begins one, and tells what is committed from what is left to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ci2p_cache import __version__
from ci2p_cache.cache.growth import GROWTH, growth_of
from ci2p_cache.cache.manifest import Manifest, class_order, read_manifest, refuse_difference
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoding.counted import CountedSource
from ci2p_cache.encoding.growth import (
    Growth,
    changed_originals,
    failed_rows,
    merged_classes,
)
from ci2p_cache.encoding.intent import Intent, committed_shards, missing_text
from ci2p_cache.encoding.lane import Lane
from ci2p_cache.encoding.moved import find_moved
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.planning import EarlierRows, build_plan
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.encoding.shard import EncodeSettings
from ci2p_cache.errors import FingerprintMismatchError, ShardError, UsageError, command
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import start_decoder_server
from ci2p_cache.images.source import ImageSource
from ci2p_cache.machine import num_cores
from ci2p_cache.specs import DOWNSAMPLING, Fingerprint, LatentSpec, LayoutSpec

__all__ = ["begin", "encode_settings", "load_chosen", "survey"]


_SORTED = (
    "the images come one class after the other, and rows follow the archives: `train` mixes them "
    "all the same, but with --order blocks, or through a stock webdataset reader, a batch would "
    "hold few classes; shuffle the archives for those"
)


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


def _fingerprint(options: EncodeOptions, encoder: FrozenEncoder) -> Fingerprint:
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


def survey(
    root: Path, images: ImageSource, options: EncodeOptions, encoder: FrozenEncoder
) -> Intent:
    """Reads the manifest and plan of a begun cache, or lists the source; writes nothing.

    A cache that is to grow is listed anew; nothing of it is read but what its records say.

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
    fingerprint, layout = _fingerprint(options, encoder), options.layout_spec()
    if not (root / MANIFEST).exists():
        counted = CountedSource(images)
        plan = build_plan(counted, layout, fingerprint.views, fingerprint.latent)
        counted.refuse_no_classes()
        return Intent(
            fingerprint=fingerprint,
            layout=layout,
            plan=plan,
            classes=images.classes,
            class_titles=images.class_titles,
            manifest=None,
            folder=root,
        )
    folder = growth_of(root) or root
    manifest = read_manifest(folder)
    _refuse_other_labels(root, manifest, options)
    if not (options.rescan or options.retry_failed or _is_larger(layout, manifest.layout)):
        refuse_difference(root, manifest, fingerprint, layout)
        notices = _not_listed(root, folder, manifest, images)
        return Intent.of(manifest, read_plan(folder, manifest), folder, notices)
    return _grown(root, read_manifest(root), images, options, fingerprint, layout)


def _refuse_other_labels(root: Path, manifest: Manifest, options: EncodeOptions) -> None:
    made = EncodeOptions.of(manifest).labels
    if options.labels != made:
        raise FingerprintMismatchError(
            f"{root} was made with `labels` {made!r}, {options.labels!r} is asked for; nothing was "
            "changed",
            hint=f"choose another --out folder, or repeat the command with --labels {made}",
        )


def _is_larger(wanted: LayoutSpec, made: LayoutSpec) -> bool:
    """Whether more images are wanted, and nothing else is."""
    limits = math.inf if wanted.limit is None else wanted.limit, made.limit
    return (
        limits[1] is not None
        and limits[0] > limits[1]
        and replace(wanted, limit=made.limit) == made
    )


def _not_listed(
    root: Path, folder: Path, manifest: Manifest, images: ImageSource
) -> tuple[str, ...]:
    """Says that a begun cache goes by its plan, and where it was planned from another place."""
    here, grows = _location_text(images), folder != root
    notices = (f"{root} continues with the new images that were found before",) if grows else ()
    if manifest.source != here:
        return (
            *notices,
            f"{root} was planned from {manifest.source}; {here} is taken for the same images in "
            "another place and was not listed (--rescan lists it)",
        )
    return notices or (f"{here} was not listed again (--rescan lists it and takes in new images)",)


def _grown(
    root: Path,
    manifest: Manifest,
    images: ImageSource,
    options: EncodeOptions,
    fingerprint: Fingerprint,
    layout: LayoutSpec,
) -> Intent:
    """Lists the source anew; the committed rows of the cache stay as they are."""
    made = manifest.layout
    if made.limit is None or (layout.limit or math.inf) >= made.limit:
        made = replace(made, limit=layout.limit)
    refuse_difference(root, replace(manifest, layout=made), fingerprint, layout)
    earlier = read_plan(root, manifest)
    cache = Intent.of(manifest, earlier, root)
    commits, missing = committed_shards(root, cache)
    if missing and manifest.is_complete:
        raise ShardError(
            f"{root} is damaged: {missing_text(cache, missing)} are not what was committed; "
            "nothing was changed",
            hint=command("verify", root, "--repair"),
        )
    plan, classes, titles = earlier, cache.classes, cache.class_titles
    notices: list[str] = []
    again: dict[str, frozenset[int]] = {}
    if options.rescan or layout != manifest.layout:
        classes, titles, labels = merged_classes(manifest, images)
        rows = EarlierRows(earlier, labels)
        plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, earlier=rows)
        moved = find_moved(root, images, rows, plan, list(commits))
        if moved:
            rows.take_moved(moved)
            plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, earlier=rows)
        notices, changed = changed_originals(root, images, rows, list(commits), moved)
        if options.reencode_changed:
            again = dict(changed)
            plan = plan.with_paths(rows.places(changed))
        if new := classes[len(cache.classes) :]:
            notices.append(
                f"new classes come after those of the cache: {', '.join(new[:3])}"
                + (f" and {len(new) - 3:,} more" if len(new) > 3 else "")
            )
    if options.retry_failed:
        for split, failed in failed_rows(root, list(commits)).items():
            again[split] = again.get(split, frozenset()) | failed
    if plan.num_samples == earlier.num_samples and not again and layout == manifest.layout:
        notices.append(f"nothing new for {root}")
        return replace(cache, notices=tuple(notices))
    return Intent(
        fingerprint=fingerprint,
        layout=layout,
        plan=plan,
        classes=classes,
        class_titles=titles,
        manifest=None,
        folder=root / GROWTH,
        growth=Growth(plan=earlier, committed=frozenset(commits), again=again),
        notices=tuple(notices),
    )


def _location_text(images: ImageSource) -> str:
    """Returns where a source is as JSON can hold it."""
    return images.location().encode("utf-8", "backslashreplace").decode()


def begin(
    images: ImageSource,
    intent: Intent,
    encoder: FrozenEncoder,
    staging: StagingArea,
    observer: EncodeObserver,
) -> Manifest:
    """Writes plan, encoder and manifest: a cache is begun.

    Args:
        images: The source, listed.
        intent: What the folder is to become.
        encoder: The encoder.
        staging: Where files are staged; the caller holds the folder's lock.
        observer: Receives what listing the source has found.

    Raises:
        ResourceError: writing failed.
    """
    for text in images.notices:
        observer.notice(text)
    if "train" in intent.plan.splits and intent.plan.is_sorted_by_class("train"):
        observer.notice(_SORTED)
    latent = intent.fingerprint.latent
    manifest = Manifest(
        software=f"ci2p-cache {__version__}",
        state="encoding",
        fingerprint=intent.fingerprint,
        layout=intent.layout,
        # A path that is not UTF-8 is shown with escapes; JSON could not hold it.
        source=_location_text(images),
        classes=intent.classes,
        class_titles=intent.class_titles,
        class_order=class_order(intent.classes),
        splits=intent.plan.splits,
        plan=staging.put(PLAN, intent.plan.to_bytes()),
        encoder=staging.put(ENCODER, encoder.to_bytes()),
        offset=tuple(encoder.medians.tolist()) if latent.is_symbols else (0.0,) * latent.channels,
    )
    staging.put_sealed(MANIFEST, manifest.to_dict())
    return manifest


def encode_settings(
    intent: Intent, options: EncodeOptions, lanes: Sequence[Lane]
) -> EncodeSettings:
    """Returns what a shard encoder is to know, with the defaults that depend on the machine."""
    on_cpu = lanes[0].device.type == "cpu"
    return EncodeSettings(
        fingerprint=intent.fingerprint,
        layout=intent.layout,
        splits=intent.plan.splits,
        classes=intent.classes,
        batch_size=options.batch_size or (8 if on_cpu else 256),
        decode_threads=options.workers or num_cores(),
    )
