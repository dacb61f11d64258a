"""What a container costs on disk beyond the bytes that it contains."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ci2p_cache as cc
from tests.benchmarks.contestants import stored_as
from tests.benchmarks.measure import Table
from tests.benchmarks.stores import PEER, Data

__all__ = ["overhead_table"]

CHECKSUM_BYTES = 4
"""At the end of each chunk and frame; counted as overhead."""


def overhead_table(splits: dict[str, cc.Split], folder: Path, data: Data) -> Table:
    """Bytes per sample of every store in `folder`, over what its samples alone would take."""
    table = Table(
        "Bytes on disk per sample",
        ("store", "samples alone", "container files", "overhead", "whole folder", "overhead"),
        notes=[
            "Samples alone: compressed or raw latents, without checksums. Container files: ours "
            "are the shards with their indexes and checksums; the whole folder adds row indexes, "
            "commit records, labels and statistics, and leaves the encoder's weights out."
        ],
    )
    count = len(data.latents)
    for key, split in splits.items():
        shards = [split.open_shard(number) for number in range(split.record.num_shards)]
        sizes = [shard.index.entries[shard.stored, 1] for shard in shards]
        alone = int(sum(size.sum() for size in sizes)) - CHECKSUM_BYTES * count
        files = sum(shard.path.stat().st_size for shard in shards)
        whole = tree_bytes(folder / key) - split.cache.encoder_path.stat().st_size
        name = f"ours, {stored_as(split)['codec']}, {len(shards):,} shard{'s' * (len(shards) > 1)}"
        table.rows.append(_row(name, count, alone, files, whole))
    for store in sorted(folder.iterdir()):
        if store.name.startswith(PEER):
            each = f"{tree_bytes(store) / count:,.0f}"
            table.rows.append([store.name.removeprefix(PEER), "-", "-", "-", each, "-"])
    return table


def _row(name: str, count: int, alone: int, files: int, whole: int) -> list[str]:
    return [
        name,
        f"{alone / count:,.0f}",
        f"{files / count:,.0f}",
        f"{100 * (files / alone - 1):.2f} %",
        f"{whole / count:,.0f}",
        f"{100 * (whole / alone - 1):.2f} %",
    ]


def tree_bytes(folder: Path) -> int:
    return int(np.sum([p.stat().st_size for p in folder.rglob("*") if p.is_file()], dtype=np.int64))
