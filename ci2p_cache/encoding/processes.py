"""`--executor processes`: one process per device takes shards; a dead one's shards go to another.

Each process has its own interpreter, decoders and device, so none waits for another's.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.worker import Event, Job, ShardId
from ci2p_cache.machine import chosen_devices, num_cores

__all__ = ["Processes"]


class Processes:
    """A crew of processes, one per device, or one per core of a CPU.

    Args:
        options: Which devices, and how many threads over all processes.
        num_shards: How many processes there are at most.

    Raises:
        UsageError: the devices are not there.
    """

    most_losses = 2
    """When so many processes were lost with one shard, it is hardly chance."""

    def __init__(self, options: EncodeOptions, num_shards: int) -> None:
        devices = chosen_devices(options.devices)[:num_shards]
        self.devices = ["cpu:1" if device.type == "cpu" else str(device) for device in devices]
        self.threads = max(1, (options.workers or num_cores()) // len(devices))
        self._events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._listeners: list[threading.Thread] = []

    def start(self, number: int, job: Job) -> None:
        """Starts a process."""
        # Its own session: Ctrl-C reaches the driver, which ends the others.
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "ci2p_cache.encoding.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        listener = threading.Thread(target=self._listen, args=(number, process), daemon=True)
        listener.start()
        self._processes.append(process)
        self._listeners.append(listener)
        self._say(number, dataclasses.asdict(job))

    def _say(self, number: int, data: Any) -> None:
        stdin = self._processes[number].stdin
        assert stdin is not None, "opened as a pipe"
        # The end of a process that has died is seen elsewhere.
        with suppress(OSError):
            stdin.write(json.dumps(data) + "\n")
            stdin.flush()

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None, "opened as a pipe"
        # A process that is killed may leave a line cut short.
        with process.stdout, suppress(ValueError):
            for line in process.stdout:
                self._events.put((number, json.loads(line)))
        self._events.put((number, None))

    def poll(self) -> tuple[int, Event]:
        """Waits for the next event of any process."""
        number, event = self._events.get()
        if event is not None:
            return number, event
        code = self._processes[number].wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return number, {"lost" if code else "ended": f"a process ended with {how}"}

    def give(self, number: int, shard: ShardId | None) -> None:
        """Answers a process."""
        self._say(number, shard)

    def close(self) -> None:
        """Kills all processes, and closes their pipes."""
        for process in self._processes:
            process.kill()
        for process, listener in zip(self._processes, self._listeners, strict=True):
            process.wait()
            listener.join()
            assert process.stdin is not None, "opened as a pipe"
            with suppress(OSError):
                # What it had not read is lost with it.
                process.stdin.close()
