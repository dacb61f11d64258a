"""What a cache folder is to become, and which of its shards are committed already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ci2p_cache.cache.commit import CommitRecord, has_its_files, read_commit
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.survey import gaps, named_ranges
from ci2p_cache.encoding.growth import Growth
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.errors import ManifestError
from ci2p_cache.specs import Fingerprint, LayoutSpec

__all__ = ["Intent", "committed_shards", "missing_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a cache folder is to become, before anything is written to it."""

    fingerprint: Fingerprint
    """Every field that changes a value."""
    layout: LayoutSpec
    """Every field that changes which sample is where."""
    plan: Plan
    """All samples: those of the folder, or those that the source lists now."""
    classes: tuple[str, ...]
    """Class names; a label of the plan is an index into them."""
    class_titles: tuple[str, ...]
    """Their names for people."""
    manifest: Manifest | None
    """The folder's own, where it is continued as it is; None where one is to be written."""
    folder: Path
    """Where it is encoded: the cache folder, or that of a growth in it."""
    growth: Growth | None = None
    """What the cache holds, where it is to grow."""
    notices: tuple[str, ...] = ()
    """What the user should know of it."""

    @classmethod
    def of(
        cls, manifest: Manifest, plan: Plan, folder: Path, notices: tuple[str, ...] = ()
    ) -> Self:
        """Returns the intent to continue with a folder as it was begun."""
        return cls(
            fingerprint=manifest.fingerprint,
            layout=manifest.layout,
            plan=plan,
            classes=manifest.classes,
            class_titles=manifest.class_titles,
            manifest=manifest,
            folder=folder,
            notices=notices,
        )


def missing_text(intent: Intent, missing: Sequence[tuple[str, int]]) -> str:
    """Names missing shards in ranges, for example `3 of 12 shards (train 3-4; val 0)`."""
    by_split: dict[str, set[int]] = {}
    for split, number in missing:
        by_split.setdefault(split, set()).add(number)
    ranges = {
        split: gaps(record.num_shards, sorted(set(range(record.num_shards)) - by_split[split]))
        for split, record in intent.plan.splits.items()
        if split in by_split
    }
    return f"{len(missing)} of {intent.plan.num_shards} shards ({named_ranges(ranges)})"


def committed_shards(
    root: Path,
    intent: Intent,
    places: Iterable[tuple[str, int]] | None = None,
) -> tuple[dict[tuple[str, int], CommitRecord], list[tuple[str, int]]]:
    """Tells what is done from what is left to do.

    Args:
        root: The cache folder.
        intent: What it is to become.
        places: The shards in question, as (split, number); None for all.

    Returns:
        The commit records that count, by (split, shard), and the shards that are missing, in order.
    """
    commits: dict[tuple[str, int], CommitRecord] = {}
    missing: list[tuple[str, int]] = []
    for split, number in intent.plan.shard_numbers() if places is None else places:
        commit = _committed(root, intent.plan, split, number, intent.fingerprint.digest)
        if commit is None:
            missing.append((split, number))
        else:
            commits[split, number] = commit
    return commits, missing


def _committed(
    root: Path, plan: Plan, split: str, shard: int, fingerprint: str
) -> CommitRecord | None:
    """Returns the commit record of a shard if it counts: it fits the plan and its files are there.

    Damaged records and missing or resized files count as not committed: the shard is encoded again.
    """
    try:
        commit = read_commit(root, split, shard)
    except ManifestError:
        return None
    if commit is None or (commit.plan_sha256, commit.fingerprint, commit.rows) != (
        plan.shard_sha256(split, shard),
        fingerprint,
        len(plan.splits[split].rows_of(shard)),
    ):
        return None
    return commit if has_its_files(root, commit) else None
