"""The ranks of a run: who this process is among those that torchrun started, and how they agree.

::

    torchrun --nproc-per-node 4 -m ci2p_cache train ...      sets RANK, WORLD_SIZE, LOCAL_RANK
        Ranks.from_environment()       who am I; a process alone is rank 0 of 1
        .joined("auto")                the process group, from the first word to the last
            .add_up(gradients)         sums on the device, without waiting (nccl; gloo on CPU)
            .share(content), .agreed_signal(stop), .wait()     words on the host, always gloo

Each step's sums go through one collective of a fixed layout, not through
`torch.nn.parallel.DistributedDataParallel`: that rebuilds its buckets after the first step, so
that a resumed run of three or more ranks would add in another order and lose its last bits, and it
hangs where a rank has no images. Rank 0 alone writes, prints and holds locks.

A rank that ends early closes its connections, which ends the collective that the others are in;
they then read from torchrun's store what it died of. So an error on any rank is raised on all of
them, and rank 0 prints it. No timeout is involved, so rank 0 may take its time to save. A machine
that can no longer be reached closes nothing: there the kernel asks, see `_keep_alive`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ci2p_cache import errors
from ci2p_cache.errors import (
    CacheError,
    InterruptedRunError,
    ResourceError,
    UsageError,
    stop_signals,
)
from ci2p_cache.machine import checked_device, num_cores

__all__ = ["Ranks", "StopSignal"]


if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store


class StopSignal:
    """Notes the first of `stop_signals()` that comes while its block runs.

    A second one meets the handlers that were there before, so it ends the process at once. Only
    SIGHUP is ignored then: a terminal that closes sends it two or three times, through the kernel
    and through its shell. Outside the main thread, where Python delivers no signals, it notes
    nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def is_set(self) -> bool:
        """Returns whether a signal has come."""
        return self.number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._put_back()
        if signal.SIGHUP in self._earlier:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _put_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TIMEOUT = timedelta(minutes=30)
"""Longest that a rank waits for one that lives, for example while rank 0 saves a checkpoint."""
_CONNECT_TIMEOUT = timedelta(seconds=10)
"""Longest that a rank looks for the store of a torchrun that keeps it itself, and so was there
before its ranks: where it is not, torchrun was killed."""
_REPORT_TIMEOUT = timedelta(seconds=20)
"""Longest that a failed rank waits for rank 0 to take up its error; torchrun needs 30 s more."""
_ERROR, _REPORTED = "error", "reported"
"""Keys of the store: the first error, and that rank 0 has taken it up."""

_groups = itertools.count()
"""Numbers the groups that this process has joined; all ranks join the same ones in turn."""
_log = logging.getLogger(__name__)


class _LostRankError(Exception):
    """A collective ended without a result, because a process that takes part in it has ended."""


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Tells a broken connection from our own errors, around one collective."""
    try:
        yield
    except RuntimeError as error:
        raise _LostRankError(str(error)) from error


def _first_error(store: Store, error: Exception, *, rank: int) -> Exception:
    """Returns what all ranks raise, given what this one met: the first error of any of them.

    That is `error` itself where it came first, where it is a CacheError, or where torchrun's store
    is gone, and otherwise a CacheError that names the other rank. Rank 0 also notes that it knows.
    """
    own = error
    if isinstance(error, _LostRankError):
        own = ResourceError(
            "another rank of this run was killed or cannot be reached (out of memory?); what "
            "was trained since the last checkpoint is lost, nothing else",
            hint="run the same command again to continue",
        )
    message = str(own) if isinstance(own, CacheError) else f"{type(own).__name__}: {own}"
    record = {
        "rank": rank,
        "type": type(own).__name__,
        "message": message,
        "hint": own.hint if isinstance(own, CacheError) else None,
        "exit_code": own.exit_code if isinstance(own, CacheError) else 1,
    }
    try:
        first = json.loads(store.compare_set(_ERROR, "", json.dumps(record)))
        if rank == 0:
            store.set(_REPORTED, "")
    except RuntimeError as unreachable:
        _log.debug("torchrun's store is gone: %s", unreachable)
        return own
    if isinstance(error, CacheError) or first == record:
        return own
    message = f"on rank {first['rank']}: {first['message']}"
    if first["type"] == InterruptedRunError.__name__:
        return InterruptedRunError(
            message, signal_number=first["exit_code"] - 128, hint=first["hint"]
        )
    kind: type[CacheError] = getattr(errors, first["type"], CacheError)
    return kind(message, hint=first["hint"])


@dataclass(frozen=True, slots=True)
class _Link:
    """What a joined rank has."""

    store: Store
    """This group's part of torchrun's store, which outlives every rank."""
    words: ProcessGroup
    """gloo, between the hosts; the default group sums, on the devices."""
    stop: StopSignal
    """Notes signals from when the ranks have met until they part: a context manager."""
    parent: int
    """torchrun's process id."""

    def hang_up(self) -> None:
        """Closes the connections: the others see that this rank has failed."""
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        else:
            # nccl would wait for kernels that never end; it goes with the process, or torchrun.
            dist.destroy_process_group(self.words)


