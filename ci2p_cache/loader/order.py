"""Which sample, in which view, comes when: a pure function of (seed, epoch, step).

Nothing here keeps state, so a run resumes at any step, and any number of readers or ranks agrees on
one global sequence. The mixing function is written out rather than taken from numpy's generators,
whose streams may change between releases.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Rows", "block_order", "epoch_order", "epoch_views", "num_batches", "rank_slice"]

Rows = npt.NDArray[np.int64]
"""Row numbers, or one number per row, int64 (n,)."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _VIEW, _SHARD = 1, 2, 3

_SHARDS_PER_BLOCK = 8
"""With rows that are mixed over all classes already, eight shards of 1,024 make a wide window."""


def epoch_order(rows: Rows, *, seed: int, epoch: int) -> Rows:
    """Returns `rows` in the order of an epoch: each exactly once.

    Args:
        rows: Distinct rows, int64 (n,), ascending.
        seed: 0 <= seed < 2**63.
        epoch: 0 <= epoch.

    Returns:
        int64 (n,).
    """
    return rows[np.argsort(_hash(rows, seed, epoch, _ORDER), kind="stable")]


def block_order(rows: Rows, shard_rows: int, *, seed: int, epoch: int) -> Rows:
    """Returns `rows` block by block: shards in random order, eight to a block, mixed within it.

    For storage that is slow to jump: a block is read in one go, and the order is nearly as good as
    `epoch_order`'s, because a shard's rows are a random draw of the split already.

    Args:
        rows: Distinct rows, int64 (n,), ascending.
        shard_rows: Rows of one shard.
        seed: As for `epoch_order`.
        epoch: As for `epoch_order`.

    Returns:
        int64 (n,).
    """
    shards, members = np.unique(rows // shard_rows, return_inverse=True)
    rank = np.empty(len(shards), np.int64)
    rank[np.argsort(_hash(shards, seed, epoch, _SHARD), kind="stable")] = np.arange(len(shards))
    blocks = rank[members] // _SHARDS_PER_BLOCK
    order: Rows = np.lexsort((_hash(rows, seed, epoch, _ORDER), blocks))
    return rows[order]


def epoch_views(rows: Rows, num_views: int, *, seed: int, epoch: int) -> Rows:
    """Returns the view of each row in an epoch, drawn uniformly and independently of the order.

    Args:
        rows: int64 (n,).
        num_views: V.
        seed: As for `epoch_order`.
        epoch: As for `epoch_order`.

    Returns:
        int64 (n,), 0 <= view < V.
    """
    return (_hash(rows, seed, epoch, _VIEW) % np.uint64(num_views)).astype(np.int64)


def num_batches(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Returns the number of batches in an epoch."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def rank_slice(num_samples: int, *, rank: int, world_size: int) -> slice:
    """Returns the part of a global batch that a rank takes, empty for the last of a small batch.

    Contiguous, together the whole batch in order, and cut as `torch.chunk` cuts: all of the same
    size but for the end. So w ranks see the slices that one process sees that cuts batches in w.

    Args:
        num_samples: Samples of the global batch.
        rank: 0 <= rank < world_size.
        world_size: Number of ranks.
    """
    share = -(-num_samples // world_size)
    return slice(min(rank * share, num_samples), min((rank + 1) * share, num_samples))


def _hash(rows: Rows, seed: int, epoch: int, purpose: int) -> npt.NDArray[np.uint64]:
    """Mixes rows with (seed, epoch, purpose) to uint64 (n,)."""
    state = np.array([seed], np.uint64)
    for word in (epoch, purpose):
        state = _mix(state ^ _mix(np.array([word], np.uint64)))
    return _mix(rows.astype(np.uint64) ^ state)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014), a bijection of uint64."""
    value = value + _GAMMA
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
