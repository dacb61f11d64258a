"""`status`: how far a cache folder is, who works on it now, and what is left for whom.

It reads the manifest, the commit records and the sizes of their files, and changes nothing. Whether
a lock is held it sees by taking it for an instant, shared; a run that starts in that instant tries
again. Bytes are not read: that is `verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord, read_commit
from ci2p_cache.cache.growth import growth_of, settle_for_reading
from ci2p_cache.cache.lock import LOCK, LockHolder, live_ranges, lock_holder
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.ranges import ShardRange, split_positions
from ci2p_cache.cache.traces import gaps, named_ranges
from ci2p_cache.errors import ManifestError
from ci2p_cache.record import Record

__all__ = ["CacheStatus", "Working", "status"]


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
    """Values of `--shard-range` that ask for what is missing and no one works on; the first few."""
    num_retry: int
    """How many such ranges there are."""

    @property
    def share(self) -> float:
        """Share of the planned images that is committed, 0 to 1."""
        return self.committed_rows / max(self.rows, 1)


_SHOWN = 20
"""Ranges and damaged shards that are named; the rest are counted."""


def status(path: str | Path) -> CacheStatus:
    """Tells how far a cache folder is; the folder may be begun, complete or damaged.

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
    places = [
        (split, number)
        for split, record in manifest.splits.items()
        for number in range(record.num_shards)
    ]
    done: dict[int, CommitRecord] = {}
    damaged: list[str] = []
    fingerprint = manifest.fingerprint.digest
    for at, (split, number) in enumerate(places):
        try:
            commit = read_commit(root, split, number)
            problem = None if commit is None else _problem(root, manifest, commit, fingerprint)
        except ManifestError as error:
            commit, problem = None, str(error)
        if problem is not None:
            damaged.append(f"{split} shard {number}: {problem}")
        elif commit is not None:
            done[at] = commit
    held = [part.positions(len(places)) for part, _ in ranges]
    if _is_run(whole):
        held.append(range(len(places)))
    free = gaps(len(places), sorted({*done, *(at for part in held for at in part)}))
    return CacheStatus(
        path=str(path),
        source=manifest.source,
        complete=manifest.is_complete,
        growing=growth is not None,
        shards=len(places),
        committed=len(done),
        rows=sum(record.rows for record in manifest.splits.values()),
        committed_rows=sum(commit.rows for commit in done.values()),
        bad=sum(commit.rows - commit.valid_rows for commit in done.values()),
        bytes=sum(file.bytes for commit in done.values() for file in commit.files),
        missing=_named(manifest, places, done),
        damaged=tuple(damaged[:_SHOWN]),
        num_damaged=len(damaged),
        working=tuple(_working(ranges, whole, len(places), done)),
        retry=tuple(str(split_positions(part, len(places))) for part in free[:_SHOWN]),
        num_retry=len(free),
    )


def _problem(root: Path, manifest: Manifest, commit: CommitRecord, fingerprint: str) -> str | None:
    """Says why a commit record does not count; None where it does."""
    if commit.fingerprint != fingerprint:
        return "its record was written with other settings"
    if commit.rows != len(manifest.splits[commit.split].rows_of(commit.shard)):
        return f"its record speaks of {commit.rows} rows"
    for file in commit.files:
        path = root / file.path
        if path.is_symlink() or not path.is_file():
            return f"{file.path} is missing"
        if (size := path.stat().st_size) != file.bytes:
            return f"{file.path} has {size} bytes, its record says {file.bytes}"
    return None


def _is_run(holder: LockHolder | str | None) -> bool:
    """Says whether a holder of `.lock` works on all shards; a range has it only for a moment."""
    return holder is not None and not str(holder).startswith("range ")


def _working(
    ranges: list[tuple[ShardRange, LockHolder | str]],
    whole: LockHolder | str | None,
    num_shards: int,
    done: dict[int, CommitRecord],
) -> Iterator[Working]:
    held: list[tuple[str | None, range, LockHolder | str]] = [
        (str(part), part.positions(num_shards), holder) for part, holder in ranges
    ]
    if whole is not None and _is_run(whole):
        held.append((None, range(num_shards), whole))
    for name, places, holder in held:
        known = holder if isinstance(holder, LockHolder) else LockHolder(host="", pid=0, what="")
        yield Working(
            shard_range=name,
            what=known.what,
            host=known.host,
            pid=known.pid,
            shards=len(places),
            committed=sum(at in done for at in places),
        )


def _named(manifest: Manifest, places: list[tuple[str, int]], done: dict[int, CommitRecord]) -> str:
    committed: dict[str, list[int]] = {split: [] for split in manifest.splits}
    for at in sorted(done):
        committed[places[at][0]].append(places[at][1])
    return named_ranges(
        {
            split: gaps(record.num_shards, committed[split])
            for split, record in manifest.splits.items()
        }
    )
