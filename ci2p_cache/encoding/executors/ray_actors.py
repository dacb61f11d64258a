"""`--executor ray`: the shards of one run over the nodes of a Ray cluster.

The driver holds the folder's lock, hands out shards and finalises; actors encode and commit them on
a folder that all nodes share. What a lost node had not committed is given to others.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.staging import remove_path
from ci2p_cache.encoding.executors.work import Place, Work
from ci2p_cache.encoding.executors.worker import Job, Worker, error_of, told
from ci2p_cache.encoding.intent import committed_shards
from ci2p_cache.errors import CacheError, MissingDependencyError, ResourceError, UsageError

__all__ = ["encode_in_ray"]

_SHARDS_PER_CALL = 4
"""Shards that an actor is given at a time, fewer at the end: its pipeline drains between calls."""

_MAX_LOSSES = 5
"""Actors that may be lost with one shard in their hands."""


def encode_in_ray(work: Work, missing: list[Place]) -> dict[Place, CommitRecord]:
    """Encodes and commits shards in actors, one per GPU of the cluster, or else one per CPU core.

    It joins the cluster that `ray.init` finds (RAY_ADDRESS), or starts one on this machine; a
    cluster that this process has joined already is used and left as it is.

    Args:
        work: Where, from what, and with what; folder and source must be reachable on every node.
        missing: The shards, in order.

    Returns:
        Their commit records.

    Raises:
        MissingDependencyError: ray is not installed.
        CacheError: as `encode` has them; the first that an actor told of.
        ResourceError: actors were lost again and again with the same shard, or none can be placed.
    """
    if work.options.devices not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"`devices` is {work.options.devices!r}; with ray it is auto, cpu or cuda: the cluster "
            "says how many there are"
        )
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise MissingDependencyError(
            f"`executor` is ray, and {error.name} is not installed",
            hint="pip install 'ci2p-cache[ray]'",
        ) from error
    joined = ray.is_initialized()
    if not joined:
        _join(ray)
    try:
        return _Cluster(ray, work, missing).run()
    finally:
        if not joined:
            ray.shutdown()


def _join(ray: ModuleType) -> None:
    """Joins a cluster, and keeps our own handler of SIGTERM, which Ray replaces."""
    earlier = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, earlier)


class _Remote:
    """What runs in an actor.

    Args:
        job: What to work on, as plain values.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = Job(**job)
        self._worker: Worker | None = None
        self._busy_seconds = 0.0

    def ready(self) -> None:
        """Returns once the actor has a place in the cluster."""

    def encode(self, places: list[Place]) -> str:
        """Encodes shards; returns JSON, so that records and errors come as from any other file."""
        commits: list[dict[str, Any]] = []
        error = None
        try:
            if self._worker is None:
                self._worker = Worker(self._job, self._keep).__enter__()
            commits += [record.to_dict() for record in self._worker.encode(places)]
        except CacheError as raised:
            error = told(raised)
        return json.dumps({"commits": commits, "busy": self._busy_seconds, "error": error})

    def _keep(self, _: bool, busy_seconds: float) -> None:
        self._busy_seconds = busy_seconds


@dataclass(eq=False, slots=True)
class _Actor:
    """An actor and what it holds."""

    handle: Any
    holds: list[Place] = field(default_factory=list)
    busy_seconds: float = 0.0


