"""Who encodes the missing shards: this process, one process per device, or actors in Ray.

Whoever does it encodes whole shards with the same `ShardEncoder`, and a shard counts by its commit
record alone: that each is encoded exactly once is a property of the commit, not of the executor.
Workers in other processes, a crew, are known by numbers from 0, and each of them calls `serve`::

    crew.start(number, job)    starts one; it is to use one of `crew.devices`
    crew.poll()                waits for the next event of any; `lost` or `ended` is its last
    crew.give(number, shard)   answers its `wants`; None: there are no more shards
    crew.close()               ends all
"""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ci2p_cache import errors
from ci2p_cache.cache.codecs import CODECS
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import tar_sample_bytes
from ci2p_cache.cache.staging import remove_staged
from ci2p_cache.encoding.intent import committed_shards
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import refuse_more_bad
from ci2p_cache.encoding.worker import Event, Job, ShardId, Work, encode_here
from ci2p_cache.errors import CacheError, ResourceError
from ci2p_cache.machine import BF16_GAIN, bf16_notice, chosen_devices, has_bf16

if TYPE_CHECKING:
    from ci2p_cache.encoding.processes import Processes
    from ci2p_cache.encoding.ray_actors import Actors

__all__ = ["encode_shards"]

_NO_SHARD = "no shard yet"


def encode_shards(work: Work, missing: Sequence[ShardId]) -> dict[ShardId, CommitRecord]:
    """Encodes and commits shards with the executor that the options name.

    Args:
        work: Where, from what, and with what.
        missing: The shards, in order.

    Returns:
        Their commit records.

    Raises:
        CacheError: as `encode` has them; the first that a worker met.
        ResourceError: workers were lost again and again with the same shard.
    """
    options, total = work.options, work.intent.plan.num_samples
    need, free = _expected_bytes(work, missing), shutil.disk_usage(work.root).free
    if need > free:
        work.observer.notice(
            f"about {need / 1e9:.1f} GB will be written and {free / 1e9:.1f} GB are free on the "
            f"disk of {work.root}; when it is full the run stops, and continues after space is made"
        )
    work.observer.notice(
        f"the run stops if more than {work.bad_allowed:,} of {total:,} images cannot be decoded "
        f"(--max-errors {options.max_errors})"
    )
    # Ray's devices are other machines', and unknown here.
    if options.executor != "ray" and (text := _precision_notice(work, missing)):
        work.observer.notice(text)
    match options.executor:
        case "processes":
            from ci2p_cache.encoding.processes import Processes

            commits = _Drive(work, missing, Processes(options, len(missing))).run()
        case "ray":
            from ci2p_cache.encoding.ray_actors import Actors

            commits = _Drive(work, missing, Actors(options, len(missing))).run()
        case _:
            with closing(encode_here(work, missing)) as records:
                commits = {(record.split, record.shard): record for record in records}
    work.meter.report()
    return commits


def _precision_notice(work: Work, missing: Sequence[ShardId]) -> str | None:
    """Returns what bfloat16 would give, or costs, here; None where there is nothing to choose."""
    options = work.options
    device, *_ = chosen_devices(options.devices)
    if options.precision == "bf16":
        return bf16_notice(device)
    # A cache that is begun keeps its precision.
    begun = len(missing) < work.intent.plan.num_shards
    if begun or options.precision != "float32" or device.type != "cpu" or not has_bf16(device):
        return None
    return f"this processor computes in bfloat16: {BF16_GAIN}; float32 is the reference"


def _expected_bytes(work: Work, missing: Sequence[ShardId]) -> float:
    """Returns about how many bytes of latents will be written."""
    latent, layout = work.intent.manifest.fingerprint.latent, work.intent.manifest.layout
    share = CODECS[layout.codec].expected_share[latent.dtype]
    need = 0.0
    for split, number in missing:
        record = work.intent.plan.splits[split]
        rows, views = len(record.rows_of(number)), record.views
        need += share * rows * views * latent.num_bytes * layout.has_zarr
        need += rows * tar_sample_bytes(latent, views) * layout.has_tar
    return need


@dataclass(slots=True)
class _Worker:
    """A worker as its driver sees it."""

    name: str
    """Name of its staging folder."""
    device: str
    holds: list[ShardId] = field(default_factory=list)
    """Shards that it was given and has not committed."""
    good: int = 0
    """Images that it has reported and that are in no committed shard yet."""
    bad: int = 0
    busy_seconds: float = 0.0


