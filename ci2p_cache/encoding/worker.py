"""A worker of an encode run: encodes and commits whole shards of a folder that is begun.

::

    driver: holds the folder's lock, hands out shards, counts, finalises
    worker: opens the begun folder and the source, encodes and commits whole shards

Without `--executor` they are one process. What another worker encodes with is in the folder: plan,
settings and the encoder itself. As `python -m ci2p_cache.encoding.worker` it is a process that
speaks JSON lines, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.encoding.intent import Intent
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.progress import EncodeObserver, EncodeProgress, ProgressMeter
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import (
    EncodeSettings,
    ErrorBudget,
    ShardEncoder,
    make_replicas,
    parse_max_errors,
    refuse_other_decoder,
)
from ci2p_cache.errors import CacheError
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
from ci2p_cache.process import tune_process

__all__ = ["Event", "Job", "ShardId", "Work", "encode_here", "serve"]

ShardId = tuple[str, int]
"""(split, shard)."""

Event = dict[str, Any]
"""What a worker reports; see `serve`."""


@dataclass(frozen=True, slots=True)
class Work:
    """A cache folder that is begun, and what its missing shards are encoded with."""

    root: Path
    images: ImageReader
    options: EncodeOptions
    encoder: FrozenEncoder
    staging: StagingArea
    intent: Intent
    meter: ProgressMeter
    observer: EncodeObserver

    @property
    def bad_allowed(self) -> int:
        """Bad images that the whole cache may hold."""
        return parse_max_errors(self.options.max_errors, self.intent.plan.num_samples)


def encode_here(work: Work, shards: Iterable[ShardId]) -> Generator[CommitRecord]:
    """Encodes shards in this process, and yields each one's record once it is committed.

    Raises:
        CacheError: as `ShardEncoder.encode` has them.
    """
    replicas, options = make_replicas(work.encoder, work.options.devices), work.options
    plan, meter = work.intent.plan, work.meter
    with ShardEncoder(
        work.images,
        EncodeSettings.of(work.intent.manifest, replicas, options),
        replicas,
        work.staging,
        budget=ErrorBudget(work.bad_allowed, already_bad=meter.bad),
        on_image=lambda good: meter.count(good, encoder.busy_seconds),
        carrier=Carrier.of(work.root),
    ) as encoder:
        for record in encoder.encode(plan.shard(*shard) for shard in shards):
            meter.busy_seconds = encoder.busy_seconds
            yield record


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker in another process gets to know, in plain values."""

    root: str
    """The cache folder: absolute, begun, locked by the driver."""
    source: str
    """Where the images are, as `ImageReader.location` has it."""
    name: str
    """Name of the worker's staging folder."""
    options: dict[str, Any]
    """Fields of `EncodeOptions` that the folder does not record."""
    already_bad: int
    """Bad images committed before this run."""


def serve(job: Job, say: Callable[[str], None], ask: Callable[[], Any]) -> None:
    """Encodes shards that a driver hands out, until it has no more.

    Args:
        job: What to work on.
        say: Sends the driver an event as JSON: `wants`, there is room for another shard, so that
            the pipeline never drains between shards; `good`, `bad` and `busy`, images since the
            last such event, and how long g_a has run; `commit`, a record; or `error`, the last.
        ask: Waits for the answer to `wants`: (split, shard), or None.
    """

    def send(event: Event) -> None:
        say(json.dumps(event))

    def shards() -> Iterator[ShardId]:
        while True:
            send({"wants": "shard"})
            shard = ask()
            if shard is None:
                return
            yield shard[0], shard[1]

    try:
        root, counts = Path(job.root), _Counts(job.already_bad, send)
        manifest = read_manifest(root)
        refuse_other_decoder(manifest.fingerprint)
        plan = read_plan(root, manifest)
        intent = Intent(manifest=manifest, is_begun=True, plan=plan, folder=root)
        encoder = load_recorded_encoder(root / manifest.encoder.path, manifest.fingerprint.encoder)
        reader, options = open_reader(job.source), EncodeOptions(**job.options)
        with StagingArea(root, name=job.name) as staging:
            work = Work(root, reader, options, encoder, staging, intent, counts.meter, counts)
            for record in encode_here(work, shards()):
                counts.meter.report()
                send({"commit": record.to_dict()})
    except CacheError as error:
        data = {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
        send({"error": data})


class _Counts(EncodeObserver):
    """Reports images that the driver has not counted yet, at most ten times a second."""

    def __init__(self, already_bad: int, send: Callable[[Event], None]) -> None:
        self.meter = ProgressMeter(self, total=0, done=already_bad, bad=already_bad)
        self._send = send
        self._good, self._bad = 0, already_bad

    def progress(self, progress: EncodeProgress) -> None:
        """Reports what was counted since the last time."""
        good, bad = progress.done - progress.bad, progress.bad
        self._send(
            {"good": good - self._good, "bad": bad - self._bad, "busy": self.meter.busy_seconds}
        )
        self._good, self._bad = good, bad


def _main() -> None:
    answers: queue.Queue[Any] = queue.Queue()
    # What native code writes to standard output must not come between.
    out = os.dup(1)
    os.dup2(2, 1)

    def read() -> None:
        for line in sys.stdin:
            answers.put(json.loads(line))
        # The driver has gone, however it went.
        os._exit(1)

    def say(text: str) -> None:
        line = f"{text}\n".encode()
        while line:
            line = line[os.write(out, line) :]

    threading.Thread(target=read, daemon=True).start()
    job = Job(**answers.get())
    tune_process(job.options["devices"])
    serve(job, say, answers.get)
    # Everything is put away; taking torch down would take seconds, and decoders end by themselves.
    os._exit(0)


if __name__ == "__main__":
    _main()
