"""What the loader is held to: ratios between rows of one run, with the numbers wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.benchmarks.measure import Rates, Table

__all__ = ["TARGETS", "Target", "ratio_table"]


@dataclass(frozen=True)
class Target:
    """A ratio of two rows, or one row's images/s."""

    row: str
    over: str | None
    """None: the row itself."""
    wanted: float | None
    """None: told for comparison only."""


TARGETS = (
    Target("ours zstd stored", "bare", 0.85),
    Target("ours zstd", "bare float", 0.85),
    Target("ours zstd read", "bare", None),
    Target("ours zstd stored", "tensorstore zstd 1", 1.1),
    Target("ours zstd stored", "webdataset npy", 3.5),
    Target("ours zstd stored", "zarr one", 15.0),
    Target("ours zstd", "tensorstore zstd 1", None),
    Target("ours zstd", "webdataset npy", None),
    Target("ours zstd", "zarr one", None),
    Target("ours zstd stored", "zarr blocks", None),
    Target("ours zstd stored", "zarrs blocks", None),
    Target("ours fast stored", None, 25_000.0),
    Target("ours fast", None, None),
    Target("ours none stored", "gather", 0.7),
    Target("ours none", "gather float", None),
    Target("ours none read", "gather", None),
    Target("ours none first", "gather", None),
    Target("ours many stored", "gather", 0.4),
    Target("ours many", "gather float", None),
    Target("ours none stored", "pread", None),
    Target("ours none stored", "tensorstore none 1", 2.0),
    Target("ours none stored", "streaming indexed", None),
    Target("ours none stored", "litdata", None),
    Target("ours none stored", "ffcv", None),
    Target("ours many stored", "ffcv", None),
    Target("ours none stored", "memmap", None),
    Target("ours zstd stored 2", "ours zstd stored", 1.7),
    Target("ours zstd 2", "ours zstd", 1.7),
    Target("bare 2", "bare", None),
    Target("ours zstd stored 2", "bare 2", None),
    Target("ours zstd", "ours zstd owned", None),
)


def ratio_table(rates: Mapping[str, Rates]) -> Table:
    """Ratios of each repeat, so that the machine's own changes drop out; their median and range."""
    table = Table(
        "Ratios within a repeat, and what is wanted of their median",
        ("row", "over", "median", "min", "max", "wanted", "holds"),
    )
    for target in TARGETS:
        if target.row not in rates or (target.over is not None and target.over not in rates):
            continue
        own = rates[target.row]
        found = own if target.over is None else own.over(rates[target.over])
        form = "{:,.0f}" if target.over is None else "{:.2f}"
        wanted = "" if target.wanted is None else ">= " + form.format(target.wanted)
        holds = "" if target.wanted is None else ("yes" if found.median >= target.wanted else "NO")
        over = target.over or "(images/s)"
        table.rows.append([target.row, over, *found.cells(form), wanted, holds])
    return table
