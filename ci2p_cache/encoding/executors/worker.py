"""One worker of an encode run that is spread over processes or machines.

::

    driver: holds the folder's lock, hands out shards, counts, finalises
    worker: opens the begun folder and the source, encodes and commits whole shards

What a worker encodes with is in the folder: plan, settings and the encoder itself. The driver
sends little and gets commit records back. As `python -m ci2p_cache.encoding.executors.worker` it
is a process that speaks JSON lines: it asks for each shard when it has room for it, so its pipeline
never drains between shards, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ci2p_cache import errors
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.recorded import load_recorded_encoder
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.rows import Carrier
from ci2p_cache.encoding.shard import (
    EncodeSettings,
    ErrorBudget,
    ShardEncoder,
    make_lanes,
    refuse_other_decoder,
)
from ci2p_cache.errors import CacheError
from ci2p_cache.images.locate import open_reader

__all__ = ["Job", "Worker", "error_of", "told"]

_TICK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker is told once."""

    root: str
    """The cache folder: absolute, begun, locked by the driver."""
    source: str
    """Where the images are, as `ImageSource.location` has it."""
    devices: str
    """The worker's own, for example cpu:1 or cuda:0."""
    batch_size: int | None
    """Views per call of g_a."""
    workers: int
    """Threads that read and decode."""
    bad_allowed: int
    """Bad images that the whole cache may hold."""
    bad_already: int
    """Those committed before this run."""
    name: str
    """Name of the worker's staging folder."""


class Worker:
    """Encodes and commits shards of a begun folder; a context manager that owns its threads.

    Args:
        job: What to work on.
        on_image: Called after each image, with whether it was good and how long g_a has run.

    Raises:
        CacheError: the folder, its encoder or the source cannot be used here.
    """

    def __init__(self, job: Job, on_image: Callable[[bool, float], None]) -> None:
        root = Path(job.root)
        manifest = read_manifest(root)
        refuse_other_decoder(manifest.fingerprint)
        self._plan = read_plan(root, manifest)
        encoder = load_recorded_encoder(root / manifest.encoder.path, manifest.fingerprint.encoder)
        lanes = make_lanes(encoder, job.devices)
        self._staging = StagingArea(root, name=job.name)
        self._shards = ShardEncoder(
            open_reader(job.source),
            EncodeSettings.of(manifest, lanes, batch_size=job.batch_size, workers=job.workers),
            lanes,
            self._staging,
            budget=ErrorBudget(job.bad_allowed, already_bad=job.bad_already),
            on_image=lambda good: on_image(good, self._shards.busy_seconds),
            carrier=Carrier.of(root),
        )

    def __enter__(self) -> Self:
        self._staging.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shards.__exit__()
        self._staging.__exit__()

    def encode(self, places: Iterable[tuple[str, int]]) -> Iterator[CommitRecord]:
        """Encodes shards, (split, number) each, and yields each one's record once it is committed.

        Raises:
            CacheError: as `ShardEncoder.encode` has them.
        """
        return self._shards.encode(self._plan.shard(*place) for place in places)


def told(error: CacheError) -> dict[str, str | None]:
    """Returns an error as plain JSON values."""
    return {"kind": type(error).__name__, "message": str(error), "hint": error.hint}


def error_of(data: Mapping[str, Any]) -> CacheError:
    """Returns the error that `told` made plain; one of no known kind is a bare `CacheError`."""
    kind = getattr(errors, str(data["kind"]), CacheError)
    if not (isinstance(kind, type) and issubclass(kind, CacheError)):
        kind = CacheError
    return kind(str(data["message"]), hint=data["hint"])


class _Line:
    """The JSON lines between this process and its driver.

    A thread reads: when the driver has gone, however it went, the process ends with it.
    """

    def __init__(self) -> None:
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        # What native code writes to standard output must not come between.
        self._out = os.dup(1)
        os.dup2(2, 1)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._answers.put(json.loads(line))
        os._exit(1)

    def ask(self) -> dict[str, Any]:
        """Waits for the driver's next line."""
        return self._answers.get()

    def say(self, **data: Any) -> None:
        """Sends the driver a line, whole."""
        text = (json.dumps(data) + "\n").encode()
        with self._lock:
            while text:
                text = text[os.write(self._out, text) :]


class _Counted:
    """Images that the driver was not told of yet; it is told ten times a second."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._good = self._bad = 0
        self._busy = self._told = 0.0

    def count(self, good: bool, busy: float) -> None:
        """Counts one image."""
        self._good += good
        self._bad += not good
        self._busy = busy
        if time.monotonic() - self._told > _TICK_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Tells the driver all."""
        self._line.say(good=self._good, bad=self._bad, busy=self._busy)
        self._good = self._bad = 0
        self._told = time.monotonic()


def _main() -> None:
    line = _Line()
    job = Job(**line.ask())

    def shards() -> Iterator[tuple[str, int]]:
        while True:
            line.say(wants=True)
            place = line.ask()["shard"]
            if place is None:
                return
            yield place[0], place[1]

    counted = _Counted(line)
    try:
        with Worker(job, counted.count) as worker:
            for record in worker.encode(shards()):
                counted.tell()
                line.say(commit=record.to_dict())
    except CacheError as error:
        line.say(error=told(error))
    # Everything is put away; taking torch down would take seconds, and decoders end by themselves.
    os._exit(0)


if __name__ == "__main__":
    _main()
