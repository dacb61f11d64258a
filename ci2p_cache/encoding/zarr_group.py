"""The zarr group of a finished cache: all its metadata and small arrays, by zarr-python itself.

The latents' shards are in place by then; how they were written is not known here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.plan import Plan

__all__ = ["dequantising", "put_zarr_group"]


def put_zarr_group(
    manifest: Manifest, plan: Plan, valid: dict[str, npt.NDArray[np.bool_]], staging: StagingArea
) -> list[FileRecord]:
    """Lets zarr-python make small arrays and all metadata in memory, and puts them.

    The latents' own array is created empty: its shards are in place already. Where they are in
    tars only there is none.
    """
    fingerprint, layout = manifest.fingerprint, manifest.layout
    latent = fingerprint.latent
    made: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(made), attributes={"ci2p_cache_format": manifest.format_version}
    )
    for name, record in plan.splits.items():
        split = group.create_group(name)
        if layout.has_zarr:
            split.create_array(
                "latents",
                shape=(record.rows, record.views, *latent.shape),
                dtype=latent.dtype,
                chunks=(1, 1, *latent.shape),
                shards=(record.shard_rows, record.views, *latent.shape),
                compressors=codec_of(layout, latent).zarr_metadata,
                fill_value=latent.fill_value,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("sample", "view", "channel", "y", "x"),
                attributes=dequantising(manifest),
            )
        for array, values, fill in (
            ("labels", plan.labels(name), -1),
            ("valid", valid[name], False),
        ):
            small = split.create_array(
                array,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(max(1, len(values)),),
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=fill,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("sample",),
                # Else an array of nothing but fill values has no chunk, and looks damaged.
                config={"write_empty_chunks": True},
            )
            small[:] = values
    return [
        staging.put(f"latents.zarr/{key}", content.to_bytes())
        for key, content in sorted(made.items())
    ]


def dequantising(manifest: Manifest) -> dict[str, Any]:
    """Returns what turns stored values into y, for readers that are not ours."""
    return {
        "scale": manifest.scale,
        "offset": list(manifest.offset),
        "dequantise": "y = stored.astype('float32') * scale + offset[:, None, None]",
    }
