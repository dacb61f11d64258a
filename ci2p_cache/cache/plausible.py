"""What a cache folder must pass before anything in it is used: it may come from a stranger.

`cache.json` decides how much memory readers take and which files they open, so what it says is
bounded here, and nothing in the folder may lead out of it. A folder that passes can still be
damaged; that shows when its files are read.
"""

from __future__ import annotations

import math
from pathlib import Path

from ci2p_cache.cache.manifest import MANIFEST, MAX_SHARD_BYTES, Manifest, array_path, shard_rows
from ci2p_cache.errors import ManifestError
from ci2p_cache.specs import DOWNSAMPLING

__all__ = ["require_plausible"]

_MAX_ROWS = 2**24
"""Of one split. ImageNet-21k has 14 million; labels and valid then take 84 MB in memory."""

_MAX_SHARDS = 2**17
"""Of one split: 134 million rows at the default size; a check of as many missing ones ends."""

_MAX_SPLITS = 8
"""There are train, val and test."""


def require_plausible(root: Path, manifest: Manifest) -> None:
    """Refuses a manifest whose numbers do not fit together, and folders that are links.

    Args:
        root: The cache folder; it may itself be reached by a link.
        manifest: What its `cache.json` says.

    Raises:
        ManifestError: the manifest is absurd, or a folder of the cache leads elsewhere.
    """
    problem = _absurd(manifest)
    if problem is not None:
        raise ManifestError(f"{root / MANIFEST} is damaged: {problem}")
    folders = ["index", "commits", "stats", "latents.zarr"]
    for split in manifest.splits:
        folders.append(f"latents.zarr/{split}")
        folders += [array_path(split, name) for name in ("latents", "labels", "valid")]
    for folder in folders:
        if (root / folder).is_symlink():
            raise ManifestError(
                f"{root / folder} is a link; a cache must lie in one folder",
                hint=f"put the folder itself in its place, or move all of {root}",
            )


def _absurd(manifest: Manifest) -> str | None:
    """Says what cannot be so; None where everything can."""
    latent, image = manifest.fingerprint.latent, manifest.fingerprint.image
    side = image.size // DOWNSAMPLING
    if (latent.height, latent.width) != (side, side):
        return f"latents of {latent.height} x {latent.width} from images of {image.size} px"
    if latent.num_bytes > MAX_SHARD_BYTES:
        return f"one latent has {latent.num_bytes} bytes, a shard at most {MAX_SHARD_BYTES}"
    if not all(map(math.isfinite, manifest.offset)):
        return "an offset is not finite"
    if not 1 <= len(manifest.splits) <= _MAX_SPLITS:
        return f"{len(manifest.splits)} splits; 1 to {_MAX_SPLITS} are possible"
    for name, record in manifest.splits.items():
        views = manifest.fingerprint.views.num_views(name)
        if record.views != views:
            return f"split {name} has {record.views} views, its fingerprint makes {views}"
        rows = shard_rows(manifest.layout, latent, views)
        if record.shard_rows != rows:
            return f"split {name} has {record.shard_rows} rows per shard, its layout makes {rows}"
        if record.rows > _MAX_ROWS or record.num_shards > _MAX_SHARDS:
            return (
                f"split {name} has {record.rows} rows in {record.num_shards} shards; at most "
                f"{_MAX_ROWS} and {_MAX_SHARDS} are possible"
            )
        if record.valid_rows is not None and not 0 <= record.valid_rows <= record.rows:
            return f"split {name} has {record.valid_rows} valid rows of {record.rows}"
    return None
