"""`ShardValues`: everything that a committed shard holds, read and verified, whatever its form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import ChannelSums, IndexRow, index_rows, read_index, read_sums
from ci2p_cache.cache.split import Split
from ci2p_cache.encoding.finalise import require_intact

__all__ = ["ShardValues", "read_values"]


@dataclass(frozen=True, slots=True)
class ShardValues:
    """What one shard holds."""

    commit: CommitRecord
    """Its commit record."""
    rows: list[IndexRow]
    """All its rows, in order."""
    sums: ChannelSums
    """Its channel sums."""
    latents: dict[int, npt.NDArray[Any]]
    """Stored values (V, M, h, w) of each valid row, in row order."""


def read_values(split: Split, shard: int, pool: ThreadPoolExecutor) -> ShardValues:
    """Reads a whole shard; every latent is held against its crc32c in the index part.

    Args:
        split: The split.
        shard: Number of the shard.
        pool: Threads that read.

    Raises:
        ShardError: the shard is missing, damaged or not committed.
        ManifestError: its commit record is damaged.
    """
    commit = split.read_commit(shard)
    if commit is None:
        raise split.damage(shard, "it has no commit record")
    root, shape = split.cache.path, (split.num_views, *split.latent.shape)
    require_intact(root, commit)
    table = read_index(root, split.name, shard)
    rows = index_rows(table)

    def read(row: IndexRow) -> npt.NDArray[Any]:
        stored = np.empty(shape, split.latent.dtype)
        for view in range(split.num_views):
            split.read_into(row.row, view, stored[view])
        found = [google_crc32c.value(latent.tobytes()) for latent in stored]
        if found != row.latent_crc32c:
            raise split.damage(shard, f"row {row.row} is not what its index part speaks of")
        return stored

    good = [row for row in rows if row.status == "ok"]
    latents = dict(zip((row.row for row in good), pool.map(read, good), strict=True))
    return ShardValues(commit, rows, read_sums(table), latents)
