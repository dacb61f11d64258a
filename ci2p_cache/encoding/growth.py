"""Growing: new images join a cache, and every committed row is carried over as it is.

::

    SRC listed anew --> plan: the cache's rows, then the new ones
    unchanged shards: hard links in `.growth`; the part-filled last shard: carried rows and new ones
    committed to the end --> it takes the cache's place (cache/growth.py)

No original whose latent is committed is read for its pixels. Where one may have changed (another
size, or a time of change after it was encoded) its digest is held against the index; it is named
and left alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ci2p_cache.cache.commit import read_commit, sha256_file
from ci2p_cache.cache.growth import GROWTH, NOTES, drop_growth, growth_of
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.paths import MANIFEST, commit_path
from ci2p_cache.cache.staging import StagingArea, disk_errors, sync_folder
from ci2p_cache.encoding.carry import read_notes
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.encoding.planning import EarlierRows
from ci2p_cache.errors import CacheError, UsageError
from ci2p_cache.images.source import ImageSource

__all__ = [
    "Growth",
    "begin_growth",
    "changed_originals",
    "failed_rows",
    "merged_classes",
]

Rows = Mapping[str, frozenset[int]]
"""Split -> rows."""

_NAMED = 3
"""Originals that a notice names; it counts the rest."""

_MAX_AGAIN = 500_000
"""Rows read anew that `growth.json` can name."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES)
"""What file systems without hard links answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What is to become of a cache that grows."""

    plan: Plan
    """The plan of the cache; that of the growth begins with the same rows."""
    committed: frozenset[tuple[str, int]]
    """Its shards that count, as (split, shard)."""
    again: Rows
    """Rows whose originals are to be read anew; empty where all committed ones are carried."""

    def is_carried_whole(self, plan: Plan, split: str, shard: int) -> bool:
        """Whether a shard of the growth is the very shard of the cache."""
        if (split, shard) not in self.committed:
            return False
        # It begins with the same rows: only more of them make another shard.
        rows = plan.splits[split].rows_of(shard)
        return rows == self.plan.splits[split].rows_of(shard) and (
            self.again.get(split, frozenset()).isdisjoint(rows)
        )


def merged_classes(
    manifest: Manifest, images: ImageSource
) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """Puts classes that the source has and the cache has not behind those of the cache.

    Returns:
        The names, their titles, and the label in the cache of each label of the source.
    """
    names, titles = list(manifest.classes), list(manifest.class_titles)
    known = {name: label for label, name in enumerate(names)}
    # Older caches spell the number of a class without zeros in front.
    numbers = {int(name): label for name, label in known.items() if name.isdecimal()}
    labels = []
    for name, title in zip(images.classes, images.class_titles, strict=True):
        label = known.get(name, numbers.get(int(name)) if name.isdecimal() else None)
        if label is None:
            label = len(names)
            names.append(name)
            titles.append(title)
        labels.append(label)
    return tuple(names), tuple(titles), labels


def failed_rows(root: Path, committed: Collection[tuple[str, int]]) -> Rows:
    """Returns the committed rows whose images could not be decoded."""
    found: dict[str, set[int]] = {}
    for split, shard in committed:
        commit = read_commit(root, split, shard)
        if commit is not None and commit.valid_rows < commit.rows:
            table = read_index(root, split, shard, ["row", "status"])
            failed = table.filter(pc.not_equal(table["status"], "ok"))
            found.setdefault(split, set()).update(failed["row"].to_pylist())
    return {split: frozenset(rows) for split, rows in found.items()}


