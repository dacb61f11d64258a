"""The connection of a joined rank: torchrun's store, and the process groups made through it."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ci2p_cache.errors import ResourceError, UsageError
from ci2p_cache.training.signals import StopSignal

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

__all__ = ["Link", "connect"]

_TIMEOUT = timedelta(minutes=30)
"""Longest that a rank waits for one that lives, for example while rank 0 saves a checkpoint."""
_CONNECT_TIMEOUT = timedelta(seconds=10)
"""Longest that a rank looks for the store of a torchrun that keeps it itself, and so was there
before its ranks: where it is not, torchrun was killed."""

_groups = itertools.count()
"""Numbers the groups that this process has joined; all ranks join the same ones in turn."""


@dataclass(frozen=True, slots=True)
class Link:
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
        """Closes the connections, which tells the others that this rank has failed."""
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        else:
            # nccl would wait for kernels that never end; it goes with the process, or torchrun.
            dist.destroy_process_group(self.words)


def connect(device: str, *, rank: int, world_size: int, local_rank: int) -> Link:
    """Joins the process group that torchrun's variables name.

    Args:
        device: As for `Ranks.device`; decides whether the group speaks nccl besides gloo.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes that join.
        local_rank: This process among those of its machine; its CUDA device.

    Raises:
        UsageError: the process belongs to a process group already, or a variable is missing.
        ResourceError: torchrun or another rank was killed, or cannot be reached.
    """
    # Before connecting: were torchrun killed in between, no one would ever know.
    parent = os.getppid()
    # Not every build of torch has them; alone no one needs them.
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
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        wait = _CONNECT_TIMEOUT if is_kept else _TIMEOUT
        store, _, _ = next(rendezvous("env://", timeout=wait))
        store.set_timeout(_TIMEOUT)
        store = PrefixStore(f"ci2p-cache-{next(_groups)}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
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
    return Link(store, words, StopSignal(), parent)
