"""`survey`: which shards of a cache folder count; `status`: that, and who works on the folder now.

Manifest, commit records and the sizes of their files are read, and nothing is changed. Bytes are
not read: that is `verify`. What a manifest claims costs nothing to write, so only shards that left
a trace are visited, and the others are named in ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord, file_problem, listed_commits, read_commit
from ci2p_cache.cache.growth import growth_of, settle_for_reading
from ci2p_cache.cache.lock import LOCK, LockHolder, live_ranges, lock_holder
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import MANIFEST, shard_files
from ci2p_cache.cache.ranges import split_positions
from ci2p_cache.errors import ManifestError
from ci2p_cache.record import Record

__all__ = [
    "CacheStatus", "Working", "gaps", "named_ranges", "record_problem", "status", "survey",
]  # fmt: skip

_MAX_RANGES = 5
"""Ranges that a message names of each split; it counts the rest."""

_SHOWN = 20
"""Ranges and damaged shards that `status` names; the rest are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Working(Record):
    """A process that holds a lock of the folder now."""

    shard_range: str | None
    """Its range, for example 2/4; None where it holds all of the folder."""
    what: str
    """What it does, for example encode; empty where it gives no name."""
    host: str
    """Its machine; empty where it gives no name."""
    pid: int
    """Its process id there; 0 where it gives no name."""
    shards: int
    """Shards that it holds."""
    committed: int
    """How many of them are committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStatus(Record):
    """How far a cache folder is; counts come from commit records whose files have their size."""

    path: str
    """The cache folder."""
    source: str
    """Where its images were read from."""
    complete: bool
    """Whether the manifest says so."""
    growing: bool
    """Whether new images are being taken in; counts are those of the larger cache then, and the
    cache that is there stays as it is until all of them are committed."""
    shards: int
    """Shards planned."""
    committed: int
    """Shards committed."""
    rows: int
    """Images planned."""
    committed_rows: int
    """Images in committed shards, bad ones included."""
    bad: int
    """Images among them that could not be decoded."""
    bytes: int
    """Bytes of the committed shards' files."""
    missing: str
    """Shards that are not committed, for example `train 3-7, 9; val 0`; empty where none is."""
    damaged: tuple[str, ...]
    """Why shards count as missing although they have a record; the first few."""
    num_damaged: int
    """How many such shards there are."""
    working: tuple[Working, ...]
    """Who works on the folder now."""
    retry: tuple[str, ...]
    """The first few values of `--shard-range` for missing shards that no process works on."""
    num_retry: int
    """How many such ranges there are."""

    @property
    def share(self) -> float:
        """Share of the planned images that is committed, 0 to 1."""
        return self.committed_rows / max(self.rows, 1)


def status(path: str | Path) -> CacheStatus:
    """Returns how far a cache folder is; the folder may be begun, complete or damaged.

    Whether a lock is held it sees by taking it for an instant, shared; a run that starts in that
    instant tries again.

    Args:
        path: The cache folder.

    Raises:
        NotACacheError: the folder is missing or holds no `cache.json`.
        ManifestError: `cache.json` is damaged.
    """
    root = Path(path)
    settle_for_reading(root)
    # Locks first: what ends between the two looks is then rather done than missing.
    ranges, whole = live_ranges(root), lock_holder(root / LOCK)
    growth = growth_of(root)
    root = growth or root
    manifest = read_manifest(root)
    commits, problems = survey(root, manifest)
    first: dict[str, int] = {}
    total = 0
    for split, record in manifest.splits.items():
        first[split], total = total, total + record.num_shards
    done = {first[split] + shard for split, shard in commits}
    held: list[tuple[str | None, range, LockHolder]] = [
        (str(each), each.positions(total), holder) for each, holder in ranges
    ]
    # A range holds `.lock` too, but only for a moment.
    if whole is not None and not whole.what.startswith("range "):
        held.append((None, range(total), whole))
    free = gaps(total, sorted(done.union(*(positions for _, positions, _ in held))))
    left = {
        split: gaps(record.num_shards, sorted(n for name, n in commits if name == split))
        for split, record in manifest.splits.items()
    }
    return CacheStatus(
        path=str(path),
        source=manifest.source,
        complete=manifest.is_complete,
        growing=growth is not None,
        shards=total,
        committed=len(commits),
        rows=sum(record.rows for record in manifest.splits.values()),
        committed_rows=sum(commit.rows for commit in commits.values()),
        bad=sum(commit.rows - commit.valid_rows for commit in commits.values()),
        bytes=sum(file.bytes for commit in commits.values() for file in commit.files),
        missing=named_ranges(left),
        damaged=tuple(problems[:_SHOWN]),
        num_damaged=len(problems),
        working=tuple(
            Working(
                shard_range=name,
                what=holder.what,
                host=holder.host,
                pid=holder.pid,
                shards=len(positions),
                committed=len(done.intersection(positions)),
            )
            for name, positions, holder in held
        ),
        retry=tuple(str(split_positions(each, total)) for each in free[:_SHOWN]),
        num_retry=len(free),
    )


def survey(root: Path, manifest: Manifest) -> tuple[dict[tuple[str, int], CommitRecord], list[str]]:
    """Returns the commit records that count, by (split, shard), and why the others do not.

    A record counts if it belongs to the manifest, and its files are there with their sizes.
    """
    commits: dict[tuple[str, int], CommitRecord] = {}
    problems: list[str] = []
    listed = listed_commits(root)
    for split, record in manifest.splits.items():
        for shard in (n for name, n in listed if name == split and n < record.num_shards):
            try:
                commit = read_commit(root, split, shard)
            except ManifestError as error:
                problems.append(f"{split} shard {shard}: {error}")
                continue
            if commit is None:
                continue
            problem = record_problem(manifest, commit)
            for file in commit.files if problem is None else ():
                if found := file_problem(root, file, max_read_bytes=-1):
                    problem = problem or f"{file.path}: {found[1]}"
            if problem is None:
                commits[split, shard] = commit
            else:
                problems.append(f"{split} shard {shard}: {problem}")
    return commits, problems


def record_problem(manifest: Manifest, commit: CommitRecord) -> str | None:
    """Says why an intact commit record does not belong to a cache, None where it does."""
    rows = manifest.splits[commit.split].rows_of(commit.shard)
    if (commit.first_row, commit.rows) != (rows.start, len(rows)):
        return f"it speaks of {commit.rows} rows from {commit.first_row}"
    if commit.fingerprint != manifest.fingerprint.digest:
        return f"it has another fingerprint than {MANIFEST}"
    if commit.format_version != manifest.format_version:
        return f"it has format version {commit.format_version}, not that of {MANIFEST}"
    wanted = set(shard_files(manifest.layout, commit.split, commit.shard)[:-1])
    if {file.path for file in commit.files} != wanted:
        return f"it lists other files than {sorted(wanted)}"
    return None


def gaps(total: int, numbers: Iterable[int]) -> list[range]:
    """Returns the ranges of 0 to `total` - 1 that `numbers`, ascending and below it, leave out."""
    found, start = [], 0
    for number in [*numbers, total]:
        if number > start:
            found.append(range(start, number))
        start = number + 1
    return found


def named_ranges(ranges: Mapping[str, Sequence[range]]) -> str:
    """Names shards by split, for example `train 3-7, 9; val 0`."""
    names = []
    for split, found in ranges.items():
        if not found:
            continue
        texts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in found[:_MAX_RANGES]]
        rest = len(found) - _MAX_RANGES
        names.append(f"{split} {', '.join(texts)}" + (f" and {rest} more ranges" * (rest > 0)))
    return "; ".join(names)
