"""`bench_loading`: how fast batches come out of a cache, read by the loader that training uses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ci2p_cache.bench.machine import ready_device, synchronise
from ci2p_cache.cache.store import open_cache
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.resident import ResidentLoader, choose_resident
from ci2p_cache.machine import num_cores
from ci2p_cache.record import Record

__all__ = ["LoaderReport", "LoaderRow", "bench_loading"]

_REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderRow(Record):
    """One way of loading, measured."""

    name: str
    """What was handed out, and from where."""
    threads: int
    """Threads that read."""
    images_per_second: float
    """Median over the repeats."""
    slowest: float
    """Of the repeats, in images per second."""
    fastest: float
    """Of the repeats, in images per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderReport(Record):
    """What `bench_loading` found."""

    device: str
    """Where batches were put."""
    batch_size: int
    """Images per batch."""
    bytes_per_image: int
    """Of one stored latent, uncompressed."""
    rows: tuple[LoaderRow, ...]
    """The ways of loading."""
    note: str
    """Whether the split would be kept in memory, and why; empty where there is nothing to tell."""


def bench_loading(
    cache_dir: str | Path,
    *,
    batch_size: int = 128,
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 3.0,
) -> LoaderReport:
    """Measures reading the train split in random order; nothing is written.

    A round of all ways that does not count comes first; it leaves in the page cache what fits.

    Args:
        cache_dir: A complete cache.
        batch_size: Images per batch.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        threads: Threads that read; None: one per core.
        seconds: How long each of the five repeats of each way is timed.

    Raises:
        UsageError: an argument cannot be used.
        NotACacheError, IncompleteCacheError, ManifestError: the cache cannot be opened.
        InputDataError: there is nothing to read.
        ShardError: the cache is damaged.
    """
    cache, place = open_cache(cache_dir), ready_device(device)
    name = "train" if "train" in cache else cache.splits[0]
    split = cache[name]
    most = threads or num_cores()
    stays, note = choose_resident(split, place, "auto")
    stored = f"{split.latent.dtype}, as stored"
    ways: list[tuple[str, int, type[BatchLoader], bool]] = [
        (stored, count, LatentLoader, False) for count in dict.fromkeys((1, most))
    ]
    ways.append(("float32, dequantised", most, LatentLoader, True))
    if stays:
        ways.append((f"{stored}, resident", most, ResidentLoader, False))
    found: list[list[float]] = [[] for _ in ways]
    loaders = [
        kind(split, batch_size=batch_size, device=place, threads=count, recycle=True)
        for _, count, kind, _ in ways
    ]
    try:
        for repeat in range(_REPEATS + 1):
            for rates, loader, (_, _, _, floats) in zip(found, loaders, ways, strict=True):
                rate = _rate(loader, floats=floats, seconds=seconds)
                if repeat:
                    rates.append(rate)
    finally:
        for loader in loaders:
            loader.close()
    return LoaderReport(
        device=str(place),
        batch_size=batch_size,
        bytes_per_image=split.latent.num_bytes,
        rows=tuple(
            LoaderRow(
                name=text,
                threads=count,
                images_per_second=median(rates),
                slowest=min(rates),
                fastest=max(rates),
            )
            for (text, count, _, _), rates in zip(ways, found, strict=True)
        ),
        note=note,
    )


def _rate(loader: BatchLoader, *, floats: bool, seconds: float) -> float:
    """Returns images per second over some time, going on where the last call left off."""
    images, started = 0, time.perf_counter()
    loader.load_state_dict(loader.state_dict())
    while True:
        for batch in loader:
            images += len(batch.rows)
            if floats:
                _ = batch.latents
            if time.perf_counter() - started >= seconds:
                synchronise(loader.device)
                return images / (time.perf_counter() - started)
