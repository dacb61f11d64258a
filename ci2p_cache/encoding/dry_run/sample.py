"""Samples: images drawn from the shards that are missing, and small shards made of them.

What is measured with them is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.encoding.plan import Plan, Sample, ShardPlan

__all__ = ["BadFile", "Drawn", "draw", "small_shards"]

Drawn = dict[str, list[Sample]]
"""Samples of each split."""

_IMAGES_PER_SHARD = 32
"""Images between two commits in a trial, over all splits; a run's shards have up to 1,024."""

_SHARDS_READ = 16
"""Shards whose rows are drawn from: rows are ranked by a hash, so any shard is a fair sample."""


def draw(plan: Plan, missing: Iterable[tuple[str, int]], count: int, *, seed: int) -> Drawn:
    """Draws about `count` samples of the missing shards, of each split in proportion.

    Args:
        plan: All samples.
        missing: The shards to draw from.
        count: How many; all of them where there are no more.
        seed: The same seed draws the same samples.
    """
    rng = np.random.default_rng(seed)
    numbers: dict[str, list[int]] = {}
    for split, number in missing:
        numbers.setdefault(split, []).append(number)
    totals = {
        split: sum(len(plan.splits[split].rows_of(number)) for number in own)
        for split, own in numbers.items()
    }
    share = min(1.0, count / max(1, sum(totals.values())))
    drawn: Drawn = {}
    for split, own in numbers.items():
        wanted = math.ceil(share * totals[split])
        pool: list[Sample] = []
        for place, number in enumerate(rng.permutation(own).tolist()):
            if place >= _SHARDS_READ and len(pool) >= wanted:
                break
            pool += plan.shard(split, number).samples
        # In the order of rows: packed archives can only be read forward.
        places = sorted(rng.permutation(len(pool))[:wanted].tolist(), key=lambda p: pool[p].row)
        drawn[split] = [pool[place] for place in places]
    return drawn


def small_shards(
    drawn: Drawn, splits: dict[str, SplitRecord], batch_size: int
) -> tuple[list[ShardPlan], dict[str, SplitRecord]]:
    """Cuts drawn samples into shards that are committed often, of whole batches.

    Returns:
        The shards, those of all splits evenly mixed, and the shape of splits that have them.
    """
    total = sum(map(len, drawn.values()))
    placed: list[tuple[float, ShardPlan]] = []
    records: dict[str, SplitRecord] = {}
    for split, samples in drawn.items():
        views = splits[split].views
        share = _IMAGES_PER_SHARD * len(samples) / max(1, total)
        size = max(1, max(1, round(share * views / batch_size)) * batch_size // views)
        records[split] = SplitRecord(rows=len(samples), views=views, shard_rows=size)
        for number, first in enumerate(range(0, len(samples), size)):
            own = tuple(
                Sample(first + offset, sample.key, sample.label, sample.path)
                for offset, sample in enumerate(samples[first : first + size])
            )
            place = (first + len(own) / 2) / len(samples)
            placed.append((place, ShardPlan(split, number, own, "")))
    return [shard for _, shard in sorted(placed, key=lambda item: item[0])], records


@dataclass(frozen=True, slots=True)
class BadFile:
    """An image that cannot be decoded."""

    path: str
    """Where it is, below the source."""
    error: str
    """Why."""
