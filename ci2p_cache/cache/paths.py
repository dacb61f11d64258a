"""Where each file of a cache is: paths relative to its folder, and nothing of what is in them."""

from __future__ import annotations

from ci2p_cache.specs import LayoutSpec

__all__ = [
    "CHECKSUMS",
    "ENCODER",
    "MANIFEST",
    "PLAN",
    "array_path",
    "commit_path",
    "data_paths",
    "index_path",
    "shard_files",
    "shard_path",
    "tar_list_path",
    "tar_path",
]

MANIFEST = "cache.json"
PLAN = "plan.parquet"
ENCODER = "encoder.safetensors"
CHECKSUMS = "checksums.sha256"


def array_path(split: str, name: str = "latents") -> str:
    """Returns an array's folder relative to the cache folder."""
    return f"latents.zarr/{split}/{name}"


def shard_path(split: str, shard: int) -> str:
    """Returns a shard's path relative to the cache folder: zarr's chunk key with "." between."""
    return f"{array_path(split)}/c.{shard}.0.0.0.0"


def tar_path(split: str, shard: int) -> str:
    """Returns the path of a shard's tar relative to the cache folder."""
    return f"tar/{split}-{shard:06d}.tar"


def tar_list_path(split: str) -> str:
    """Returns the path of the list of a split's tars relative to the cache folder."""
    return f"tar/{split}.json"


def data_paths(layout: LayoutSpec, split: str, shard: int) -> tuple[str, ...]:
    """Returns the paths of a shard's latents, the one that is read first."""
    zarr = (shard_path(split, shard),) if layout.has_zarr else ()
    return (*zarr, tar_path(split, shard)) if layout.has_tar else zarr


def index_path(split: str, shard: int) -> str:
    """Returns an index part's path relative to the cache folder."""
    return f"index/{split}-{shard:06d}.parquet"


def commit_path(split: str, shard: int) -> str:
    """Returns the commit record's path relative to the cache folder."""
    return f"commits/{split}-{shard:06d}.json"


def shard_files(layout: LayoutSpec, split: str, shard: int) -> tuple[str, ...]:
    """Returns the paths of all files of a shard, its commit record last."""
    files = data_paths(layout, split, shard)
    return (*files, index_path(split, shard), commit_path(split, shard))
