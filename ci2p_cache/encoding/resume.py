"""Opens a begun cache or begins one, and tells what is committed from what is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache import __version__
from ci2p_cache.cache.commit import CommitRecord, read_commit
from ci2p_cache.cache.manifest import Manifest, read_manifest, refuse_difference
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.traces import gaps, named_ranges
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoding.counted import CountedSource
from ci2p_cache.encoding.lane import Lane
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import Plan, read_plan
from ci2p_cache.encoding.planning import build_plan
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.encoding.shard import EncodeSettings
from ci2p_cache.errors import FingerprintMismatchError, ManifestError, UsageError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoder_server import start_decoder_server
from ci2p_cache.images.source import ImageSource
from ci2p_cache.machine import num_cores
from ci2p_cache.specs import DOWNSAMPLING, Fingerprint, LatentSpec, LayoutSpec

__all__ = [
    "Intent",
    "begin",
    "committed_shards",
    "encode_settings",
    "load_chosen",
    "missing_text",
    "survey",
]


_SORTED = (
    "the images come one class after the other, and rows follow the archives: `train` mixes them "
    "all the same, but with --order blocks, or through a stock webdataset reader, a batch would "
    "hold few classes; shuffle the archives for those"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a cache folder is to become, before anything is written to it."""

    fingerprint: Fingerprint
    """Every field that changes a value."""
    layout: LayoutSpec
    """Every field that changes which sample lies where."""
    plan: Plan
    """All samples: those of the folder, or those that the source lists now."""
    classes: tuple[str, ...]
    """Class names; a label of the plan is an index into them."""
    manifest: Manifest | None
    """The folder's own, where it is gone on with as it is; None where one is to be written."""


def load_chosen(options: EncodeOptions, observer: EncodeObserver) -> FrozenEncoder:
    """Loads the encoder that the options name, while the decoders' server starts.

    Raises:
        CacheError: as `load_encoder` has them.
    """
    # It imports torch while the encoder is loaded and the source is listed.
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
    earlier: Plan | None = None
    if (root / MANIFEST).exists():
        manifest = read_manifest(root)
        refuse_difference(root, manifest, fingerprint, layout)
        _refuse_other_labels(root, manifest, options)
        earlier = read_plan(root, manifest)
        if not options.rescan:
            return Intent(
                fingerprint=fingerprint,
                layout=layout,
                plan=earlier,
                classes=manifest.classes,
                manifest=manifest,
            )
    counted = CountedSource(images)
    plan = build_plan(counted, layout, fingerprint.views, fingerprint.latent, earlier=earlier)
    if earlier is None:
        counted.refuse_no_classes()
    return Intent(
        fingerprint=fingerprint, layout=layout, plan=plan, classes=images.classes, manifest=None
    )


def _refuse_other_labels(root: Path, manifest: Manifest, options: EncodeOptions) -> None:
    made = EncodeOptions.of(manifest).labels
    if options.labels != made:
        raise FingerprintMismatchError(
            f"{root} was made with `labels` {made!r}, {options.labels!r} is asked for; nothing was "
            "changed",
            hint=f"choose another --out folder, or repeat the command with --labels {made}",
        )


def tell_of_other_source(
    root: Path, images: ImageSource, intent: Intent, observer: EncodeObserver
) -> None:
    """Says so where a begun cache was planned from another place than the one now named."""
    here = _location_text(images)
    if intent.manifest is not None and intent.manifest.source != here:
        observer.notice(
            f"{root} was planned from {intent.manifest.source}; {here} is taken for the same "
            "images in another place and was not listed (--rescan lists it)"
        )


def _location_text(images: ImageSource) -> str:
    """Returns where a source lies as JSON can hold it."""
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
        observer: Told what listing the source has found.

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
        class_titles=images.class_titles,
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


def missing_text(intent: Intent, missing: Sequence[tuple[str, int]]) -> str:
    """Names missing shards in ranges, for example `3 of 12 shards (train 3-4; val 0)`."""
    by_split: dict[str, set[int]] = {}
    for split, number in missing:
        by_split.setdefault(split, set()).add(number)
    ranges = {
        split: gaps(record.num_shards, sorted(set(range(record.num_shards)) - by_split[split]))
        for split, record in intent.plan.splits.items()
        if split in by_split
    }
    return f"{len(missing)} of {intent.plan.num_shards} shards ({named_ranges(ranges)})"


def committed_shards(
    root: Path,
    intent: Intent,
    places: Iterable[tuple[str, int]] | None = None,
    *,
    retry_failed: bool,
) -> tuple[dict[tuple[str, int], CommitRecord], list[tuple[str, int]]]:
    """Tells what is done from what is left to do.

    Args:
        root: The cache folder.
        intent: What it is to become.
        places: The shards in question, as (split, number); None for all.
        retry_failed: Whether shards that hold images which failed are to be encoded again.

    Returns:
        The commit records that count, by (split, shard), and the shards that are missing, in order.
    """
    commits: dict[tuple[str, int], CommitRecord] = {}
    missing: list[tuple[str, int]] = []
    for split, number in intent.plan.shard_numbers() if places is None else places:
        commit = _committed(root, intent.plan, split, number, intent.fingerprint.digest)
        if commit is None or (retry_failed and commit.valid_rows < commit.rows):
            missing.append((split, number))
        else:
            commits[split, number] = commit
    return commits, missing


def _committed(
    root: Path, plan: Plan, split: str, shard: int, fingerprint: str
) -> CommitRecord | None:
    """Returns the commit record of a shard if it counts: it fits the plan and its files are there.

    Damaged records and missing or resized files count as not committed: the shard is encoded again.
    """
    try:
        commit = read_commit(root, split, shard)
    except ManifestError:
        return None
    if commit is None or (commit.plan_sha256, commit.fingerprint, commit.rows) != (
        plan.shard_sha256(split, shard),
        fingerprint,
        len(plan.splits[split].rows_of(shard)),
    ):
        return None
    for file in commit.files:
        path = root / file.path
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
            return None
    return commit
