"""What the loader is held to: ratios between rows of one run, with the numbers wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ci2p_cache.cache.codecs import CODECS
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


PEERS = (
    "tensorstore zstd 1", "zarr one", "zarr blocks", "zarrs blocks", "webdataset npy", "lance",
    "vortex", "array_record", "bagz", "webshart", "spdl 1",
)  # fmt: skip
"""Those that read compressed latents, and WebDataset."""

TARGETS = (
    *(
        Target(f"ours {codec}{ours}{n}", f"bare {codec}{bare}{n}", 0.92)
        for codec in CODECS
        for n in ("", " 2")
        for ours, bare in ((" stored", ""), ("", " float"))
    ),
    Target("ours zstd stored", "lmdb", 1.1),
    Target("ours lz4 stored", "lmdb", 1.5),
    Target("ours zstd stored", "lmdb chunks", None),
    *(Target("ours zstd stored", peer, 1.0) for peer in PEERS),
    Target("ours zstd stored 2", "tensorstore zstd 2", 1.0),
    Target("ours zstd stored 2", "spdl 2", 1.0),
    Target("ours zstd", "ours DataLoader", None),
    Target("ours zstd", "ours as_dataset", None),
    Target("ours zstd", "ours indexed", None),
    Target("ours zstd", "ours zstd owned", None),
    Target("ours zstd stored 2", "ours zstd stored", 1.7),
    Target("ours zstd 2", "ours zstd", 1.7),
    Target("bare zstd 2", "bare zstd", None),
    Target("ours none stored", "gather", 0.7),
    Target("ours none", "gather float", None),
    Target("ours none first", "gather", None),
    Target("ours many stored", "gather", 0.4),
    Target("ours none stored", "tensorstore none 1", 2.0),
    *(
        Target("ours none stored", peer, None)
        for peer in ("pread", "memmap", "npy files", "streaming indexed", "litdata", "ffcv")
    ),
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
