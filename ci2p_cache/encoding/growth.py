"""Growing: new images join a cache, and every committed row is carried over as it is.

::

    SRC listed again --> plan: the cache's rows, then the new ones
    unchanged shards: hard links in `.growth`; the part-filled last shard: carried rows and new ones
    committed to the end --> it takes the cache's place (cache/growth.py)

No original whose latent is committed is read for its pixels. Where one may have changed (another
size, or a time of change after it was encoded) its digest is compared with the index; it is named
and left alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
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
from ci2p_cache.encoding.plan import EarlierRows, Plan
from ci2p_cache.encoding.rows import read_notes
from ci2p_cache.errors import CacheError, UsageError
from ci2p_cache.images.source import ImageSource

__all__ = [
    "Growth", "begin_growth", "compare_originals", "failed_rows", "merged_classes",
]  # fmt: skip

Rows = Mapping[str, frozenset[int]]
"""Split -> rows."""

_NAMED = 3
"""Originals that a notice names; it counts the rest."""

_MAX_AGAIN = 500_000
"""Rows read again that `growth.json` can name."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES)
"""What file systems without hard links answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What is to become of a cache that grows."""

    plan: Plan
    """The plan of the cache; that of the growth begins with the same rows."""
    committed: frozenset[tuple[str, int]]
    """Its shards that count and may be taken as they are; none where images get more views."""
    again: Rows
    """Rows whose originals must be read again; empty where all committed ones are carried."""

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

    Returns the names, their titles, and the label in the cache of each label of the source.
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


def compare_originals(
    root: Path,
    images: ImageSource,
    rows: EarlierRows,
    plan: Plan,
    committed: Collection[tuple[str, int]],
) -> tuple[list[str], Rows]:
    """Compares the originals of committed rows with what the index says of them.

    New images of the plan whose bytes are those of an original that is no longer where it was
    become `rows.moved`: a growth would hold them twice, with another label or in another split.

    Returns what the user should know, and the rows whose originals have changed.
    """
    vanished: dict[tuple[str, int], str] = {}
    gone: dict[int, dict[str, tuple[str, int]]] = {}
    changed: list[str] = []
    changed_rows: dict[str, set[int]] = {}
    columns = ["row", "key", "source_bytes", "source_sha256", "status"]
    for split, shard in committed:
        since = (root / commit_path(split, shard)).stat().st_mtime_ns
        for entry in read_index(root, split, shard, columns).to_pylist():
            row, digest, is_good = entry["row"], entry["source_sha256"], entry["status"] == "ok"
            path = rows.paths[split].get(row)
            if path is None:
                if digest is not None:
                    gone.setdefault(entry["source_bytes"], {})[digest] = (split, row)
                if is_good:
                    vanished[split, row] = entry["key"]
            elif is_good and _has_changed(images, path, entry, since):
                changed.append(entry["key"])
                changed_rows.setdefault(split, set()).add(row)
    rows.moved = _moved(images, rows, plan, gone)
    for found in rows.moved.values():
        vanished.pop(found, None)
    notices = []
    for keys, what in (
        (list(vanished.values()), "no longer in the source: the cache keeps what it has of them"),
        (
            changed,
            "not what was encoded: the cache keeps its latents (--reencode-changed encodes such "
            "images again)",
        ),
        (sorted(rows.relabelled), "of another class in the source now: the cache keeps its labels"),
        (
            [f"{split}: {key}" for split, key in rows.moved],
            "in the cache under another name or in another split: it keeps both, and the label",
        ),
    ):
        if keys:
            shown = ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
            many = f"{len(keys):,} images ({shown}) are"
            notices.append(f"1 image ({shown}) is {what}" if len(keys) == 1 else f"{many} {what}")
    return notices, {split: frozenset(own) for split, own in changed_rows.items()}


def _moved(
    images: ImageSource,
    rows: EarlierRows,
    plan: Plan,
    gone: Mapping[int, Mapping[str, tuple[str, int]]],
) -> dict[tuple[str, str], tuple[str, int]]:
    """Finds new images among the originals that are `gone`, by size and then by digest.

    Only files are looked at, and read where the size fits. Images in an archive or table count as
    new: to read them costs no less than to encode them.
    """
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for split, table in plan.tables.items() if gone else ():
        new = table.slice(rows.plan.splits[split].rows if split in rows.plan.splits else 0)
        for key, path in zip(new["key"].to_pylist(), new["path"].to_pylist(), strict=True):
            # One that cannot be read is encoded later, where its error is reported.
            with suppress(OSError, CacheError):
                file = images.file_of(path)
                if file is not None and file[1]:
                    same_size = gone.get(Path(os.fsdecode(file[0])).stat().st_size)
                    same = same_size and same_size.get(_digest(images, path))
                    if same:
                        found[split, key] = same
    return found


def _has_changed(images: ImageSource, path: bytes, entry: Mapping[str, Any], since: int) -> bool:
    try:
        file = images.file_of(path)
        if file is None:
            return False
        found = Path(os.fsdecode(file[0])).stat()
        if file[1] and found.st_size != entry["source_bytes"]:
            return True
        return found.st_mtime_ns > since and _digest(images, path) != entry["source_sha256"]
    except (OSError, CacheError):
        # Not to be read now, for whatever reason: the latent needs no original.
        return False


def _digest(images: ImageSource, path: bytes) -> str:
    return hashlib.sha256(images.read(path)).hexdigest()


def begin_growth(root: Path, growth: Growth, plan: Plan, plan_sha256: str) -> bool:
    """Makes the folder of a growth with all shards that stay as they are.

    The caller holds the cache's lock. Returns whether this very growth was begun before: then its
    folder is left as it is.

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
        "plan": plan_sha256,
        "again": {split: sorted(rows) for split, rows in growth.again.items()},
    }
    views = {split: record.views for split, record in plan.splits.items()}
    if any(views[split] != record.views for split, record in growth.plan.splits.items()):
        notes["views"] = views
    begun = growth_of(root)
    if begun is not None and read_notes(begun) == notes:
        return True
    drop_growth(root)
    folder = root / GROWTH
    with disk_errors(folder):
        folder.mkdir()
        for split, shard in plan.shard_numbers():
            if growth.is_carried_whole(plan, split, shard):
                commit = read_commit(root, split, shard)
                assert commit is not None, "it counts"
                for path in (*(file.path for file in commit.files), commit_path(split, shard)):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    _link(root / path, folder / path)
        for each, _, _ in os.walk(folder):
            sync_folder(Path(each))
        sync_folder(root)
    with StagingArea(folder) as staging:
        staging.put_sealed(NOTES, notes)
    return False


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