def _sockets() -> dict[str, int]:
    """Returns the sockets of this process: the kernel's name for each, and its descriptor."""
    found = {}
    for path in Path("/proc/self/fd").glob("*"):
        # The folder's own is closed by now.
        with contextlib.suppress(OSError):
            found[os.readlink(path)] = int(path.name)  # noqa: PTH115
    return {name: number for name, number in found.items() if name.startswith("socket:")}


def _keep_alive(descriptor: int) -> None:
    """Ends a connection whose other end does not answer for 45 s; it answers while it is busy.

    gloo asks nothing itself, and a connection that only waits for data would wait on. One that has
    sent data ends when the kernel gives up to repeat it (`net.ipv4.tcp_retries2`).
    """
    with (
        # One between processes of a machine has nothing to set.
        contextlib.suppress(OSError),
        socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)


def _connect(device: str, ranks: Ranks) -> _Link:
    """Joins the process group that torchrun's variables name; nccl besides gloo on CUDA."""
    # Before connecting: if torchrun were killed in between, this rank would never know.
    parent, before = os.getppid(), _sockets()
    # Not every build of torch has them; a single process does not need them.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        raise UsageError(
            "this process belongs to a process group already; training makes its own",
            hint="call torch.distributed.destroy_process_group() first",
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        wait = _CONNECT_TIMEOUT if is_kept else _TIMEOUT
        store, _, _ = next(rendezvous("env://", timeout=wait))
        store.set_timeout(_TIMEOUT)
        store = PrefixStore(f"ci2p-cache-{next(_groups)}", store)
        where: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
        dist.init_process_group(backend, store=store, **where, timeout=_TIMEOUT)
        words = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    except ValueError as error:
        raise UsageError(f"torchrun's variables are not complete: {error}") from error
    except RuntimeError as error:
        raise ResourceError(
            "torchrun or another rank cannot be reached, was it killed? "
            f"({str(error).splitlines()[0]})",
            hint="start torchrun again: the run continues",
        ) from error
    assert not isinstance(words, int)
    made = _sockets()
    for name in made.keys() - before.keys():
        _keep_alive(made[name])
    return _Link(store, words, StopSignal(), parent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The ranks of a run, seen from one of them. Alone, every method is a plain no-op."""

    rank: int = 0
    """This process, 0 <= rank < world_size; 0 writes."""
    world_size: int = 1
    """Number of processes that train together."""
    local_rank: int = 0
    """This process among those of its machine; its CUDA device."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    _link: _Link | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Ranks:
        """Returns who this process is, as torchrun says; alone where it says nothing.

        A world of one is alone too. Job managers (Kubeflow, for example) set WORLD_SIZE=1 and
        RANK=0 for a single process, and no LOCAL_RANK.

        Raises:
            UsageError: only a part of the variables is set, or one is no number that can be.
        """
        found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not found:
            return cls()
        if found.get("WORLD_SIZE") == "1":
            found = {"RANK": "0", "LOCAL_RANK": "0"} | found
        if len(found) < len(_VARIABLES):
            missing = ", ".join(name for name in _VARIABLES if name not in found)
            raise UsageError(
                f"{', '.join(found)} set in the environment, {missing} not; start several ranks "
                "with torchrun, or unset them to train alone"
            )
        found["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
        try:
            numbers: dict[str, Any] = {name.lower(): int(text) for name, text in found.items()}
        except ValueError as error:
            raise UsageError(f"torchrun's variables must be whole numbers, got {found}") from error
        ranks = cls(**numbers)
        if not (
            0 <= ranks.rank < ranks.world_size
            and 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size
        ):
            raise UsageError(f"torchrun's variables fit no rank: {found}")
        return ranks

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that writes, prints and holds locks."""
        return self.rank == 0

    @property
    def num_threads(self) -> int:
        """This rank's share of the machine's cores, for the threads that read."""
        return max(1, num_cores() // self.local_world_size)

    def device(self, name: str) -> torch.device:
        """Returns this rank's device: one CUDA device for each rank of a machine, or the CPU.

        `name` is auto, cpu, cuda, or, for a rank that is alone on its machine, cuda:1.

        Raises:
            UsageError: torch knows no such device, or there is none for each rank.
        """
        device = checked_device(name)
        if device.type != "cuda" or self.local_world_size == 1:
            return device
        if str(device) != "cuda" or self.local_world_size > torch.cuda.device_count():
            raise UsageError(
                f"`device` is {name!r} for {self.local_world_size} ranks on this machine; each "
                f"needs a CUDA device of its own, and torch can use {torch.cuda.device_count()}",
                hint="torchrun --nproc-per-node gpu ... with --device cuda, or --device cpu",
            )
        return torch.device("cuda", self.local_rank)

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[Ranks]:
        """Joins the process group while the block runs; what is raised in it ends all ranks.

        SIGINT and SIGTERM are noted while the block runs, see `agreed_signal`; until all have met
        they do what they did before. All ranks leave the block together. The group speaks gloo, and
        for another device than cpu, where there is CUDA, nccl besides.

        Yields:
            The rank, able to reach the others.

        Raises:
            UsageError: the process belongs to a process group already.
            CacheError: what another rank has raised; every rank raises the first one's.
            ResourceError: torchrun or another rank was killed, or cannot be reached.
        """
        if self.world_size == 1 or self._link is not None:
            yield self
            return
        # A signal that was only noted would be looked at when all have met: never, if one has died.
        link = _connect(device, self)
        with link.stop:
            ranks = dataclasses.replace(self, _link=link)
            try:
                yield ranks
                ranks.wait()
            except Exception as error:
                first = _first_error(link.store, error, rank=self.rank)
                link.hang_up()
                if not self.is_writer and not isinstance(error, _LostRankError):
                    # torchrun ends all once one rank has left: rank 0 gets the time to take it up.
                    with contextlib.suppress(RuntimeError):
                        link.store.wait([_REPORTED], _REPORT_TIMEOUT)
                if first is error:
                    raise
                raise first from error
            except BaseException:
                link.hang_up()
                raise
            dist.destroy_process_group()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all ranks, in place and in one collective.

        All are of one dtype, on one device, and of the same shapes on all ranks. All ranks get the
        same bits, and the same again from the same tensors. Waits for nothing on CUDA.
        """
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _collective():
            dist.all_reduce(flat)
        sums = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view(tensor.shape))

    def share(self, content: bytes) -> bytes:
        """Returns what rank 0 gives, on all ranks; the others' own content is not looked at."""
        if self._link is None:
            return content
        words, size = self._link.words, torch.tensor([len(content)])
        with _collective():
            dist.broadcast(size, src=0, group=words)
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.is_writer and content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if len(data):
                dist.broadcast(data, src=0, group=words)
        return data.numpy().tobytes()

    def share_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, in place, by those of rank 0; of the same shapes on all ranks."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            with _collective():
                dist.broadcast(tensor, src=0)

    def agreed_signal(self, stop: StopSignal) -> int:
        """Returns the number of a signal that has come to any rank, the same on all; 0 for none.

        One word between the hosts, which leaves the devices alone. All ranks ask equally often. A
        rank whose torchrun was killed counts as one that got SIGTERM: nothing else would end it.
        """
        number = stop.number or 0
        if self._link is None:
            return number
        if os.getppid() != self._link.parent:
            number = signal.SIGTERM
        word = torch.tensor([int(number)])
        with _collective():
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._link.words)
        return int(word)

    def stop_signal(self) -> contextlib.AbstractContextManager[StopSignal]:
        """Returns the block in which signals are noted; joined ranks are in theirs already."""
        return StopSignal() if self._link is None else contextlib.nullcontext(self._link.stop)

    def wait(self) -> None:
        """Waits until all ranks have come here."""
        if self._link is not None:
            with _collective():
                dist.all_reduce(torch.zeros(1), group=self._link.words)
