"""Finalising: once every shard is committed, the files that speak of the whole cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.commit import CommitRecord, sha256_file
from ci2p_cache.cache.folder import checksums_bytes
from ci2p_cache.cache.index import ChannelSums, read_index, read_sums
from ci2p_cache.cache.manifest import Manifest, SplitRecord
from ci2p_cache.cache.paths import CHECKSUMS, MANIFEST, index_path, tar_list_path, tar_path
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.cache_readme import readme_bytes
from ci2p_cache.encoding.plan import Plan
from ci2p_cache.encoding.zarr_group import dequantising, put_zarr_group
from ci2p_cache.errors import ShardError, command
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.record import json_bytes

__all__ = ["finalise", "require_intact"]

_NEEDED = ("row", "key", "path", "status", "error", "source_bytes", "exif_orientation")
"""Columns of the index parts that are summed up here."""

_ERRORS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("path", pa.string()),
        ("error", pa.string()),
    ]
)


def finalise(
    root: Path,
    manifest: Manifest,
    plan: Plan,
    commits: Sequence[CommitRecord],
    staging: StagingArea,
) -> Manifest:
    """Writes metadata, labels, valid, statistics, errors and checksums, and the manifest last.

    Args:
        root: The cache folder.
        manifest: Its manifest so far.
        plan: Its plan.
        commits: The commit record of every shard.
        staging: Where files are staged.

    Returns:
        The completed manifest.

    Raises:
        ShardError: an index part is damaged.
        ResourceError: writing failed.
    """
    splits: dict[str, SplitRecord] = {}
    valid: dict[str, npt.NDArray[np.bool_]] = {}
    errors: list[pa.Table] = []
    statistics: list[pa.Table] = []
    for name, record in plan.splits.items():
        own = [commit for commit in commits if commit.split == name]
        found = _gather(root, manifest, name, record, own)
        valid[name] = found.valid
        errors.append(found.errors)
        statistics.append(_statistics(name, found.sums))
        splits[name] = dataclasses.replace(
            record,
            valid_rows=int(found.valid.sum()),
            bytes=sum(file.bytes for commit in own for file in commit.files),
            source_bytes=found.source_bytes,
            clipped=int(found.sums.clipped.sum()),
            exif_turned=found.exif_turned,
        )
    written = put_zarr_group(manifest, plan, valid, staging)
    if manifest.layout.has_tar:
        written += [
            staging.put(tar_list_path(name), _tar_list(manifest, name, commits)) for name in splits
        ]
    written += [
        staging.put("errors.parquet", parquet_bytes(pa.concat_tables(errors))),
        staging.put("stats/channels.parquet", parquet_bytes(pa.concat_tables(statistics))),
        staging.put("README.md", readme_bytes(manifest)),
    ]
    written.append(staging.put(CHECKSUMS, checksums_bytes(root, manifest, commits, written)))
    complete = dataclasses.replace(manifest, state="complete", splits=splits, files=tuple(written))
    staging.put_sealed(MANIFEST, complete.to_dict())
    return complete


@dataclass(slots=True)
class _Gathered:
    """What the index parts of one split say together."""

    valid: npt.NDArray[np.bool_]
    errors: pa.Table
    sums: ChannelSums
    source_bytes: int = 0
    exif_turned: int = 0


def _gather(
    root: Path, manifest: Manifest, split: str, record: SplitRecord, commits: list[CommitRecord]
) -> _Gathered:
    errors: list[pa.Table] = []
    found = _Gathered(
        np.zeros(record.rows, np.bool_),
        _ERRORS_SCHEMA.empty_table(),
        ChannelSums.empty(manifest.fingerprint.latent.channels),
    )
    for commit in commits:
        require_intact(root, commit)
        table = read_index(root, split, commit.shard, _NEEDED)
        good = pc.equal(table["status"], "ok")
        found.valid[table["row"].to_numpy()] = good.to_numpy()
        found.sums = found.sums + read_sums(table)
        kept = table
        if not pc.all(good).as_py():
            lost = table.filter(pc.invert(good)).select(["row", "key", "path", "error"])
            names = pa.array([split] * lost.num_rows, pa.string())
            lost = lost.add_column(0, "split", names).replace_schema_metadata(None)
            errors.append(lost.cast(_ERRORS_SCHEMA))
            kept = table.filter(good)
        found.source_bytes += pc.sum(kept["source_bytes"]).as_py() or 0
        found.exif_turned += pc.sum(pc.not_equal(kept["exif_orientation"], 1)).as_py() or 0
    found.errors = pa.concat_tables([found.errors, *errors])
    return found


def require_intact(root: Path, commit: CommitRecord) -> None:
    """Holds an index part against its committed digest, as where only some of its pages are read.

    Raises:
        ShardError: it is missing, or not what was committed.
    """
    path = index_path(commit.split, commit.shard)
    listed = next((file.sha256 for file in commit.files if file.path == path), None)
    try:
        intact = sha256_file(root / path) == listed
    except OSError as error:
        raise ShardError(f"{root / path} cannot be read: {error.strerror}") from error
    if not intact:
        raise ShardError(
            f"{root / path} is damaged: its sha256 is not that in its commit record",
            hint=command("verify", root, "--repair"),
        )


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
