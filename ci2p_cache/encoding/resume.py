"""Opens a begun cache or begins one, encodes what is not committed, and completes it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache import __version__
from ci2p_cache.cache.commit import CommitRecord, StagingArea, read_commit
from ci2p_cache.cache.manifest import (
    ENCODER,
    MANIFEST,
    PLAN,
    Manifest,
    read_manifest,
    refuse_difference,
)
from ci2p_cache.cache.tar_shards import tar_sample_bytes
from ci2p_cache.encoder.frozen import FrozenEncoder, load_encoder
from ci2p_cache.encoding.budget import ErrorBudget, parse_max_errors
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.lane import Lane, make_lanes
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import Plan, build_plan, read_plan
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary, ProgressMeter, summarise
from ci2p_cache.encoding.shard import EncodeSettings, ShardEncoder
from ci2p_cache.errors import ManifestError, UsageError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import start_decoder_server
from ci2p_cache.images.source import ImageSource
from ci2p_cache.machine import bf16_notice, num_cores
from ci2p_cache.specs import DOWNSAMPLING, Fingerprint, LatentSpec, LayoutSpec

__all__ = ["Intent", "committed_shards", "encode_settings", "load_chosen", "resume", "survey"]

_EXPECTED_SHARE = {"int8": 0.22, "int16": 0.12, "float16": 0.95, "float32": 0.92}
"""Compressed over raw bytes: measured for int8 and float16, a guess on the safe side otherwise."""


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
    manifest = intent.manifest or _start(images, intent, encoder, staging)
    for text in images.notices:
        observer.notice(text)
    return _encode_missing(root, images, options, encoder, staging, manifest, intent, observer)


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
        earlier = read_plan(root, manifest)
        if not options.rescan:
            return Intent(
                fingerprint=fingerprint,
                layout=layout,
                plan=earlier,
                classes=manifest.classes,
                manifest=manifest,
            )
    plan = build_plan(images, layout, fingerprint.views, fingerprint.latent, earlier=earlier)
    return Intent(
        fingerprint=fingerprint, layout=layout, plan=plan, classes=images.classes, manifest=None
    )


def _start(
    images: ImageSource, intent: Intent, encoder: FrozenEncoder, staging: StagingArea
) -> Manifest:
    """Writes plan, encoder and manifest: a cache is begun."""
    latent = intent.fingerprint.latent
    manifest = Manifest(
        software=f"ci2p-cache {__version__}",
        state="encoding",
        fingerprint=intent.fingerprint,
        layout=intent.layout,
        # A path that is not UTF-8 is shown with escapes; JSON could not hold it.
        source=images.location().encode("utf-8", "backslashreplace").decode(),
        classes=intent.classes,
        class_titles=images.class_titles,
        splits=intent.plan.splits,
        plan=staging.put(PLAN, intent.plan.to_bytes()),
        encoder=staging.put(ENCODER, encoder.to_bytes()),
        offset=tuple(encoder.medians.tolist()) if latent.is_symbols else (0.0,) * latent.channels,
    )
    staging.put_sealed(MANIFEST, manifest.to_dict())
    return manifest


def _encode_missing(
    root: Path,
    images: ImageSource,
    options: EncodeOptions,
    encoder: FrozenEncoder,
    staging: StagingArea,
    manifest: Manifest,
    intent: Intent,
    observer: EncodeObserver,
) -> EncodeSummary:
    """Encodes every shard that is not committed, then finalises."""
    plan = intent.plan
    commits, missing = committed_shards(root, intent, retry_failed=options.retry_failed)
    done = sum(commit.rows for commit in commits.values())
    bad = done - sum(commit.valid_rows for commit in commits.values())
    meter = ProgressMeter(observer, total=plan.num_samples, done=done, bad=bad)
    if not missing and manifest.is_complete:
        return summarise(root, manifest, meter, 0.0)
    if missing:
        if manifest.is_complete:
            manifest = dataclasses.replace(manifest, state="encoding", files=())
            staging.put_sealed(MANIFEST, manifest.to_dict())
        _tell_disk_need(root, intent, missing, observer)
        lanes = make_lanes(encoder, options.devices)
        if options.precision == "bf16" and (text := bf16_notice(lanes[0].device)):
            observer.notice(text)
        settings = encode_settings(intent, options, lanes)
        budget = ErrorBudget(
            parse_max_errors(options.max_errors, plan.num_samples), already_bad=bad
        )
        with ShardEncoder(
            images,
            settings,
            lanes,
            staging,
            budget=budget,
            on_image=lambda good: meter.count(good, shards.busy_seconds),
        ) as shards:
            for result in shards.encode(plan.shard(*place) for place in missing):
                commits[result.split, result.shard] = result
            meter.busy_seconds = shards.busy_seconds
        meter.report()
    seconds = meter.seconds
    ordered = [commits[place] for place in plan.shard_numbers()]
    manifest = finalise(root, manifest, plan, ordered, staging)
    return summarise(root, manifest, meter, seconds)


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


def committed_shards(
    root: Path, intent: Intent, *, retry_failed: bool
) -> tuple[dict[tuple[str, int], CommitRecord], list[tuple[str, int]]]:
    """Tells what is done from what is left to do.

    Args:
        root: The cache folder.
        intent: What it is to become.
        retry_failed: Whether shards that hold images which failed are to be encoded again.

    Returns:
        The commit records that count, by (split, shard), and the shards that are missing, in order.
    """
    commits: dict[tuple[str, int], CommitRecord] = {}
    missing: list[tuple[str, int]] = []
    for split, number in intent.plan.shard_numbers():
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


def _tell_disk_need(
    root: Path, intent: Intent, missing: list[tuple[str, int]], observer: EncodeObserver
) -> None:
    latent, splits = intent.fingerprint.latent, intent.plan.splits
    share = 1.0 if intent.layout.codec == "none" else _EXPECTED_SHARE[latent.dtype]
    need = 0.0
    for split, number in missing:
        rows, views = len(splits[split].rows_of(number)), splits[split].views
        if intent.layout.has_zarr:
            need += share * rows * views * latent.num_bytes
        if intent.layout.has_tar:
            need += rows * tar_sample_bytes(latent, views)
    free = shutil.disk_usage(root).free
    if need > free:
        observer.notice(
            f"about {need / 1e9:.1f} GB will be written and {free / 1e9:.1f} GB are free on the "
            f"disk of {root}; when it is full the run stops, and goes on after space is made"
        )
