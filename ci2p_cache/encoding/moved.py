"""Moved originals: images of a cache that its source now has under other names or in other splits.

A growth would take them for new ones and hold them twice, with another label or in another split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from ci2p_cache.cache.index import read_index
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.encoding.planning import EarlierRows
from ci2p_cache.errors import CacheError, SourceError
from ci2p_cache.images.source import ImageSource

__all__ = ["refuse_moved"]


def refuse_moved(
    root: Path,
    images: ImageSource,
    rows: EarlierRows,
    plan: Plan,
    committed: Collection[tuple[str, int]],
) -> None:
    """Refuses a source that gives the images of the cache under other names or in other splits.

    Args:
        root: The cache folder.
        images: The source, listed.
        rows: The cache's rows, and where the source has them now.
        plan: The plan with the new images.
        committed: The cache's shards that count.

    Raises:
        SourceError: an image of the cache is listed as new; growing would hold it twice.
    """
    gone = {name: rows.gone(name) for name in rows.plan.splits}
    if not any(gone.values()):
        return
    paths = {path: key for found in gone.values() for key, path in found.items()}
    contents = _contents(root, gone, committed)
    for split, table in plan.tables.items():
        earlier = rows.plan.splits[split].rows if split in rows.plan.splits else 0
        new = table.slice(earlier)
        for key, path in zip(new["key"].to_pylist(), new["path"].to_pylist(), strict=True):
            other = next((name for name in gone if name != split and key in gone[name]), None)
            was = f"{other}: {key}" if other else _was(images, path, paths, contents)
            if was is not None:
                raise SourceError(
                    f"{images.location()} is laid out in another way than when {root} was encoded: "
                    f"what was {was} is {split}: {key} now, and the cache would hold it twice; "
                    "nothing was changed",
                    hint="lay it out as it was, leave it out, or encode it into a new folder",
                )


def _contents(
    root: Path, gone: Mapping[str, Mapping[str, bytes]], committed: Collection[tuple[str, int]]
) -> dict[int, dict[str, str]]:
    """Returns the keys of originals that have gone, by their size and then their digest."""
    found: dict[int, dict[str, str]] = {}
    columns = ["key", "source_bytes", "source_sha256"]
    for split, shard in committed:
        for entry in read_index(root, split, shard, columns).to_pylist():
            if entry["key"] in gone[split] and entry["source_sha256"] is not None:
                keys = found.setdefault(entry["source_bytes"], {})
                keys[entry["source_sha256"]] = entry["key"]
    return found


def _was(
    images: ImageSource,
    path: bytes,
    paths: Mapping[bytes, str],
    contents: Mapping[int, Mapping[str, str]],
) -> str | None:
    """Returns the key of the original that a new image was; None where it is really new.

    Only of a file: of a place in one, where any image may be by now, reading tells no less than
    encoding.
    """
    place = images.file_of(path)
    if place is None or not place[1]:
        return None
    if path in paths:
        return paths[path]
    try:
        keys = contents.get(Path(os.fsdecode(place[0])).stat().st_size)
        return None if keys is None else keys.get(hashlib.sha256(images.read(path)).hexdigest())
    except (OSError, CacheError):
        # It is encoded later, and what is wrong with it is told then.
        return None