def changed_originals(
    root: Path,
    images: ImageSource,
    rows: EarlierRows,
    committed: Collection[tuple[str, int]],
    moved: Collection[tuple[str, str]] = (),
) -> tuple[list[str], Rows]:
    """Compares the originals of committed rows with what the index says of them.

    Args:
        root: The cache folder.
        images: The source, listed.
        rows: The cache's rows, and where the source has them now.
        committed: The cache's shards that count.
        moved: Split and key in the source of those that `find_moved` found.

    Returns:
        What the user should know, and the rows whose originals have changed.
    """
    vanished: list[str] = []
    changed: list[str] = []
    changed_rows: dict[str, set[int]] = {}
    columns = ["row", "key", "source_bytes", "source_sha256", "status"]
    for split, shard in committed:
        since = (root / commit_path(split, shard)).stat().st_mtime_ns
        for entry in read_index(root, split, shard, columns).to_pylist():
            if entry["status"] != "ok":
                continue
            path = rows.path(split, entry["row"])
            if path is None:
                vanished.append(entry["key"])
            elif _has_changed(images, path, entry, since):
                changed.append(entry["key"])
                changed_rows.setdefault(split, set()).add(entry["row"])
    notices = []
    for keys, what in (
        (vanished, "no longer in the source: the cache keeps what it has of them"),
        (
            changed,
            "not what was encoded: the cache keeps its latents (--reencode-changed encodes such "
            "images again)",
        ),
        (sorted(rows.relabelled), "of another class in the source now: the cache keeps its labels"),
        (
            [f"{split}: {key}" for split, key in moved],
            "in the cache under another name or in another split: it keeps both, and the label",
        ),
    ):
        if keys:
            notices.append(f"{_named(keys)} {what}")
    return notices, {split: frozenset(found) for split, found in changed_rows.items()}


def _has_changed(images: ImageSource, path: bytes, entry: Mapping[str, Any], since: int) -> bool:
    try:
        place = images.file_of(path)
        if place is None:
            return False
        file, holds_it_alone = place
        found = Path(os.fsdecode(file)).stat()
        if holds_it_alone and found.st_size != entry["source_bytes"]:
            return True
        if found.st_mtime_ns <= since:
            return False
        digest: str = entry["source_sha256"]
        return hashlib.sha256(images.read(path)).hexdigest() != digest
    except (OSError, CacheError):
        # Not to be read now, for whatever reason: the latent needs no original.
        return False


def _named(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
    return f"1 image ({shown}) is" if len(keys) == 1 else f"{len(keys):,} images ({shown}) are"


def begin_growth(root: Path, plan: Plan, growth: Growth) -> bool:
    """Makes the folder of a growth with all shards that stay as they are.

    Args:
        root: The cache folder; the caller holds its lock.
        plan: The plan of the growth.
        growth: What the cache holds.

    Returns:
        Whether this very growth was begun before: its folder is left as it is.

    Raises:
        UsageError: too many images would be encoded again.
        ResourceError: it cannot be made.
    """
    if sum(map(len, growth.again.values())) > _MAX_AGAIN:
        raise UsageError(
            f"more than {_MAX_AGAIN:,} images would be encoded again",
            hint="encode into a new folder; this one stays as it is",
        )
    notes = {
        "cache": sha256_file(root / MANIFEST),
        "plan": hashlib.sha256(plan.to_bytes()).hexdigest(),
        "again": {split: sorted(rows) for split, rows in growth.again.items()},
    }
    begun = growth_of(root)
    if begun is not None and read_notes(begun) == notes:
        return True
    drop_growth(root)
    folder = root / GROWTH
    with disk_errors(folder):
        folder.mkdir()
        for place in plan.shard_numbers():
            if growth.is_carried_whole(plan, *place):
                for path in _shard_files(root, *place):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    _link(root / path, folder / path)
        for each, _, _ in os.walk(folder):
            sync_folder(Path(each))
        sync_folder(root)
    with StagingArea(folder) as staging:
        staging.put_sealed(NOTES, notes)
    return False


def _shard_files(root: Path, split: str, shard: int) -> tuple[str, ...]:
    commit = read_commit(root, split, shard)
    assert commit is not None, "it counts"
    return (*(file.path for file in commit.files), commit_path(split, shard))


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
