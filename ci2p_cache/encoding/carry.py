"""Carrying over: committed rows of a cache, read for the shards of its growth that hold them."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ci2p_cache.cache.commit import has_its_files
from ci2p_cache.cache.growth import GROWTH, NOTES
from ci2p_cache.cache.index import IndexRow, read_index
from ci2p_cache.cache.store import Cache
from ci2p_cache.encoding.shard_values import read_values
from ci2p_cache.errors import ManifestError
from ci2p_cache.record import read_sealed

__all__ = ["Carried", "Carrier", "read_notes"]


def read_notes(growth: Path) -> dict[str, Any] | None:
    """Returns what a growth was begun with; None where that is not known."""
    try:
        data, intact = read_sealed(growth / NOTES)
    except (OSError, ManifestError):
        return None
    return data if intact else None


@dataclass(frozen=True, slots=True)
class Carried:
    """What a shard of a growth takes from the cache."""

    rows: dict[int, IndexRow]
    """Row -> what the index says of it."""
    latents: dict[int, npt.NDArray[Any]]
    """Row -> stored values (V, M, h, w); of valid rows."""
    clipped: npt.NDArray[np.float64]
    """Clipped values of each channel (M,) over these rows."""


class Carrier:
    """Gives the rows that a growth takes from the cache in whose folder it is made.

    Args:
        folder: The folder of the growth.

    Raises:
        ManifestError: the records of the cache or of the growth are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder.parent)
        notes = read_notes(folder)
        if notes is None:
            raise ManifestError(f"{folder / NOTES} is damaged")
        self._again: dict[str, set[int]] = {
            split: set(rows) for split, rows in notes["again"].items()
        }

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """Returns the carrier of a growth's folder; None where the folder is that of a cache."""
        return cls(folder) if folder.name == GROWTH else None

    def rows(self, split: str, shard: int) -> Collection[int]:
        """Returns the rows of a shard that are carried over."""
        cache = self._cache
        if split not in cache or shard >= cache[split].record.num_shards:
            return ()
        try:
            commit = cache[split].read_commit(shard)
        except ManifestError:
            return ()
        if commit is None or not has_its_files(cache.path, commit):
            return ()
        own = cache[split].record.rows_of(shard)
        return set(own) - self._again.get(split, set())

    def count(self, split: str, shard: int) -> tuple[int, int]:
        """Returns how many rows of a shard are carried over, valid ones and failed ones."""
        rows = self.rows(split, shard)
        if not rows:
            return 0, 0
        table = read_index(self._cache.path, split, shard, ["row", "status"])
        good = sum(
            status == "ok"
            for row, status in zip(*(table[n].to_pylist() for n in ("row", "status")), strict=True)
            if row in rows
        )
        return good, len(rows) - good

    def values(self, split: str, shard: int) -> Carried:
        """Reads what is carried over of a shard; each latent is held against its crc32c.

        Raises:
            ShardError: the shard of the cache is damaged.
        """
        rows, latent = self.rows(split, shard), self._cache.fingerprint.latent
        if not rows:
            return Carried({}, {}, np.zeros(latent.channels))
        with ThreadPoolExecutor(1, "carry") as pool:
            found = read_values(self._cache[split], shard, pool)
        clipped = found.sums.clipped
        for row in found.rows:
            if row.row not in rows and row.clipped:
                # Which channels were clipped is kept for the shard alone; such values are limits.
                stored = found.latents[row.row]
                at_limit = (np.abs(stored.astype(np.int64)) == latent.symbol_limit).sum((0, 2, 3))
                clipped = np.maximum(clipped - at_limit, 0.0)
        return Carried(
            {row.row: row for row in found.rows if row.row in rows},
            {row: stored for row, stored in found.latents.items() if row in rows},
            clipped,
        )
