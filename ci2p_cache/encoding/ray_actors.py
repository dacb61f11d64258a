"""`--executor ray`: the shards of one run over the nodes of a Ray cluster.

The driver holds the folder's lock, hands out shards and finalises; actors encode and commit them on
a folder that all nodes share. What a lost node had not committed is given to others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import traceback
from collections import deque
from importlib import import_module
from typing import Any

from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.worker import Event, Job, ShardId, serve
from ci2p_cache.errors import MissingDependencyError, ResourceError
from ci2p_cache.process import tune_process

__all__ = ["Actors"]


class _Remote:
    """What runs in an actor: a worker in a thread, beside the calls of the driver.

    Args:
        job: What to work on.
    """

    def __init__(self, job: Job) -> None:
        self._events: queue.Queue[str] = queue.Queue()
        self._answers: queue.Queue[ShardId | None] = queue.Queue()
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _run(self, job: Job) -> None:
        try:
            tune_process(job.options["devices"])
            serve(job, self._events.put, self._answers.get)
            self._events.put('{"ended": "a Ray actor ended"}')
        except BaseException:
            # The driver sees that the actor is lost; Ray's logs say why.
            traceback.print_exc()
            os._exit(1)

    def poll(self) -> list[str]:
        """Waits for an event, and returns all that there are, as JSON."""
        return [self._events.get(), *(self._events.get() for _ in range(self._events.qsize()))]

    def give(self, shard: ShardId | None) -> None:
        """Answers the worker."""
        self._answers.put(shard)


class Actors:
    """A crew of Ray actors, one per GPU of the cluster, or else one per CPU core.

    It joins the cluster that `ray.init` finds (RAY_ADDRESS), or starts one on this machine; a
    cluster that this process has joined already is used and left as it is. Cache folder and source
    must be reachable on every node.

    Args:
        options: On what, and with how many threads each.
        num_shards: How many actors there are at most.

    Raises:
        MissingDependencyError: ray is not installed.
        ResourceError: the cluster has nothing to encode on.
    """

    most_losses = 5
    """When so many actors were lost with one shard, it is hardly chance."""

    def __init__(self, options: EncodeOptions, num_shards: int) -> None:
        try:
            self._ray = ray = import_module("ray")
        except ImportError as error:
            raise MissingDependencyError(
                f"`executor` is ray, and {error.name} is not installed",
                hint="pip install 'ci2p-cache[ray]'",
            ) from error
        self._actors: list[Any] = []
        self._polls: dict[Any, int] = {}
        self._events: deque[tuple[int, Event]] = deque()
        self._joins = not ray.is_initialized()
        if self._joins:
            # Ray replaces our own handler.
            earlier = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, earlier)
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if options.devices == "cpu":
            gpus = 0
        if gpus + cpus == 0:
            self.close()
            raise ResourceError("the Ray cluster has neither a GPU nor a CPU core to give")
        cores = cpus // gpus if gpus else 1
        self.devices = ["cuda" if gpus else "cpu:1"] * min(gpus or cpus, num_shards)
        self.threads = options.workers or max(1, cores)
        # Two threads: one waits for events while the other answers.
        self._remote = ray.remote(
            num_cpus=cores, num_gpus=1 if gpus else 0, max_restarts=0, max_concurrency=2
        )(_Remote)

    def start(self, number: int, job: Job) -> None:
        """Starts an actor; it asks for a shard once the cluster has made room for it."""
        self._actors.append(self._remote.remote(job))
        self._polls[self._actors[number].poll.remote()] = number

    def poll(self) -> tuple[int, Event]:
        """Waits for the next event of any actor."""
        while not self._events:
            (done,), _ = self._ray.wait(list(self._polls), num_returns=1)
            number = self._polls.pop(done)
            events: list[Event]
            try:
                events = [json.loads(text) for text in self._ray.get(done)]
            except self._ray.exceptions.RayActorError as error:
                why = str(error).partition("\n")[0]
                events = [{"lost": f"a Ray actor was lost: {why}"}]
            else:
                if "ended" in events[-1]:
                    self._ray.kill(self._actors[number])
                else:
                    self._polls[self._actors[number].poll.remote()] = number
            self._events += [(number, event) for event in events]
        return self._events.popleft()

    def give(self, number: int, shard: ShardId | None) -> None:
        """Answers an actor."""
        self._actors[number].give.remote(shard)

    def close(self) -> None:
        """Ends all actors, and leaves a cluster that was joined here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._joins:
            self._ray.shutdown()
