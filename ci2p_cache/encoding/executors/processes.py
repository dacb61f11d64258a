"""`--executor processes`: one process per device takes shards; a dead one's shards go to another.

Each process has its own interpreter, decoders and device, so none waits for another's. It asks for
a shard when it has room; what a process that died had not committed is handed out again, and a
fresh process takes its place. A shard on which two processes died ends the run.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.staging import remove_path
from ci2p_cache.encoding.executors.work import Place, Work
from ci2p_cache.encoding.executors.worker import Job, error_of
from ci2p_cache.errors import CacheError, ResourceError
from ci2p_cache.machine import chosen_devices, num_cores

__all__ = ["encode_in_processes"]

_MAX_DEATHS = 2
"""Processes that may die with one shard in their hands; the second time it is hardly chance."""


def encode_in_processes(work: Work, missing: list[Place]) -> dict[Place, CommitRecord]:
    """Encodes and commits shards in one process per device.

    Args:
        work: Where, from what, and with what.
        missing: The shards, in order.

    Returns:
        Their commit records.

    Raises:
        CacheError: as `encode` has them; the first that a process told of.
        ResourceError: a second process died with the same shard in its hands.
    """
    devices = [
        # One core each, and a process per core.
        "cpu:1" if device.type == "cpu" else str(device)
        for device in chosen_devices(work.options.devices)[: len(missing)]
    ]
    return _Pool(work, missing, devices).run()


@dataclass(eq=False)
class _Process:
    """A worker process and what it holds."""

    number: int
    device: str
    process: subprocess.Popen[str]
    listener: threading.Thread = field(init=False)
    holds: list[Place] = field(default_factory=list)
    good: int = 0
    """Images that it told of and that are in no committed shard yet."""
    bad: int = 0
    busy_seconds: float = 0.0

    def close(self) -> None:
        """Waits for its end, which was seen to, and closes its pipes."""
        self.process.wait()
        self.listener.join()
        assert self.process.stdin is not None, "opened as a pipe"
        with suppress(OSError):
            # What it was told and had not read is lost with it.
            self.process.stdin.close()

    def say(self, data: dict[str, Any]) -> None:
        """Sends a line; a process that has died is told nothing, its end is seen elsewhere."""
        assert self.process.stdin is not None, "opened as a pipe"
        with suppress(OSError):
            self.process.stdin.write(json.dumps(data) + "\n")
            self.process.stdin.flush()


class _Pool:
    """The processes of one run, and the shards that are not in anyone's hands.

    Args:
        work: Where, from what, and with what.
        missing: The shards.
        devices: One per process.
    """

    def __init__(self, work: Work, missing: list[Place], devices: list[str]) -> None:
        self._work = work
        self._left = deque(missing)
        self._wanted = len(missing)
        self._devices = devices
        self._events: queue.Queue[tuple[_Process, dict[str, Any] | None]] = queue.Queue()
        self._processes: list[_Process] = []
        self._deaths: dict[Place, int] = {}
        self._commits: dict[Place, CommitRecord] = {}
        self._bad_before = work.meter.bad

    def run(self) -> dict[Place, CommitRecord]:
        """Runs all of them to their end; whatever ends it, no process is left behind."""
        try:
            for device in self._devices:
                self._start(device)
            while len(self._commits) < self._wanted:
                process, event = self._events.get()
                self._take(process, event)
        finally:
            for each in self._processes:
                each.process.kill()
            for each in self._processes:
                each.close()
                remove_path(self._work.staging.root / ".staging" / self._name(each.number))
        return self._commits

    def _name(self, number: int) -> str:
        return f"{self._work.staging.name}-{number}"

    def _start(self, device: str) -> None:
        work, number = self._work, len(self._processes)
        job = Job(
            root=str(work.root.absolute()),
            source=work.images.location(),
            devices=device,
            batch_size=work.options.batch_size,
            workers=max(1, (work.options.workers or num_cores()) // len(self._devices)),
            bad_allowed=work.bad_allowed,
            bad_already=self._bad_before,
            name=self._name(number),
        )
        # A session of its own: Ctrl-C reaches the driver, which ends the others.
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "ci2p_cache.encoding.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        each = _Process(number, device, process)
        each.listener = threading.Thread(target=self._listen, args=(each,), daemon=True)
        each.listener.start()
        self._processes.append(each)
        each.say(dataclasses.asdict(job))

    def _listen(self, process: _Process) -> None:
        assert process.process.stdout is not None, "opened as a pipe"
        # A process that is killed may leave a line cut short.
        with process.process.stdout as lines, suppress(ValueError):
            for line in lines:
                self._events.put((process, json.loads(line)))
        self._events.put((process, None))

    def _take(self, process: _Process, event: dict[str, Any] | None) -> None:
        if event is None:
            self._bury(process)
        elif "good" in event:
            process.good += event["good"]
            process.bad += event["bad"]
            process.busy_seconds = event["busy"]
            busy = sum(each.busy_seconds for each in self._processes) / len(self._devices)
            self._work.count(event["good"], event["bad"], busy)
        elif "commit" in event:
            record = CommitRecord.from_dict(event["commit"])
            place = (record.split, record.shard)
            process.holds.remove(place)
            good, bad = self._work.read_of(record)
            process.good -= good
            process.bad -= bad
            self._commits[place] = record
        elif "wants" in event:
            # It waits with what it has until it is answered: none is kept waiting for shards that
            # may come back from another.
            given = self._left.popleft() if self._left else None
            if given is not None:
                process.holds.append(given)
            process.say({"shard": given})
        else:
            raise error_of(event["error"])

    def _bury(self, process: _Process) -> None:
        code = process.process.wait()
        remove_path(self._work.staging.root / ".staging" / self._name(process.number))
        if code == 0 and not process.holds:
            return
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not process.holds and code > 0:
            raise CacheError(f"a worker process ended with {how} before it had a shard")
        for place in process.holds:
            self._deaths[place] = self._deaths.get(place, 0) + 1
            if self._deaths[place] == _MAX_DEATHS:
                raise ResourceError(
                    f"{_MAX_DEATHS} processes died while they held {place[0]} shard {place[1]}, "
                    f"the last with {how}; what was committed before is safe",
                    hint="run the same command with --executor local to see why",
                )
        self._work.meter.take_back(process.good, process.bad)
        self._work.observer.notice(
            f"a process on {process.device} ended with {how}; another takes its shards over"
        )
        self._left.extendleft(reversed(process.holds))
        process.holds = []
        self._start(process.device)
