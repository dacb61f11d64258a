"""Who encodes the missing shards: this process, one process per device, or actors in Ray.

Whoever does it encodes whole shards with the same `ShardEncoder`, and a shard counts by its commit
record alone: that each is encoded exactly once is a property of the commit, not of the executor.
"""

from __future__ import annotations

import shutil

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.tar_shards import tar_sample_bytes
from ci2p_cache.encoding.executors.work import Place, Work
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import EncodeSettings, ErrorBudget, ShardEncoder, make_lanes
from ci2p_cache.machine import bf16_notice, chosen_devices

__all__ = ["encode_shards"]

_EXPECTED_SHARE = {"int8": 0.22, "int16": 0.12, "float16": 0.95, "float32": 0.92}
"""Compressed over raw bytes: measured for int8 and float16, a guess on the safe side otherwise."""


def encode_shards(work: Work, missing: list[Place]) -> dict[Place, CommitRecord]:
    """Encodes and commits shards with the executor that the options name.

    Args:
        work: Where, from what, and with what.
        missing: The shards, in order.

    Returns:
        Their commit records.

    Raises:
        CacheError: as `encode` has them.
    """
    _tell_disk_need(work, missing)
    options, total = work.options, work.intent.plan.num_samples
    work.observer.notice(
        f"up to {work.bad_allowed:,} of {total:,} images may fail before the run stops "
        f"(--max-errors {options.max_errors})"
    )
    # Ray's devices are other machines', and unknown here.
    if options.precision == "bf16" and options.executor != "ray":
        device, *_ = chosen_devices(options.devices)
        if text := bf16_notice(device):
            work.observer.notice(text)
    match options.executor:
        case "processes":
            from ci2p_cache.encoding.executors.processes import encode_in_processes as run
        case "ray":
            from ci2p_cache.encoding.executors.ray_actors import encode_in_ray as run
        case _:
            run = _encode_here
    commits = run(work, missing)
    work.meter.report()
    return commits


def _encode_here(work: Work, missing: list[Place]) -> dict[Place, CommitRecord]:
    lanes = make_lanes(work.encoder, work.options.devices)
    settings = EncodeSettings.of(
        work.intent.manifest,
        lanes,
        batch_size=work.options.batch_size,
        workers=work.options.workers,
    )
    plan, meter, commits = work.intent.plan, work.meter, {}
    with ShardEncoder(
        work.images,
        settings,
        lanes,
        work.staging,
        budget=ErrorBudget(work.bad_allowed, already_bad=work.meter.bad),
        on_image=lambda good: meter.count(good, shards.busy_seconds),
        carrier=Carrier.of(work.root),
    ) as shards:
        for record in shards.encode(plan.shard(*place) for place in missing):
            commits[record.split, record.shard] = record
        meter.busy_seconds = shards.busy_seconds
    return commits


def _tell_disk_need(work: Work, missing: list[Place]) -> None:
    root, observer, manifest = work.root, work.observer, work.intent.manifest
    latent, splits, layout = manifest.fingerprint.latent, manifest.splits, manifest.layout
    share = 1.0 if layout.codec == "none" else _EXPECTED_SHARE[latent.dtype]
    need = 0.0
    for split, number in missing:
        rows, views = len(splits[split].rows_of(number)), splits[split].views
        if layout.has_zarr:
            need += share * rows * views * latent.num_bytes
        if layout.has_tar:
            need += rows * tar_sample_bytes(latent, views)
    free = shutil.disk_usage(root).free
    if need > free:
        observer.notice(
            f"about {need / 1e9:.1f} GB will be written and {free / 1e9:.1f} GB are free on the "
            f"disk of {root}; when it is full the run stops, and continues after space is made"
        )
