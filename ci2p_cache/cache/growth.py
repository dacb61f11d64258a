"""A cache that grows: the larger one is made beside it and replaces it when it is complete.

::

    shards/                 the cache, whole and readable all the time
    shards/.growth/         a separate cache folder: unchanged shards are hard links
    .growth/cache.json says complete --> its files replace those of the cache, cache.json last

Whatever ends the process, one of the two caches is whole. Where it ends while files are replaced,
the next command that opens the folder replaces the rest. How a cache is made to grow is not known
here.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from ci2p_cache.cache.lock import LOCK, locked
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import disk_errors, refuse_link, remove_path, sync_folder
from ci2p_cache.errors import CacheError, ResourceError, command

__all__ = ["GROWTH", "NOTES", "drop_growth", "growth_of", "settle", "settle_for_reading"]

GROWTH = ".growth"
"""Folder of the larger cache, in that of the cache."""
NOTES = "growth.json"
"""What the growth was begun with; it stays behind when the files move."""


def growth_of(root: Path) -> Path | None:
    """Returns the folder of a growth that was begun in a cache folder; None where there is none."""
    growth = root / GROWTH
    if growth.is_symlink() or not (growth / MANIFEST).is_file():
        return None
    try:
        read_manifest(growth)
    except CacheError:
        return None
    return growth


def drop_growth(root: Path) -> None:
    """Removes what was made of a growth; the caller holds the lock of `root`, the cache folder."""
    growth = root / GROWTH
    if os.path.lexists(growth):
        # Without its manifest it counts for nothing, whatever ends the rest.
        if not growth.is_symlink():
            remove_path(growth / MANIFEST)
        remove_path(growth)


def settle(root: Path) -> None:
    """Replaces a cache by its growth if that is complete; the caller holds the lock of `root`.

    Raises:
        ResourceError: a file cannot be replaced; the next command replaces the rest.
        ManifestError: a folder of the cache is a link.
    """
    growth = _complete_growth(root)
    if growth is None:
        return
    touched = {root}
    with disk_errors(root):
        for folder, names, files in os.walk(growth, onerror=_raise):
            names[:] = [name for name in names if name != ".staging"]
            for path in (Path(folder) / file for file in files):
                name = path.relative_to(growth)
                if str(name) not in (MANIFEST, NOTES) and stat.S_ISREG(path.lstat().st_mode):
                    touched |= _replace(root, path, name)
        for changed in sorted(touched):
            sync_folder(changed)
        (growth / MANIFEST).replace(root / MANIFEST)
        sync_folder(root)
    shutil.rmtree(growth, ignore_errors=True)


def settle_for_reading(root: Path) -> None:
    """Does what `settle` does, and raises it, holding the lock; before a cache is read."""
    if _complete_growth(root) is None:
        return
    try:
        # Who holds it is doing the same.
        with locked(root / LOCK, what="settle", waits_for=lambda _: True):
            settle(root)
    except ResourceError as error:
        raise ResourceError(
            f"{root} was left while it took in new images, and the rest cannot be done: {error}",
            hint=command("status", root, note="as a user who may write there"),
        ) from error


def _complete_growth(root: Path) -> Path | None:
    growth = growth_of(root)
    return growth if growth is not None and read_manifest(growth).is_complete else None


def _raise(error: OSError) -> None:
    raise error


def _replace(root: Path, path: Path, name: Path) -> set[Path]:
    """Moves one file of the growth into the cache; returns the folders that changed."""
    target, made = root / name, set()
    for folder in reversed(name.parents[:-1]):
        refuse_link(root / folder, root)
        if not (root / folder).is_dir():
            remove_path(root / folder)
            (root / folder).mkdir()
            made.add((root / folder).parent)
    if target.is_dir() and not target.is_symlink():
        remove_path(target)
    if os.path.lexists(target) and os.path.samestat(target.lstat(), path.lstat()):
        # A rename onto another name of the same file would leave both.
        path.unlink()
        return made
    if name.parts[0] == "commits" and target.is_file():
        # Its first rows were encoded then: an original that has changed since is found by it.
        then = target.stat()
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    path.replace(target)
    return {*made, target.parent}
