"""`write_arrays`: a cache as plain .npy arrays with a parquet table each; whole or not at all.

::

    NEW/train.npy       stored values (n, V, M, h, w) of the n valid rows, in row order
        train.parquet   one line for each, in the same order: split, row, key, label, class, ...
        latents.json    what turns stored values into y, the classes, the fingerprint
        checksums.sha256
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.containers import npy_header
from ci2p_cache.cache.index import INDEX_SCHEMA, read_index
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import disk_errors, remove_path, sync_folder
from ci2p_cache.cache.store import Cache
from ci2p_cache.encoding.shard_values import read_values
from ci2p_cache.errors import NotACacheError, ShardError, command
from ci2p_cache.machine import num_cores
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.record import json_bytes

__all__ = ["ARRAYS_VERSION", "write_arrays"]

ARRAYS_VERSION = 1
"""Version of this form, in `latents.json`."""

_LEFT_OUT = ("status", "error", "tar_offset")
"""Columns of the index that say nothing here: only valid rows are written, and not to tars."""


def write_arrays(
    cache: Cache, root: Path, *, on_shard: Callable[[int, int], None] | None = None
) -> int:
    """Writes the valid rows of every split; each latent is verified on the way.

    Args:
        cache: A complete cache.
        root: The folder to make; it must not be there, or be empty. Files are written to a hidden
            folder beside it, which is renamed when all of them are on disk.
        on_shard: Called with (shards done, shards in all).

    Returns:
        Bytes of the arrays and tables.

    Raises:
        NotACacheError: `root` holds something.
        ShardError, ManifestError: the cache is damaged; nothing was written.
        LockedError: another process writes the same arrays.
        ResourceError: writing failed; nothing was written.
    """
    if root.is_symlink() or (root.exists() and any(root.iterdir())):
        raise NotACacheError(
            f"{root} is there already; nothing was changed", hint="choose a new --out folder"
        )
    staged = root.absolute().parent / f".{root.name}.converting"
    total, done = sum(split.record.num_shards for split in cache.values()), 0
    with disk_errors(staged):
        staged.parent.mkdir(parents=True, exist_ok=True)
    with locked(staged.with_name(staged.name + ".lock"), what="convert"), disk_errors(root):
        remove_path(staged)
        staged.mkdir()
        try:
            digests: dict[str, str] = {}
            size = 0
            with ThreadPoolExecutor(num_cores(), "convert") as pool:
                for split in cache.values():

                    def parts(split: Split = split) -> Iterator[bytes]:
                        nonlocal done
                        for part in _values(split, pool):
                            yield part
                            done += 1
                            if on_shard is not None:
                                on_shard(done, total)

                    size += _write(staged / f"{split.name}.npy", parts(), digests)
                    table = parquet_bytes(_table(split))
                    size += _write(staged / f"{split.name}.parquet", iter([table]), digests)
            _write(staged / "latents.json", iter([_description(cache)]), digests)
            lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
            _write(staged / "checksums.sha256", iter([lines.encode()]), digests)
            sync_folder(staged)
            # An empty folder gives way to it; what came in the meantime does not.
            staged.rename(root)
            sync_folder(staged.parent)
        except BaseException:
            remove_path(staged)
            raise
    return size


def _values(split: Split, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yields the file of a split's array: the values of each shard, the header before the first."""
    shape = (len(split.valid_rows), split.num_views, *split.latent.shape)
    start, count = npy_header(split.latent.dtype, shape), 0
    for shard in range(split.record.num_shards):
        values = read_values(split, shard, pool)
        count += len(values.latents)
        kind = np.dtype(split.latent.dtype).newbyteorder("<")
        latents = (latent.astype(kind, copy=False) for latent in values.latents.values())
        yield start + b"".join(latent.tobytes() for latent in latents)
        start = b""
    if start:
        yield start
    if count != shape[0]:
        raise ShardError(
            f"split {split.name!r} holds {count} latents, `valid` says {shape[0]}",
            hint=command("verify", split.cache.path, "--repair"),
        )


def _table(split: Split) -> pa.Table:
    """Returns what the index says of the valid rows."""
    names = [name for name in INDEX_SCHEMA.names if name not in _LEFT_OUT]
    parts = [INDEX_SCHEMA.empty_table().select(names)]
    for shard in range(split.record.num_shards):
        table = read_index(split.cache.path, split.name, shard)
        table = table.filter(pc.equal(table["status"], "ok")).replace_schema_metadata(None)
        parts.append(table.select(names))
    return pa.concat_tables(parts).combine_chunks()


def _description(cache: Cache) -> bytes:
    manifest = cache.manifest
    return json_bytes(
        {
            "arrays_version": ARRAYS_VERSION,
            "scale": manifest.scale,
            "offset": list(manifest.offset),
            "dequantise": "y = stored.astype('float32') * scale + offset[:, None, None]",
            "classes": list(manifest.classes),
            "class_titles": list(manifest.class_titles),
            "source": manifest.source,
            "fingerprint_sha256": manifest.fingerprint.digest,
            "fingerprint": manifest.fingerprint.to_dict(),
        }
    )


def _write(path: Path, parts: Iterator[bytes], digests: dict[str, str]) -> int:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    digests[path.name] = digest.hexdigest()
    return size
