"""Which shards a cache knows of: by the files that are there, and by those that are listed.

What a manifest claims costs nothing to write, so no check may take a step for every claimed shard;
it visits those that left a trace, and speaks of the others in ranges.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ci2p_cache.cache.paths import commit_path, index_path, shard_path, tar_path

__all__ = ["gaps", "named_ranges", "own_files", "shard_of"]

_FILES_OF_SHARDS = (
    (re.compile(r"latents\.zarr/([a-z0-9_]+)/latents/c\.(\d{1,9})\.0\.0\.0\.0"), shard_path),
    (re.compile(r"tar/([a-z0-9_]+)-(\d{1,9})\.tar"), tar_path),
    (re.compile(r"index/([a-z0-9_]+)-(\d{1,9})\.parquet"), index_path),
    (re.compile(r"commits/([a-z0-9_]+)-(\d{1,9})\.json"), commit_path),
)

_MAX_RANGES = 5
"""Ranges that a message names of each split; it counts the rest."""


def own_files(root: Path) -> Iterator[str]:
    """Yields every file and link, relative to the cache folder, in those that are wholly ours.

    Links are not followed.
    """
    for top in ("commits", "index", "latents.zarr", "tar"):
        for folder, below, names in os.walk(root / top):
            links = [name for name in below if (Path(folder) / name).is_symlink()]
            for name in sorted([*names, *links]):
                yield (Path(folder) / name).relative_to(root).as_posix()


def shard_of(path: str) -> tuple[str, int] | None:
    """Returns split and number of the shard whose file has this path; None where no shard's has."""
    for pattern, path_of in _FILES_OF_SHARDS:
        match = pattern.fullmatch(path)
        if match is not None and path_of(match[1], int(match[2])) == path:
            return match[1], int(match[2])
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
    told = []
    for split, parts in ranges.items():
        if not parts:
            continue
        texts = [f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts[:_MAX_RANGES]]
        rest = len(parts) - _MAX_RANGES
        told.append(f"{split} {', '.join(texts)}" + (f" and {rest} more ranges" * (rest > 0)))
    return "; ".join(told)
