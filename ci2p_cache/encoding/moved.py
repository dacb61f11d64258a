"""Moved originals: images of a cache that have another name or split in its source now.

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
from ci2p_cache.errors import CacheError
from ci2p_cache.images.source import ImageSource

__all__ = ["find_moved"]

_Place = tuple[str, int]
"""Split and row."""


def find_moved(
    root: Path,
    images: ImageSource,
    rows: EarlierRows,
    plan: Plan,
    committed: Collection[tuple[str, int]],
) -> dict[tuple[str, str], _Place]:
    """Finds new images whose bytes are those of an original that has gone from its place.

    Only files are looked at, and read where the size is that of such an original. Images in an
    archive or table count as new: to read them tells no less than to encode them.

    Args:
        root: The cache folder.
        images: The source, listed.
        rows: The cache's rows, and where the source has them now.
        plan: The plan with the new images.
        committed: The cache's shards that count.

    Returns:
        Split and key of such an image -> split and row that the cache has it in.
    """
    gone = _gone(root, rows, committed)
    found: dict[tuple[str, str], _Place] = {}
    for split, table in plan.tables.items() if gone else ():
        earlier = rows.plan.splits[split].rows if split in rows.plan.splits else 0
        new = table.slice(earlier)
        for key, path in zip(new["key"].to_pylist(), new["path"].to_pylist(), strict=True):
            place = _place(images, path, gone)
            if place is not None:
                found[split, key] = place
    return found


def _gone(
    root: Path, rows: EarlierRows, committed: Collection[tuple[str, int]]
) -> dict[int, dict[str, _Place]]:
    """Returns the originals that have gone from their places, by size and then by digest."""
    found: dict[int, dict[str, _Place]] = {}
    columns = ["row", "source_bytes", "source_sha256"]
    for split, shard in committed:
        if not rows.has_gone(split):
            continue
        for entry in read_index(root, split, shard, columns).to_pylist():
            row, digest = entry["row"], entry["source_sha256"]
            if digest is not None and rows.path(split, row) is None:
                found.setdefault(entry["source_bytes"], {})[digest] = (split, row)
    return found


def _place(
    images: ImageSource, path: bytes, gone: Mapping[int, Mapping[str, _Place]]
) -> _Place | None:
    try:
        file = images.file_of(path)
        if file is None or not file[1]:
            return None
        digests = gone.get(Path(os.fsdecode(file[0])).stat().st_size)
        if digests is None:
            return None
        return digests.get(hashlib.sha256(images.read(path)).hexdigest())
    except (OSError, CacheError):
        # It is encoded later, and what is wrong with it is said then.
        return None
