"""How much memory of a batch's size `LatentLoader` takes anew per batch, once it is warm.

Three counters that do not depend on each other, each over the same number of batches:

- torch's profiler lists every allocation of its CPU allocator, in all threads: those of at least
  half a stored batch are counted;
- tracemalloc sees every allocation of Python and of numpy: the most that lives at once during a
  batch above what lived before it, in stored batches;
- minor page faults, as the kernel counts them for the process: fresh memory is faulted in page by
  page (4 KiB, or 2 MiB with huge pages), recycled memory is not.
"""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Generator
from dataclasses import dataclass

import torch

import ci2p_cache as cc
from tests.benchmarks.measure import Table

__all__ = ["Allocations", "allocation_table", "count_allocations"]


@dataclass(frozen=True)
class Allocations:
    """Per batch, in steady state."""

    torch_blocks: float
    """Allocations by torch of at least half a stored batch."""
    python_batches: float
    """Most that Python and numpy held at once above the start of a batch, in stored batches; the
    largest over all batches."""
    page_faults: float
    addresses: int
    """Different addresses of the batches handed out, over all batches of this count."""


def count_allocations(
    split: cc.Split, *, batch: int, recycle: bool, gives: str, batches: int = 20
) -> Allocations:
    """Counts over `batches` batches after as many that are not counted."""
    stored_bytes = batch * split.latent.num_bytes
    with cc.LatentLoader(
        split, batch_size=batch, seed=0, threads=1, recycle=recycle, drop_last=True
    ) as loader:
        stream = _endless(loader, gives)
        _take(stream, batches)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        addresses = _take(stream, batches)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            _take(stream, batches)
        blocks = _large_blocks(profile, stored_bytes // 2)
        tracemalloc.start()
        _take(stream, 4)
        held = 0
        for _ in range(batches):
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            _take(stream, 1)
            held = max(held, tracemalloc.get_traced_memory()[1] - start)
        tracemalloc.stop()
        stream.close()
    return Allocations(
        torch_blocks=blocks / batches,
        python_batches=held / stored_bytes,
        page_faults=faults / batches,
        addresses=len(set(addresses)),
    )


def allocation_table(split: cc.Split, batch: int) -> Table:
    table = Table(
        "Memory taken anew per batch in steady state, LatentLoader, zstd, one thread",
        ("recycle", "gives", "torch allocations of half a batch or more",
         "Python and numpy, in batches", "page faults", "addresses in 20 batches"),
    )  # fmt: skip
    for recycle in (True, False):
        for gives in ("int8", "float32"):
            found = count_allocations(split, batch=batch, recycle=recycle, gives=gives)
            table.rows.append(
                [
                    str(recycle),
                    gives,
                    f"{found.torch_blocks:.2f}",
                    f"{found.python_batches:.3f}",
                    f"{found.page_faults:,.0f}",
                    str(found.addresses),
                ]
            )
    return table


def _endless(loader: cc.LatentLoader, gives: str) -> Generator[torch.Tensor, None, None]:
    while True:
        for batch in loader:
            yield batch.stored if gives == "int8" else batch.latents


def _take(stream: Generator[torch.Tensor, None, None], batches: int) -> list[int]:
    """Takes batches; returns where each one's latents lay."""
    return [next(stream).data_ptr() for _ in range(batches)]


def _large_blocks(profile: torch.profiler.profile, least_bytes: int) -> int:
    """Counts allocations, not releases, that the profiler saw."""
    return sum(
        (event.self_cpu_memory_usage or 0) >= least_bytes for event in profile.events() or ()
    )
