"""Witnesses: what is known to be intact in a damaged cache, and what they say of what is not.

How damage is put right is not known here.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import pyarrow as pa

from ci2p_cache.cache.commit import CommitRecord, read_commit, sha256_file
from ci2p_cache.cache.folder import listed_digests
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.paths import array_path, commit_path, index_path, shard_files
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.verify import Finding
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.encoding.repair.replay import DamagedShard, source_digests
from ci2p_cache.encoding.repair.restore import index_samples
from ci2p_cache.errors import IntegrityError, ManifestError

__all__ = ["Witnesses"]


class Witnesses:
    """Commit records, index parts and `checksums.sha256`, as far as they can be believed.

    Args:
        cache: The cache.
        found: What is wrong with it.
    """

    def __init__(self, cache: Cache, found: Collection[Finding]) -> None:
        self._cache = cache
        self._found = found
        self._paths = {item.path for item in found}
        self._digests = listed_digests(cache)

    @cached_property
    def commits(self) -> dict[tuple[str, int], CommitRecord]:
        """The intact commit records by (split, shard); who repairs one puts it in."""
        found = {}
        for place in ((name, shard) for name in self._cache for shard in self._committed(name)):
            try:
                commit = read_commit(self._cache.path, *place)
            except ManifestError:
                continue
            if commit is not None:
                found[place] = commit
        return found

    def damaged_shards(self, plan: Plan) -> list[tuple[str, int]]:
        """Returns the shards to encode again, in the plan's order."""
        lost = [item for item in self._found if item.split is not None and item.shard is not None]
        found = {
            (str(item.split), shard)
            for item in lost
            for shard in range(item.shard or 0, (item.last_shard or item.shard or 0) + 1)
        }
        for name in plan.splits:
            if f"{array_path(name, 'labels')}/c.0" in self._paths:
                # Either of them may be wrong; the plan tells if it is the index.
                suspects = self._committed(name)
                found |= {(name, n) for n in suspects if self._differs(plan, name, n)}
        return [place for place in plan.shard_numbers() if place in found]

    def intact_index(self, split: str, shard: int) -> pa.Table | None:
        """Reads an index part if a witness vouches for its bytes."""
        path = index_path(split, shard)
        commit = self.commits.get((split, shard))
        listed = {file.path: file.sha256 for file in commit.files} if commit else self._digests
        if path in self._paths or path not in listed:
            return None
        try:
            if sha256_file(self._cache.path / path) == listed[path]:
                return read_index(self._cache.path, split, shard)
        except (OSError, IntegrityError):
            pass
        return None

    def describe(self, plan: Plan, split: str, number: int) -> DamagedShard:
        """Returns what is still known of a shard that has to be encoded again."""
        commit = self.commits.get((split, number))
        paths = shard_files(self._cache.manifest.layout, split, number)
        digests = {path: self._digests[path] for path in paths if path in self._digests}
        if commit is not None:
            digests |= {file.path: file.sha256 for file in commit.files}
        # A neighbour was most likely encoded in the same way; the digests tell if it was not.
        known = commit or next(iter(self.commits.values()), None)
        return DamagedShard(
            plan=plan.shard(split, number),
            numerics={} if known is None else known.numerics,
            digests=digests,
            sources=source_digests(self.intact_index(split, number)),
        )

    def allowed_bad(self, shards: list[DamagedShard]) -> int:
        """Counts the bad images that the shards held when they were first committed, at most."""
        bad = {place: commit.rows - commit.valid_rows for place, commit in self.commits.items()}
        if not self._cache.manifest.is_complete:
            return sum(
                bad.get((shard.plan.split, shard.plan.shard), len(shard.plan.samples))
                for shard in shards
            )
        total = sum(
            record.rows - (record.valid_rows or 0)
            for record in self._cache.manifest.splits.values()
        )
        others = set(bad) - {(shard.plan.split, shard.plan.shard) for shard in shards}
        return total - sum(bad[place] for place in others)

    def _committed(self, split: str) -> list[int]:
        """Returns the shards that have a commit record which was not found damaged."""
        found = self._cache[split].committed()
        return [shard for shard in found if commit_path(split, shard) not in self._paths]

    def _differs(self, plan: Plan, split: str, shard: int) -> bool:
        """Whether an intact index part speaks of other samples than the plan."""
        table = self.intact_index(split, shard)
        return table is not None and tuple(index_samples(table)) != plan.shard(split, shard).samples
