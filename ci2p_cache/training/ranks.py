"""The ranks of a run: who this process is among those that torchrun started, and how they agree.

::

    torchrun --nproc-per-node 4 -m ci2p_cache train ...      sets RANK, WORLD_SIZE, LOCAL_RANK
        Ranks.from_environment()       who am I; a process alone is rank 0 of 1
        .joined("auto")                the process group, from the first word to the last
            .add_up(gradients)         sums on the device, nobody waits (nccl; gloo on CPU)
            .share(content), .agreed_signal(stop), .wait()     words on the host, always gloo

Each step's sums go through one collective of a fixed layout, not through
`torch.nn.parallel.DistributedDataParallel`: that lays its buckets out anew after the first step, so
that a resumed run of three or more ranks would add in another order and lose its last bits, and it
hangs where a rank has no images. Rank 0 alone writes, prints and holds locks.

A rank that ends early closes its connections, which ends the collective that the others are in;
they then read from torchrun's store what it died of. So an error on any rank is raised on all of
them, and rank 0 prints it. No timeout is involved, so rank 0 may take its time to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ci2p_cache import errors
from ci2p_cache.errors import CacheError, InterruptedRunError, ResourceError, UsageError
from ci2p_cache.machine import checked_device, num_cores
from ci2p_cache.training.signals import StopSignal

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

__all__ = ["Ranks"]

_TIMEOUT = timedelta(minutes=30)
"""Longest that a rank waits for one that lives, for example while rank 0 saves a checkpoint."""
_CONNECT_TIMEOUT = timedelta(seconds=10)
"""Longest that a rank looks for the store of a torchrun that keeps it itself, and so was there
before its ranks: where it is not, torchrun was killed."""
_TOLD_TIMEOUT = timedelta(seconds=20)
"""Longest that a failed rank waits for rank 0 to take up its error; torchrun needs 30 s more."""
_ERROR, _TOLD = "error", "told"
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

_groups = itertools.count()
"""Numbers the groups that this process has joined; all ranks join the same ones in turn."""

_log = logging.getLogger(__name__)


class _LostRankError(Exception):
    """A collective ended without a result, because a process that takes part in it has ended."""


@dataclass(frozen=True, slots=True)
class _Link:
    """What a joined rank has."""

    store: Store
    """This group's part of torchrun's store, which outlives every rank."""
    words: ProcessGroup
    """gloo, between the hosts; the default group sums, on the devices."""
    stop: StopSignal
    """Notes signals as long as the ranks are joined."""
    parent: int
    """torchrun's process id."""


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

        Raises:
            UsageError: only a part of the variables is set, or one is no number that can be.
        """
        found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not found:
            return cls()
        if len(found) < len(_VARIABLES):
            missing = ", ".join(name for name in _VARIABLES if name not in found)
            raise UsageError(
                f"{', '.join(found)} set in the environment, {missing} not; start several ranks "
                "with torchrun, or unset them to train alone"
            )
        found["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
        try:
            ranks = cls(
                rank=int(found["RANK"]),
                world_size=int(found["WORLD_SIZE"]),
                local_rank=int(found["LOCAL_RANK"]),
                local_world_size=int(found["LOCAL_WORLD_SIZE"]),
            )
        except ValueError as error:
            raise UsageError(f"torchrun's variables must be whole numbers, got {found}") from error
        if not (
            0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size
        ):
            raise UsageError(f"torchrun's variables fit no rank: {found}")
        return ranks

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that writes, prints and holds locks."""
        return self.rank == 0

    @property
    def is_joined(self) -> bool:
        """Whether there is a process group, or need not be."""
        return self.world_size == 1 or self._link is not None

    @property
    def num_threads(self) -> int:
        """This rank's share of the machine's cores, for the threads that read."""
        return max(1, num_cores() // self.local_world_size)

    def device(self, name: str) -> torch.device:
        """Returns this rank's device: one CUDA device for each rank of a machine, or the CPU.

        Args:
            name: auto, cpu, cuda, or, for a rank that is alone on its machine, cuda:1.

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

        SIGINT and SIGTERM are noted from here to the end of the block, see `agreed_signal`. All
        ranks leave the block together.

        Args:
            device: As for `device`; decides whether the group speaks nccl besides gloo.

        Yields:
            The rank, able to reach the others.

        Raises:
            UsageError: the process belongs to a process group already.
            CacheError: what another rank has raised; every rank raises the first one's.
            ResourceError: torchrun or another rank was killed, or cannot be reached.
        """
        if self.is_joined:
            yield self
            return
        with StopSignal() as stop:
            # Before connecting: were torchrun killed in between, nobody would ever know.
            parent = os.getppid()
            store, words = self._connect(device)
            ranks = dataclasses.replace(self, _link=_Link(store, words, stop, parent))
            try:
                yield ranks
                ranks.wait()
            except Exception as error:
                first = ranks._first_error(error)
                ranks._hang_up()
                ranks._wait_until_told(error)
                if first is error:
                    raise
                raise first from error
            except BaseException:
                ranks._hang_up()
                raise
            dist.destroy_process_group()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all ranks, in place and in one collective.

        All ranks get the same bits, and the same again from the same tensors. Waits for nothing on
        CUDA.

        Args:
            tensors: Of one dtype and on one device; the same shapes on all ranks.
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
        rank whose torchrun was killed counts as one that got SIGTERM: nobody else would end it.
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

    def _connect(self, device: str) -> tuple[Store, ProcessGroup]:
        """Joins the process group; returns a store of this group's own, and the hosts' group."""
        # Not every build of torch has them; alone nobody needs them.
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
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        try:
            wait = _CONNECT_TIMEOUT if is_kept else _TIMEOUT
            store, _, _ = next(rendezvous("env://", timeout=wait))
            store.set_timeout(_TIMEOUT)
            store = PrefixStore(f"ci2p-cache-{next(_groups)}", store)
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world_size, timeout=_TIMEOUT
            )
            words = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        except ValueError as error:
            raise UsageError(f"torchrun's variables are not complete: {error}") from error
        except RuntimeError as error:
            raise ResourceError(
                "torchrun or another rank cannot be reached, was it killed? "
                f"({str(error).splitlines()[0]})",
                hint="start torchrun again: the run goes on",
            ) from error
        assert not isinstance(words, int)
        return store, words

    def _hang_up(self) -> None:
        """Closes the connections, which tells the others that this rank has failed."""
        assert self._link is not None
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        else:
            # nccl would wait for kernels that never end; it goes with the process, or torchrun.
            dist.destroy_process_group(self._link.words)

    def _first_error(self, error: Exception) -> Exception:
        """Returns what all ranks raise, given what this one met: the first error of any of them."""
        assert self._link is not None
        store = self._link.store
        own = error
        if isinstance(error, _LostRankError):
            own = ResourceError(
                "another rank of this run was killed or cannot be reached (out of memory?); what "
                "was trained since the last checkpoint is lost, nothing else",
                hint="run the same command again to go on",
            )
        try:
            record = _pack(own, self.rank)
            first = store.compare_set(_ERROR, "", record).decode()
            if self.is_writer:
                store.set(_TOLD, "")
        except RuntimeError as unreachable:
            _log.debug("torchrun's store is gone: %s", unreachable)
            return own
        return own if isinstance(error, CacheError) or first == record else _unpack(first)

    def _wait_until_told(self, error: Exception) -> None:
        """Gives rank 0 the time to take up an error: torchrun ends all once one rank has left."""
        assert self._link is not None
        if self.is_writer or isinstance(error, _LostRankError):
            return
        try:
            self._link.store.wait([_TOLD], _TOLD_TIMEOUT)
        except RuntimeError as unreachable:
            _log.debug("rank 0 or torchrun's store is gone: %s", unreachable)


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Tells a broken connection from our own errors."""
    try:
        yield
    except RuntimeError as error:
        raise _LostRankError(str(error)) from error


def _pack(error: Exception, rank: int) -> str:
    """Returns an error as one line of JSON for the store."""
    is_ours = isinstance(error, CacheError)
    return json.dumps(
        {
            "rank": rank,
            "type": type(error).__name__,
            "message": str(error) if is_ours else f"{type(error).__name__}: {error}",
            "hint": error.hint if isinstance(error, CacheError) else None,
            "exit_code": error.exit_code if isinstance(error, CacheError) else 1,
        }
    )


def _unpack(record: str) -> CacheError:
    """Returns the error that `_pack` was given on another rank; CacheError for a bug."""
    told = json.loads(record)
    message = f"on rank {told['rank']}: {told['message']}"
    if told["type"] == InterruptedRunError.__name__:
        return InterruptedRunError(
            message, signal_number=told["exit_code"] - 128, hint=told["hint"]
        )
    kind: type[CacheError] = getattr(errors, told["type"], CacheError)
    return kind(message, hint=told["hint"])
