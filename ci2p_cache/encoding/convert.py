r"""`convert`: the same latents in another container, without the encoder and without the images.

::

    cache --every value verified--> shards of the other layout --> a cache of the same fingerprint
                                \-> SPLIT.npy, SPLIT.parquet    --> a folder of plain arrays

Such a folder appears whole or not at all. `SPLIT.npy` holds the stored values (n, V, M, h, w) of
the n valid rows, in row order; `SPLIT.parquet` a line for each, in the same order; `latents.json`
what turns stored values into y, the classes and the fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache import __version__
from ci2p_cache.cache.codecs import ChunkCodec, codec_of
from ci2p_cache.cache.commit import CommitRecord, FileRecord, read_commit, sha256_file
from ci2p_cache.cache.containers import npy_header, put_shard
from ci2p_cache.cache.index import INDEX_SCHEMA, read_index
from ci2p_cache.cache.lock import LOCK, locked
from ci2p_cache.cache.manifest import Manifest, SplitRecord, read_manifest, refuse_difference
from ci2p_cache.cache.paths import CHECKSUMS, MANIFEST, data_paths, index_path
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path, sync_folder
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.encoding.finalise import dequantising, finalise
from ci2p_cache.encoding.locks import interruptible, refuse_foreign_folder
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.rows import read_values
from ci2p_cache.errors import (
    FingerprintMismatchError,
    IntegrityError,
    ManifestError,
    NotACacheError,
    ShardError,
    UsageError,
    command,
)
from ci2p_cache.machine import num_cores
from ci2p_cache.outputs import refuse_url
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.record import Record, read_regular
from ci2p_cache.specs import FORMAT_VERSION, CodecName, FormatName, LayoutSpec, default_level

__all__ = ["ConvertSummary", "convert"]

_ARRAYS_VERSION = 1
"""Version of plain arrays, in `latents.json`."""

_LEFT_OUT = ("status", "error", "tar_offset")
"""Columns of the index that say nothing of plain arrays: they hold valid rows, and are no tars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertSummary(Record):
    """What a conversion ended with."""

    path: str
    """The new folder."""
    format: Literal["zarr", "webdataset", "both", "npy"]
    """What it holds."""
    images: int
    """Samples that hold a latent, over all splits."""
    shards: int
    """Shards over all splits."""
    converted_now: int
    """Shards among them that this call converted; the others existed."""
    source_bytes: int
    """Bytes of the shards and index parts that were read from."""
    bytes: int
    """Bytes of those written; for npy, of the arrays and their tables."""
    seconds: float
    """Wall time."""


