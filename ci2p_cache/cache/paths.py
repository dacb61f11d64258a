"""Where each file of a cache is: paths relative to its folder, and nothing of what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ci2p_cache.specs import LayoutSpec

__all__ = [
    "CHECKSUMS", "ENCODER", "MANIFEST", "PLAN", "array_path", "commit_path", "data_paths",
    "index_path", "own_files", "shard_files", "shard_of", "shard_path", "tar_list_path", "tar_path",
]  # fmt: skip

MANIFEST = "cache.json"
PLAN = "plan.parquet"
ENCODER = "encoder.safetensors"
CHECKSUMS = "checksums.sha256"


def array_path(split: str, name: str = "latents") -> str:
    """Returns an array's folder."""
    return f"latents.zarr/{split}/{name}"


def shard_path(split: str, shard: int) -> str:
    """Returns a zarr shard's path: zarr's chunk key with "." between."""
    return f"{array_path(split)}/c.{shard}.0.0.0.0"


def tar_path(split: str, shard: int) -> str:
    """Returns the path of a shard's tar."""
    return f"tar/{split}-{shard:06d}.tar"


def tar_list_path(split: str) -> str:
    """Returns the path of the list of a split's tars."""
    return f"tar/{split}.json"


def data_paths(layout: LayoutSpec, split: str, shard: int) -> tuple[str, ...]:
    """Returns the paths of a shard's latents, the one that is read first."""
    zarr = (shard_path(split, shard),) if layout.has_zarr else ()
    return (*zarr, tar_path(split, shard)) if layout.has_tar else zarr


def index_path(split: str, shard: int) -> str:
    """Returns an index part's path."""
    return f"index/{split}-{shard:06d}.parquet"


def commit_path(split: str, shard: int) -> str:
    """Returns a commit record's path."""
    return f"commits/{split}-{shard:06d}.json"


def shard_files(layout: LayoutSpec, split: str, shard: int) -> tuple[str, ...]:
    """Returns the paths of all files of a shard, its commit record last."""
    files = data_paths(layout, split, shard)
    return (*files, index_path(split, shard), commit_path(split, shard))


_FILES_OF_SHARDS = (
    (re.compile(r"latents\.zarr/([a-z0-9_]+)/latents/c\.(\d{1,9})\.0\.0\.0\.0"), shard_path),
    (re.compile(r"tar/([a-z0-9_]+)-(\d{1,9})\.tar"), tar_path),
    (re.compile(r"index/([a-z0-9_]+)-(\d{1,9})\.parquet"), index_path),
    (re.compile(r"commits/([a-z0-9_]+)-(\d{1,9})\.json"), commit_path),
)


def shard_of(path: str) -> tuple[str, int] | None:
    """Returns split and number of the shard whose file has this path; None where no shard's has."""
    for pattern, path_of in _FILES_OF_SHARDS:
        match = pattern.fullmatch(path)
        if match is not None and path_of(match[1], int(match[2])) == path:
            return match[1], int(match[2])
    return None


def own_files(root: Path) -> Iterator[str]:
    """Yields every file and link in the folders that hold nothing but a cache's own files.

    Links are not followed.
    """
    for top in ("commits", "index", "latents.zarr", "tar"):
        for folder, below, names in os.walk(root / top):
            links = [name for name in below if (Path(folder) / name).is_symlink()]
            for name in sorted([*names, *links]):
                yield (Path(folder) / name).relative_to(root).as_posix()