class _Drive:
    """Hands out shards, counts, and replaces workers that are lost: others get their shards.

    Args:
        work: Where, from what, and with what.
        missing: The shards.
        crew: Who encodes them.
    """

    def __init__(self, work: Work, missing: Sequence[ShardId], crew: Processes | Actors) -> None:
        self._work = work
        self._crew = crew
        self._left = deque(missing)
        self._num_missing = len(missing)
        self._commits: dict[ShardId, CommitRecord] = {}
        self._workers: list[_Worker] = []
        self._losses: Counter[str] = Counter()
        self._carrier = Carrier.of(work.root)
        self._already_bad = work.meter.bad

    def run(self) -> dict[ShardId, CommitRecord]:
        """Drives all to their end; whatever ends it, no worker is left behind."""
        try:
            for device in self._crew.devices:
                self._start(device)
            while len(self._commits) < self._num_missing:
                number, event = self._crew.poll()
                self._take(number, self._workers[number], event)
        finally:
            self._crew.close()
            for worker in self._workers:
                self._remove_staging(worker)
        return self._commits

    def _start(self, device: str) -> None:
        work, number = self._work, len(self._workers)
        name = f"{work.staging.name}-{number}"
        job = Job(
            root=str(work.root.absolute()),
            source=work.images.location(),
            name=name,
            options={
                "devices": device,
                "workers": self._crew.threads,
                "batch_size": work.options.batch_size,
                "max_errors": work.options.max_errors,
            },
            already_bad=self._already_bad,
        )
        self._workers.append(_Worker(name, device))
        self._crew.start(number, job)

    def _take(self, number: int, worker: _Worker, event: Event) -> None:
        match event:
            case {"good": good, "bad": bad, "busy": busy}:
                worker.busy_seconds = busy
                self._count(worker, good, bad)
            case {"commit": data}:
                self._commit(worker, CommitRecord.from_dict(data))
            case {"wants": _}:
                # Without a shard it ends what it has, even if others come back later.
                shard = self._left.popleft() if self._left else None
                if shard is not None:
                    worker.holds.append(shard)
                self._crew.give(number, shard)
            case {"lost": how}:
                self._replace(worker, how)
            case {"ended": how} if worker.holds:
                self._replace(worker, how)
            case {"error": {"kind": kind, "message": message, "hint": hint}}:
                made = getattr(errors, kind, CacheError)
                known = isinstance(made, type) and issubclass(made, CacheError)
                raise made(message, hint=hint) if known else CacheError(message, hint=hint)

    def _count(self, worker: _Worker, good: int, bad: int) -> None:
        meter = self._work.meter
        worker.good += good
        worker.bad += bad
        busy = sum(each.busy_seconds for each in self._workers) / len(self._crew.devices)
        for image in range(good + bad):
            meter.count(image < good, busy)
        if bad:
            refuse_more_bad(meter.bad, self._work.bad_allowed, "several workers found them")

    def _commit(self, worker: _Worker, record: CommitRecord) -> None:
        shard = record.split, record.shard
        self._commits[shard] = record
        worker.holds.remove(shard)
        del self._losses[_NO_SHARD]
        # Only some images of a growth's shard were read.
        good, bad = self._carrier.count(*shard) if self._carrier is not None else (0, 0)
        good, bad = record.valid_rows - good, record.rows - record.valid_rows - bad
        # A lost worker may have committed more than it could report.
        self._count(worker, max(0, good - worker.good), max(0, bad - worker.bad))
        worker.good -= good
        worker.bad -= bad

    def _replace(self, worker: _Worker, how: str) -> None:
        """Takes back what a lost worker held; what it committed before its end counts."""
        work, most = self._work, self._crew.most_losses
        commits, left = committed_shards(work.root, work.intent, tuple(worker.holds))
        for record in commits.values():
            self._commit(worker, record)
        texts = [f"{split} shard {number}" for split, number in left] or [_NO_SHARD]
        for held in texts:
            self._losses[held] += 1
            if self._losses[held] == most:
                raise ResourceError(
                    f"{how}; {most} workers were lost while they held {held}. "
                    "What was committed before is safe",
                    hint="run the same command with --executor local to see why",
                )
        work.meter.take_back(worker.good, worker.bad)
        work.observer.notice(f"{how}; another takes over its {len(left)} shards")
        self._left.extendleft(reversed(left))
        worker.holds = []
        self._remove_staging(worker)
        self._start(worker.device)

    def _remove_staging(self, worker: _Worker) -> None:
        # A lost actor may work for a while on a machine that cannot be reached.
        remove_staged(self._work.staging.root, worker.name)
