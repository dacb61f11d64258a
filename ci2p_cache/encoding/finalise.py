"""Finalising: once every shard is committed, the files that speak of the whole cache."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from ci2p_cache.cache.codecs import codec_of, unfolded
from ci2p_cache.cache.commit import CommitRecord, FileRecord
from ci2p_cache.cache.folder import checksums_bytes
from ci2p_cache.cache.index import ChannelSums, read_index, read_sums, require_intact
from ci2p_cache.cache.manifest import Manifest, SplitRecord
from ci2p_cache.cache.paths import CHECKSUMS, MANIFEST, tar_list_path, tar_path
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.record import json_bytes
from ci2p_cache.specs import LatentSpec

__all__ = ["dequantising", "finalise"]

_ERRORS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("path", pa.string()),
        ("error", pa.string()),
    ]
)

_NEEDED = (*_ERRORS_SCHEMA.names, "status", "source_bytes", "exif_orientation")
"""Columns of the index parts that are summed up here."""


def finalise(
    root: Path,
    manifest: Manifest,
    plan: Plan,
    commits: Sequence[CommitRecord],
    staging: StagingArea,
) -> Manifest:
    """Writes metadata, labels, valid, statistics, errors and checksums, and the manifest last.

    Raises:
        ShardError: an index part is damaged.
        ResourceError: writing failed.
    """
    splits: dict[str, SplitRecord] = {}
    valid: dict[str, npt.NDArray[np.bool_]] = {}
    errors = [_ERRORS_SCHEMA.empty_table()]
    statistics: list[pa.Table] = []
    for name, record in plan.splits.items():
        own = [commit for commit in commits if commit.split == name]
        valid[name] = np.zeros(record.rows, np.bool_)
        sums = ChannelSums.empty(manifest.fingerprint.latent.channels)
        source_bytes = exif_turned = 0
        for commit in own:
            require_intact(root, commit)
            table = read_index(root, name, commit.shard, _NEEDED)
            is_good = pc.equal(table["status"], "ok")
            good, lost = table.filter(is_good), table.filter(pc.invert(is_good))
            valid[name][table["row"].to_numpy()] = is_good.to_numpy()
            sums = sums + read_sums(table)
            if lost.num_rows:
                lost = lost.select(_ERRORS_SCHEMA.names).replace_schema_metadata(None)
                errors.append(lost.cast(_ERRORS_SCHEMA))
            source_bytes += pc.sum(good["source_bytes"]).as_py() or 0
            exif_turned += pc.sum(pc.not_equal(good["exif_orientation"], 1)).as_py() or 0
        statistics.append(_statistics(name, sums))
        splits[name] = dataclasses.replace(
            record,
            valid_rows=int(valid[name].sum()),
            bytes=sum(file.bytes for commit in own for file in commit.files),
            source_bytes=source_bytes,
            clipped=int(sums.clipped.sum()),
            exif_turned=exif_turned,
        )
    written = _put_zarr_group(manifest, plan, valid, staging)
    if manifest.layout.has_tar:
        written += [
            staging.put(tar_list_path(name), _tar_list(manifest, name, commits)) for name in splits
        ]
    written += [
        staging.put("errors.parquet", parquet_bytes(pa.concat_tables(errors))),
        staging.put("stats/channels.parquet", parquet_bytes(pa.concat_tables(statistics))),
        staging.put("README.md", _readme(manifest)),
    ]
    written.append(staging.put(CHECKSUMS, checksums_bytes(root, manifest, commits, written)))
    complete = dataclasses.replace(manifest, state="complete", splits=splits, files=tuple(written))
    staging.put_sealed(MANIFEST, complete.to_dict())
    return complete


def _statistics(split: str, sums: ChannelSums) -> pa.Table:
    """Turns channel sums into one row per channel, in the unit of the stored values."""
    count = max(sums.count, 1)
    mean = sums.total / count
    variance = np.maximum(sums.squares / count - mean**2, 0.0)
    channels = len(mean)
    empty = sums.count == 0
    return pa.table(
        {
            "split": pa.array([split] * channels, pa.string()),
            "channel": pa.array(range(channels), pa.int32()),
            "count": pa.array([sums.count] * channels, pa.int64()),
            "mean": mean,
            "std": np.sqrt(variance),
            "min": np.zeros(channels) if empty else sums.low,
            "max": np.zeros(channels) if empty else sums.high,
            "energy": sums.squares / count,
            "zero_share": sums.zeros / count,
            "clipped": pa.array(sums.clipped.astype(np.int64)),
        }
    )


def _tar_list(manifest: Manifest, split: str, commits: Sequence[CommitRecord]) -> bytes:
    """Lists a split's tars in the form of `wids`, and says what turns stored values into y."""
    own = [commit for commit in commits if commit.split == split]
    return json_bytes(
        {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": split,
            "shardlist": [
                {
                    "url": tar_path(split, commit.shard).rpartition("/")[2],
                    "nsamples": commit.valid_rows,
                    "filesize": file.bytes,
                }
                for commit in own
                for file in commit.files
                if file.path == tar_path(split, commit.shard)
            ],
            **dequantising(manifest),
        }
    )


def _put_zarr_group(
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
            dtype, fill = layout.array_values(latent)
            codec = codec_of(manifest.format_version, layout, latent)
            split.create_array(
                "latents",
                shape=(record.rows, record.views, *latent.shape),
                dtype=dtype,
                chunks=(1, 1, *latent.shape),
                shards=(record.shard_rows, record.views, *latent.shape),
                compressors=codec.zarr_metadata,
                fill_value=fill,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("sample", "view", "channel", "y", "x"),
                attributes=dequantising(manifest) | (_unfolding(latent) if layout.fold else {}),
            )
        for array, values, unknown in (
            ("labels", plan.labels(name), -1),
            ("valid", valid[name], False),
        ):
            small = split.create_array(
                array,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(max(1, len(values)),),
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=unknown,
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


def _unfolding(latent: LatentSpec) -> dict[str, Any]:
    """Returns what turns codes into symbols and then y; the last value stands for a hole.

    The table of int16 would be longer than all else that the metadata may hold: it has the rule.
    """
    made = dict[str, Any](
        unfold="stored = (code.astype('int32') >> 1) ^ -(code.astype('int32') & 1)"
    )
    if latent.dtype == "int8":
        made["values"] = unfolded(np.arange(256, dtype=np.uint8)).tolist()
    return made


def _readme(manifest: Manifest) -> bytes:
    """Fills in the template beside this file, with the parts that the cache's containers need."""
    template = package_files("ci2p_cache.encoding").joinpath("cache_readme.md").read_text("utf-8")
    fingerprint, layout = manifest.fingerprint, manifest.layout
    head, zarr_part, tar_part, rest = re.split(r"@(?:IF zarr|IF tar|END)@\n", template)
    if layout.format == "both":
        # Each part ends in the paragraph on the index; once is enough.
        zarr_part = zarr_part[: zarr_part.rindex("`index/` lists")].rstrip() + "\n\n"
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
    if layout.fold:
        rule = 'code = latents[0].astype("int32")\ny = ((code >> 1) ^ -(code & 1))'
        text = text.replace("y = latents[0]", rule)
    return text.encode()
