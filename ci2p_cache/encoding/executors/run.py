"""Who encodes the missing shards: this process, one process per device, or actors in Ray.

Whoever does it encodes whole shards with the same `ShardEncoder`, and a shard counts by its commit
record alone: that each is encoded exactly once is a property of the commit, not of the executor.
"""

from __future__ import annotations

import shutil

from ci2p_cache.cache.codecs import CODECS
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import tar_sample_bytes
from ci2p_cache.encoding.budget import ErrorBudget
from ci2p_cache.encoding.carry import Carrier
from ci2p_cache.encoding.executors.work import Place, Work
from ci2p_cache.encoding.lane import make_lanes
from ci2p_cache.encoding.resume import encode_settings
from ci2p_cache.encoding.shard import ShardEncoder
from ci2p_cache.machine import bf16_notice, chosen_devices

__all__ = ["encode_shards"]


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
    settings = encode_settings(work.intent, work.options, lanes)
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
    root, intent, observer = work.root, work.intent, work.observer
    latent, splits = intent.fingerprint.latent, intent.plan.splits
    share = CODECS[intent.layout.codec].expected_share[latent.dtype]
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
            f"disk of {root}; when it is full the run stops, and continues after space is made"
        )
