"""Images per second of reading shuffled batches: this package, its limits, and its peers.

    python -m tests.benchmarks.loader [--cache DIR | --images DIR] [--samples N] [--threads 1,2]

All contestants read the same stored int8 latents in batches of 128 from files in the page cache,
each in a process of its own. Each is held against the data first, then runs an untimed epoch, or
ten seconds of one; then, in every repeat, each continues its endless stream for so many seconds,
in an order that rotates between repeats, so that a change of the machine's speed hits all alike.
The process is pinned to as many cores as a contestant has threads. A timing begins with batches
that are not counted, so that nothing which was read ahead between turns is.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ci2p_cache as cc
from ci2p_cache.cache.codecs import CODECS
from ci2p_cache.process import tune_process
from tests.benchmarks.allocations import allocation_table
from tests.benchmarks.contestants import Contestant, ours, ours_first, ours_read, zarr_rows
from tests.benchmarks.limits import limits
from tests.benchmarks.measure import Rates, Report, Table, machine, num_cores, take_turns
from tests.benchmarks.overhead import overhead_table
from tests.benchmarks.peers import PEERS, Missing, Shelf, peers
from tests.benchmarks.stores import Data, encoded, generated, read_data, write_cache
from tests.benchmarks.targets import ratio_table
from tests.benchmarks.workers import Worker

__all__ = ["Settings", "main", "measure_loader"]

MANY_SHARDS = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    cache: Path | None = None
    """An int8 cache to take latents from."""
    images: Path | None = None
    """Images to encode; without either, pictures are generated."""
    limit: int = 512
    """Images encoded at most."""
    size: int = 256
    """Side of the encoded square in pixels."""
    samples: int = 8192
    """Latents that are read, distinct ones repeated if there are fewer. 403 MB at 256 px: more than
    processors cache."""
    batch: int = 128
    threads: tuple[int, ...] = (1, 2)
    """Threads of ours and of tensorstore."""
    repeats: int = 15
    """Many short ones: where others use the machine, a long turn meets another speed."""
    seconds: float = 0.3
    """Of each timing."""
    only: str = ""
    """Rows whose key this regular expression matches at its beginning; the others are left out."""


def measure_loader(settings: Settings, folder: Path) -> Report:
    """Builds the stores in `folder`, verifies every contestant, and measures."""
    torch.set_num_threads(1)
    tune_process()
    data = _data(settings, folder)
    batch, shape = settings.batch, data.latents.shape[1:]
    splits: dict[str, cc.Split] = {
        codec: write_cache(folder / codec, data, codec=codec) for codec in CODECS
    }
    many = max(1, settings.samples // MANY_SHARDS)
    splits["many"] = write_cache(folder / "many", data, codec="none", shard_samples=many)
    contestants, missing = _contestants(settings, data, splits, folder)
    with ExitStack() as stack:
        workers = {
            contestant: stack.enter_context(Worker(contestant, data, settings.samples))
            for contestant in contestants
        }
        rates = take_turns(
            contestants,
            lambda contestant: workers[contestant].timed(settings.seconds),
            settings.repeats,
        )
    table = rate_table(rates, missing, settings)
    by_key = {contestant.key: found for contestant, found in rates.items()}
    tables = [table, ratio_table(by_key), overhead_table(splits, folder, data)]
    if "ours zstd owned" in by_key:
        tables.append(allocation_table(splits["zstd"], batch))
    text = (
        f"{len(data.latents):,} latents {shape} int8, {data.distinct:,} of them distinct, "
        f"batches of {batch}"
    )
    described = machine(("ci2p-cache", "numpy", "torch", "zarr", "numcodecs", *PEERS))
    return Report(described, text, tables, {key: found.values for key, found in by_key.items()})


def _data(settings: Settings, folder: Path) -> Data:
    if settings.cache is not None:
        cache = cc.open_cache(settings.cache)
    elif settings.images is not None:
        cache = encoded(settings.images, folder / "base", limit=settings.limit, size=settings.size)
    else:
        per_class = min(settings.limit // 5, -(-settings.samples // 10))
        cache = generated(folder, per_class=max(1, per_class), size=settings.size)
    return read_data(cache, settings.samples)


def _contestants(
    settings: Settings, data: Data, splits: dict[str, cc.Split], folder: Path
) -> tuple[list[Contestant], list[Missing]]:
    batch = settings.batch
    possible = [threads for threads in settings.threads if threads <= num_cores()]
    missing = [
        Missing(f"{threads} threads", f"this process has {num_cores()} cores")
        for threads in settings.threads
        if threads not in possible
    ]
    zstd, none, many = splits["zstd"], splits["none"], splits["many"]
    found = [
        ours("ours zstd owned", zstd, batch=batch, gives="float32", recycle=False),
        ours_read("ours zstd read", zstd, batch=batch),
        ours_read("ours none read", none, batch=batch),
        ours_first("ours none first", none, batch=batch),
        ours("ours many stored", many, batch=batch, gives="int8"),
        ours("ours many", many, batch=batch, gives="float32"),
        *limits(data, splits, folder, batch, possible),
        *zarr_rows(zstd, batch=batch),
    ]
    for threads in possible:
        n = "" if threads == 1 else f" {threads}"
        for codec in CODECS:
            more: dict[str, Any] = {"batch": batch, "threads": threads}
            found += [
                ours(f"ours {codec} stored{n}", splits[codec], gives="int8", **more),
                ours(f"ours {codec}{n}", splits[codec], gives="float32", **more),
            ]
    others, lacking = peers(Shelf(data, folder, batch, zstd, none), possible)
    chosen = [each for each in found + others if re.match(settings.only, each.key)]
    return chosen, missing + lacking


def rate_table(rates: dict[Contestant, Rates], missing: list[Missing], settings: Settings) -> Table:
    head = ("row", "reader", "bytes", "gives", "order", "checksum", "cores",
            "images/s", "min", "max")  # fmt: skip
    table = Table(
        f"Shuffled batches of {settings.batch}, page cache warm: images/s, median of "
        f"{settings.repeats} repeats of {settings.seconds:g} s",
        head,
    )
    for each, found in rates.items():
        about = [each.key, each.name, each.codec, each.gives, each.order, each.checked]
        table.rows.append([*about, str(each.threads), *found.cells()])
    for name, reason in ((lack.name, lack.reason) for lack in missing):
        table.rows.append([name, reason, *["-"] * (len(head) - 2)])
    return table


def main(argv: list[str] | None = None) -> int:
    """The command."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--cache", type=Path, help="an int8 cache to take latents from")
    source.add_argument("--images", type=Path, help="images to encode with the bundled encoder")
    parser.add_argument("--limit", type=int, default=default.limit, help="images encoded at most")
    parser.add_argument("--size", type=int, default=default.size, help="encoded square, in pixels")
    parser.add_argument("--samples", type=int, default=default.samples)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--threads", default="1,2", help="of ours and of tensorstore")
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--only", default=default.only, help="regular expression of rows' keys")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    settings = Settings(
        cache=given.cache, images=given.images, limit=given.limit, size=given.size,
        samples=given.samples, batch=given.batch,
        threads=tuple(int(number) for number in given.threads.split(",")),
        repeats=given.repeats, seconds=given.seconds, only=given.only,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = measure_loader(settings, Path(folder))
    report.publish(markdown=given.markdown, path=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