def convert(
    path: str | Path,
    out: str | Path,
    *,
    format: FormatName | Literal["npy"],
    codec: CodecName | None = None,
    level: int | None = None,
    fold: bool | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> ConvertSummary:
    """Writes the latents of a cache in another container into a new folder.

    A cache of the new format has the same fingerprint, plan, rows and values; its layout differs in
    `format`, `codec`, `level` and `fold` alone, and its format version is the newest. It is what
    `encode` would have written with that layout, to the byte, on the same software. Called again
    after an interruption it continues. `npy` writes plain arrays, which are no cache; they appear
    whole or not at all.

    Args:
        path: The cache folder; only read.
        out: The new folder; not inside the other one.
        format: Its container.
        codec: Byte compressor of zarr chunks; None: as the cache's layout has it.
        level: Compression level; None: as the cache's layout has it, or the default where codec,
            fold or format version are others.
        fold: Whether to fold symbols; None: as the cache's layout has it.
        on_shard: Called with (shards done, shards in all).

    Raises:
        UsageError: `out` is a URL, is inside the cache or the cache in it, or codec, level or
            fold are given for npy, out of range, or do not go together.
        NotACacheError: the cache folder is no cache, or `out` holds something else.
        IncompleteCacheError: encoding has not finished.
        FingerprintMismatchError: `out` holds another cache, or one of another layout.
        ShardError, ManifestError: the cache is damaged; what was converted before is safe.
        LockedError: another process writes to `out`.
        ResourceError: reading or writing failed; run it again later.
        InterruptedRunError: a signal stopped it; run it again to continue.
    """
    started = time.perf_counter()
    cache, root = open_cache(path), Path(out)
    refuse_url(root, what="converted cache")
    new, old = root.resolve(), cache.path.resolve()
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise UsageError(
            f"`out` {root} and the cache {cache.path} are in each other",
            hint="choose an --out folder beside the cache",
        )
    refuse_foreign_folder(root)
    shards = now = sum(split.record.num_shards for split in cache.values())
    report = on_shard or (lambda done, total: None)
    if format == "npy":
        if (codec, level, fold) != (None, None, None):
            raise UsageError(
                "plain arrays are not compressed", hint="leave out --codec, --level and --fold"
            )
        with interruptible(f"interrupted; nothing was written to {root}"):
            size = _write_arrays(cache, root, report)
    else:
        layout = _layout(cache.manifest, format, codec, level, fold)
        with interruptible(f"interrupted; what was converted so far in {root} is in place"):
            size, now = _write_cache(cache, root, layout, report)
    return ConvertSummary(
        path=str(root),
        format=format,
        images=sum(len(split.valid_rows) for split in cache.values()),
        shards=shards,
        converted_now=now,
        source_bytes=sum(split.record.bytes or 0 for split in cache.values()),
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def _layout(
    manifest: Manifest,
    format: FormatName,
    codec: CodecName | None,
    level: int | None,
    fold: bool | None,
) -> LayoutSpec:
    """Returns the layout of the new cache."""
    made = manifest.layout
    codec = codec or made.codec
    if fold is None:
        fold = made.fold and codec != "none"
    if level is None:
        # That of `none` waits for a conversion back.
        keeps = codec == made.codec or "none" in (codec, made.codec)
        keeps = keeps and (manifest.format_version, made.fold) == (FORMAT_VERSION, fold)
        level = made.level if keeps else default_level(FORMAT_VERSION, codec, fold=fold)
    layout = dataclasses.replace(made, format=format, codec=codec, level=level, fold=fold)
    if problem := layout.problem(FORMAT_VERSION, manifest.fingerprint.latent):
        raise UsageError(problem)
    return layout


def _write_cache(
    cache: Cache, root: Path, layout: LayoutSpec, on_shard: Callable[[int, int], None]
) -> tuple[int, int]:
    """Converts what is not yet, and finalises; returns the bytes and the shards converted."""
    codec = codec_of(FORMAT_VERSION, layout, cache.fingerprint.latent)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with (
        locked(root / LOCK, what="convert"),
        StagingArea(root) as staging,
        ThreadPoolExecutor(num_cores(), "convert") as pool,
    ):
        manifest = _begun(cache, root, layout) or _begin(cache, layout, staging)
        plan, commits, now = read_plan(root, manifest), [], 0
        for name, shard in plan.shard_numbers():
            commit = _converted(root, layout, cache[name], shard)
            if commit is None:
                commit = _convert(cache[name], shard, manifest, codec, pool, staging)
                now += 1
            commits.append(commit)
            on_shard(len(commits), plan.num_shards)
        if now or not manifest.is_complete:
            manifest = finalise(root, manifest, plan, commits, staging)
    return sum(record.bytes or 0 for record in manifest.splits.values()), now


def _begun(cache: Cache, root: Path, layout: LayoutSpec) -> Manifest | None:
    """Returns the manifest of a conversion that was begun, None where there is none."""
    if not (root / MANIFEST).exists():
        return None
    theirs, ours = read_manifest(root), cache.manifest
    if theirs.format_version != FORMAT_VERSION:
        raise FingerprintMismatchError(
            f"{root} holds a cache of format version {theirs.format_version}; nothing was changed",
            hint="choose another --out folder",
        )
    refuse_difference(root, theirs, ours.fingerprint, layout)
    if theirs.plan != ours.plan or theirs.classes != ours.classes:
        raise FingerprintMismatchError(
            f"{root} holds a cache of other images; nothing was changed",
            hint="choose another --out folder",
        )
    return theirs


def _begin(cache: Cache, layout: LayoutSpec, staging: StagingArea) -> Manifest:
    """Copies plan and encoder, and writes the manifest: a cache is begun."""
    ours, hint = cache.manifest, command("verify", cache.path, "--repair")

    def copied(file: FileRecord) -> FileRecord:
        path = cache.path / file.path
        try:
            content = read_regular(path, max_bytes=file.bytes)
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ManifestError(f"{path} is not what was committed", hint=hint)
        return staging.put(file.path, content)

    manifest = dataclasses.replace(
        ours,
        format_version=FORMAT_VERSION,
        software=f"ci2p-cache {__version__}",
        state="encoding",
        layout=layout,
        splits={
            name: SplitRecord(rows=each.rows, views=each.views, shard_rows=each.shard_rows)
            for name, each in ours.splits.items()
        },
        plan=copied(ours.plan),
        encoder=copied(ours.encoder),
        files=(),
    )
    staging.put_sealed(MANIFEST, manifest.to_dict())
    return manifest


def _converted(root: Path, layout: LayoutSpec, split: Split, shard: int) -> CommitRecord | None:
    """Returns the record of a shard that was converted; its files' digests are checked."""
    ours = split.read_commit(shard)
    wanted = {*data_paths(layout, split.name, shard), index_path(split.name, shard)}
    try:
        theirs = read_commit(root, split.name, shard)
        if ours is None or theirs is None or {file.path for file in theirs.files} != wanted:
            return None
        as_theirs = dataclasses.replace(
            ours,
            format_version=FORMAT_VERSION,
            files=theirs.files,
            index_crc32c=theirs.index_crc32c,
        )
        intact = theirs == as_theirs and all(
            sha256_file(root / file.path) == file.sha256 for file in theirs.files
        )
    except (IntegrityError, OSError):
        return None
    return theirs if intact else None


def _convert(
    split: Split,
    shard: int,
    manifest: Manifest,
    codec: ChunkCodec,
    pool: ThreadPoolExecutor,
    staging: StagingArea,
) -> CommitRecord:
    values, views = read_values(split, shard, pool), split.num_views
    first = split.record.rows_of(shard).start
    chunks: list[bytes | None] = [None] * (split.record.shard_rows * views)
    raw = {
        (row, view): memoryview(latent.reshape(-1).view(np.uint8))
        for row, latents in values.latents.items()
        for view, latent in enumerate(latents)
    }
    if manifest.layout.has_zarr:
        for (row, view), chunk in zip(raw, pool.map(codec.encode, raw.values()), strict=True):
            chunks[(row - first) * views + view] = chunk
    return put_shard(
        staging,
        partial(dataclasses.replace, values.commit, format_version=FORMAT_VERSION),
        shard_id=(split.name, shard),
        layout=manifest.layout,
        shape=manifest.splits[split.name],
        latent=split.latent,
        rows=values.rows,
        sums=values.sums,
        chunks=chunks,
        raw=raw,
    )


def _write_arrays(cache: Cache, root: Path, on_shard: Callable[[int, int], None]) -> int:
    """Writes plain arrays to a hidden folder beside `root`, which is renamed when all is on disk.

    Returns the bytes of the arrays and tables.
    """
    if root.is_symlink() or (root.exists() and any(root.iterdir())):
        raise NotACacheError(
            f"{root} is there already; nothing was changed", hint="choose a new --out folder"
        )
    staged = root.absolute().parent / f".{root.name}.converting"
    with disk_errors(staged):
        staged.parent.mkdir(parents=True, exist_ok=True)
    with locked(staged.with_name(staged.name + ".lock"), what="convert"), disk_errors(root):
        remove_path(staged)
        try:
            with (
                StagingArea(staged) as staging,
                ThreadPoolExecutor(num_cores(), "convert") as pool,
            ):
                files, total = [], sum(split.record.num_shards for split in cache.values())
                done = itertools.count(1)
                for name, split in cache.items():
                    values = _array_parts(split, pool, lambda: on_shard(next(done), total))
                    files.append(staging.put(f"{name}.npy", values))
                    files.append(staging.put(f"{name}.parquet", parquet_bytes(_table(split))))
                size = sum(file.bytes for file in files)
                files.append(staging.put_json("latents.json", _description(cache)))
                lines = [f"{f.sha256}  {f.path}\n" for f in sorted(files, key=lambda f: f.path)]
                staging.put(CHECKSUMS, "".join(lines).encode())
            sync_folder(staged)
            # An empty folder gives way to it; what came in the meantime does not.
            staged.rename(root)
            sync_folder(staged.parent)
        except BaseException:
            remove_path(staged)
            raise
    return size


def _array_parts(
    split: Split, pool: ThreadPoolExecutor, on_shard: Callable[[], None]
) -> Iterator[bytes]:
    """Yields the file of a split's array: its header, then the values of each shard."""
    shape = (len(split.valid_rows), split.num_views, *split.latent.shape)
    yield npy_header(split.latent.dtype, shape)
    kind, count = np.dtype(split.latent.dtype).newbyteorder("<"), 0
    for shard in range(split.record.num_shards):
        latents = read_values(split, shard, pool).latents.values()
        count += len(latents)
        yield b"".join(latent.astype(kind, copy=False).tobytes() for latent in latents)
        on_shard()
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


def _description(cache: Cache) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "arrays_version": _ARRAYS_VERSION,
        **dequantising(manifest),
        "classes": list(manifest.classes),
        "class_titles": list(manifest.class_titles),
        "source": manifest.source,
        "fingerprint_sha256": manifest.fingerprint.digest,
        "fingerprint": manifest.fingerprint.to_dict(),
    }
