"""The ranks of a run: who this process is among those that torchrun started, and how they agree.

::

    torchrun --nproc-per-node 4 -m ci2p_cache train ...      sets RANK, WORLD_SIZE, LOCAL_RANK
        Ranks.from_environment()       who am I; a process alone is rank 0 of 1
        .joined("auto")                the process group, from the first word to the last
            .add_up(gradients)         sums on the device, no one waits (nccl; gloo on CPU)
            .share(content), .agreed_signal(stop), .wait()     words on the host, always gloo

Each step's sums go through one collective of a fixed layout, not through
`torch.nn.parallel.DistributedDataParallel`: that lays its buckets out anew after the first step, so
that a resumed run of three or more ranks would add in another order and lose its last bits, and it
hangs where a rank has no images. Rank 0 alone writes, prints and holds locks. `rank_errors.py`
says what becomes of an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ci2p_cache.errors import UsageError
from ci2p_cache.machine import checked_device, num_cores
from ci2p_cache.training.rank_errors import collective, first_error, wait_until_told
from ci2p_cache.training.rank_link import Link, connect
from ci2p_cache.training.signals import StopSignal

__all__ = ["Ranks"]

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


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
    _link: Link | None = dataclasses.field(default=None, repr=False)

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
            ranks = cls(
                rank=int(found["RANK"]),
                world_size=int(found["WORLD_SIZE"]),
                local_rank=int(found["LOCAL_RANK"]),
                local_world_size=int(found["LOCAL_WORLD_SIZE"]),
            )
        except ValueError as error:
            raise UsageError(f"torchrun's variables must be whole numbers, got {found}") from error
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

        SIGINT and SIGTERM are noted while the block runs, see `agreed_signal`; until all have met
        they do what they did before. All ranks leave the block together.

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
        # A signal that was only noted would be looked at when all have met: never, if one has died.
        link = connect(
            device, rank=self.rank, world_size=self.world_size, local_rank=self.local_rank
        )
        with link.stop:
            ranks = dataclasses.replace(self, _link=link)
            try:
                yield ranks
                ranks.wait()
            except Exception as error:
                first = first_error(link.store, error, rank=self.rank)
                link.hang_up()
                wait_until_told(link.store, error, rank=self.rank)
                if first is error:
                    raise
                raise first from error
            except BaseException:
                link.hang_up()
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
        with collective():
            dist.all_reduce(flat)
        sums = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view(tensor.shape))

    def share(self, content: bytes) -> bytes:
        """Returns what rank 0 gives, on all ranks; the others' own content is not looked at."""
        if self._link is None:
            return content
        words, size = self._link.words, torch.tensor([len(content)])
        with collective():
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
            with collective():
                dist.broadcast(tensor, src=0)

    def agreed_signal(self, stop: StopSignal) -> int:
        """Returns the number of a signal that has come to any rank, the same on all; 0 for none.

        One word between the hosts, which leaves the devices alone. All ranks ask equally often. A
        rank whose torchrun was killed counts as one that got SIGTERM: no one else would end it.
        """
        number = stop.number or 0
        if self._link is None:
            return number
        if os.getppid() != self._link.parent:
            number = signal.SIGTERM
        word = torch.tensor([int(number)])
        with collective():
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._link.words)
        return int(word)

    def stop_signal(self) -> contextlib.AbstractContextManager[StopSignal]:
        """Returns the block in which signals are noted; joined ranks are in theirs already."""
        return StopSignal() if self._link is None else contextlib.nullcontext(self._link.stop)

    def wait(self) -> None:
        """Waits until all ranks have come here."""
        if self._link is not None:
            with collective():
                dist.all_reduce(torch.zeros(1), group=self._link.words)