class _Cluster:
    """The actors of one run, and the shards that are in no one's hands.

    Args:
        ray: The module, joined to a cluster.
        work: Where, from what, and with what.
        missing: The shards.
    """

    def __init__(self, ray: ModuleType, work: Work, missing: list[Place]) -> None:
        self._ray = ray
        self._work = work
        self._left = deque(missing)
        self._wanted = len(missing)
        self._commits: dict[Place, CommitRecord] = {}
        self._losses: dict[Place, int] = {}
        self._calls: dict[Any, _Actor] = {}
        self._actors: list[_Actor] = []
        self._names = (
            f"{work.staging.name}-ray-{socket.gethostname()}-{os.getpid()}-{number}"
            for number in itertools.count()
        )
        self._used: list[str] = []
        self._bad_before = work.meter.bad
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if work.options.devices == "cpu":
            gpus = 0
        if gpus + cpus == 0:
            raise ResourceError("the Ray cluster has neither a GPU nor a CPU core to give")
        self._per_actor = (
            {"num_gpus": 1, "num_cpus": max(0, cpus // gpus)} if gpus else {"num_cpus": 1}
        )
        self._num_actors = min(gpus or cpus, len(missing))
        self._device = "cuda" if gpus else "cpu:1"

    def run(self) -> dict[Place, CommitRecord]:
        """Runs all shards to their end; no actor is left behind."""
        try:
            for _ in range(self._num_actors):
                self._start()
            while len(self._commits) < self._wanted:
                done, _ = self._ray.wait(list(self._calls), num_returns=1)
                for call in done:
                    self._take(call)
        finally:
            for actor in self._actors:
                self._ray.kill(actor.handle)
            for name in self._used:
                remove_path(self._work.staging.root / ".staging" / name)
        return self._commits

    def _start(self) -> None:
        work, name = self._work, next(self._names)
        job = Job(
            root=str(work.root.absolute()),
            source=work.images.location(),
            devices=self._device,
            batch_size=work.options.batch_size,
            workers=work.options.workers or max(1, self._per_actor["num_cpus"]),
            bad_allowed=work.bad_allowed,
            bad_already=self._bad_before,
            name=name,
        )
        self._used.append(name)
        remote = self._ray.remote(**self._per_actor, max_restarts=0)(_Remote)
        actor = _Actor(remote.remote(dataclasses.asdict(job)))
        # It is given shards once it has a place: one that must wait for a node holds none.
        self._calls[actor.handle.ready.remote()] = actor
        self._actors.append(actor)

    def _call(self, actor: _Actor) -> None:
        """Gives an actor its next shards, or lets it go."""
        actor.holds = []
        if not self._left:
            self._ray.kill(actor.handle)
            return
        fair = -(-len(self._left) // (2 * self._num_actors))
        count = min(_SHARDS_PER_CALL, fair)
        actor.holds = [self._left.popleft() for _ in range(count)]
        self._calls[actor.handle.encode.remote(actor.holds)] = actor

    def _take(self, call: Any) -> None:
        actor = self._calls.pop(call)
        try:
            text = self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            self._lost(actor, error)
            return
        if text is not None:
            answer = json.loads(text)
            actor.busy_seconds = answer["busy"]
            for data in answer["commits"]:
                self._count(CommitRecord.from_dict(data))
            if answer["error"] is not None:
                raise error_of(answer["error"])
        self._call(actor)

    def _count(self, record: CommitRecord) -> None:
        self._commits[record.split, record.shard] = record
        busy = sum(actor.busy_seconds for actor in self._actors) / self._num_actors
        self._work.count(*self._work.read_of(record), busy)

    def _lost(self, actor: _Actor, error: Exception) -> None:
        """Takes back what a lost actor held; what it committed before its end counts."""
        commits, left = committed_shards(self._work.root, self._work.intent, actor.holds)
        for record in commits.values():
            self._count(record)
        for place in left:
            self._losses[place] = self._losses.get(place, 0) + 1
            if self._losses[place] == _MAX_LOSSES:
                raise ResourceError(
                    f"{_MAX_LOSSES} Ray actors were lost while they held {place[0]} shard "
                    f"{place[1]}; what was committed before is safe: {error}",
                    hint="run the same command again, or with --executor local",
                ) from error
        self._work.observer.notice(
            f"a Ray actor was lost; {len(left)} of its {len(actor.holds)} shards go to others"
        )
        self._left.extendleft(reversed(left))
        self._start()
