"""The README.md that is in a cache: how to open it without this package."""

from __future__ import annotations

import json
import re
from importlib.resources import files as package_files

from ci2p_cache.cache.manifest import Manifest

__all__ = ["readme_bytes"]


def readme_bytes(manifest: Manifest) -> bytes:
    """Fills in the template beside this file, with the parts that the cache's containers need."""
    template = package_files("ci2p_cache.encoding").joinpath("cache_readme.md").read_text("utf-8")
    fingerprint, layout = manifest.fingerprint, manifest.layout
    head, zarr_part, tar_part, rest = re.split(r"@(?:IF zarr|IF tar|END)@\n", template)
    if layout.format == "both":
        # Each part ends in the paragraph on the index; once is enough.
        zarr_part = zarr_part[: zarr_part.rindex("What each row")].rstrip() + "\n\n"
    parts = zarr_part * layout.has_zarr + tar_part * layout.has_tar
    text = (
        (head + parts + rest)
        .replace(
            "@ENCODER@",
            f"{fingerprint.encoder.arch}, quality "
            f"{fingerprint.encoder.quality}, {fingerprint.encoder.metric}",
        )
        .replace("@DTYPE@", fingerprint.latent.dtype)
        .replace("@SHAPE@", "x".join(map(str, fingerprint.latent.shape)))
        .replace("@SPLIT@", next(iter(manifest.splits)))
        .replace("@FINGERPRINT@", json.dumps(fingerprint.to_dict(), indent=1))
    )
    return text.encode()
