"""`verify`: holds every byte of a cache against what was committed, and says what is wrong.

Findings are values: a damaged cache is an answer here, not an error.

::

    cache.json (vouches for itself) --> plan, encoder, metadata, labels, valid, checksums.sha256
    commit record (vouches for itself, listed in checksums.sha256) --> shard, index part
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ci2p_cache.cache.checksums import listed_digests
from ci2p_cache.cache.finding import Finding, file_problem
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.paths import (
    CHECKSUMS,
    MANIFEST,
    array_path,
    commit_path,
    shard_files,
    tar_list_path,
)
from ci2p_cache.cache.shard_check import check_shard
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.cache.traces import gaps, named_ranges, own_files, shard_of
from ci2p_cache.errors import IntegrityError, UsageError

__all__ = ["verify"]

_ARRAYS = ("labels", "valid")


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Checks a cache.

    Full: the sha256 of every file; every chunk's checksum, decoded, and its crc32c against the
    index; every tar against the one that index and latents make; labels, valid and rows of the
    arrays against the index. Quick: commit records, sizes,
    every shard's own index, and digests of small files; the latents themselves are not read.
    Either way files that no record lists are found in `latents.zarr`, `tar`, `index` and `commits`.

    Args:
        path: The cache folder; one that is still being encoded is checked as far as it goes. Of one
            behind a URL every file is fetched anew.
        quick: Leave the latents unread.
        on_shard: Called with (shards checked, shards in all).

    Returns:
        What is wrong; empty for an intact cache.

    Raises:
        UsageError: a cache behind a URL is to be verified quickly.
        ResourceError: the server of such a cache does not answer.
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` itself is damaged: nothing can be held against it.
    """
    cache = open_cache(path, partial=True)
    if cache.mirror is not None:
        if quick:
            raise UsageError(
                f"{cache.mirror.remote} can only be verified whole",
                hint="leave out --quick: every file is fetched and checked",
            )
        cache.mirror.need_all()
    files = list(own_files(cache.path))
    findings = [*_check_files(cache), *_foreign_files(cache, files)]
    digests = listed_digests(cache)
    traces = {place for file in chain(files, digests) if (place := shard_of(file)) is not None}
    total = sum(split.record.num_shards for split in cache.values())
    done = 0
    for split in cache.values():
        for shards in _visits(split, traces):
            if len(shards) == 1:
                findings += check_shard(split, shards[0], digests, quick=quick)
            elif cache.is_complete:
                findings.append(_nothing_there(split, shards))
            done += len(shards)
            if on_shard is not None:
                on_shard(done, total)
        if cache.is_complete and not quick:
            named = {finding.path for finding in findings}
            findings += [found for found in _check_arrays(split) if found.path not in named]
    return findings


def _check_files(cache: Cache) -> Iterator[Finding]:
    """Checks the files that belong to no shard."""
    manifest = cache.manifest
    if not manifest.is_complete:
        left = {s.name: gaps(s.record.num_shards, s.committed()) for s in cache.values()}
        count = sum(map(len, chain.from_iterable(left.values())))
        problem = f"encoding has not finished: {count} shards are not committed"
        told = f" ({named_ranges(left)})" if count else ""
        yield Finding(path=MANIFEST, kind="unfinished", problem=problem + told)
    else:
        listed = {file.path for file in manifest.files}
        for path in sorted(_finalised_paths(cache) - listed):
            yield Finding(path=path, kind="missing", problem=f"{MANIFEST} does not list it")
    for file in (manifest.plan, manifest.encoder, *manifest.files):
        found = file_problem(cache.path, file, quick=False)
        if found is not None:
            yield Finding(path=file.path, kind=found[0], problem=found[1])


def _finalised_paths(cache: Cache) -> set[str]:
    """Returns the paths of the files that finalising writes; some may not be listed yet."""
    found = {CHECKSUMS, "README.md", "errors.parquet", "stats/channels.parquet"}
    found.add("latents.zarr/zarr.json")
    for split in cache.values():
        found.add(f"latents.zarr/{split.name}/zarr.json")
        arrays = ("latents", *_ARRAYS) if split.layout.has_zarr else _ARRAYS
        found |= {f"{array_path(split.name, array)}/zarr.json" for array in arrays}
        if split.layout.has_tar:
            found.add(tar_list_path(split.name))
        if split.num_rows:
            found |= {f"{array_path(split.name, array)}/c.0" for array in _ARRAYS}
    return found


def _foreign_files(cache: Cache, files: Collection[str]) -> Iterator[Finding]:
    """Finds what no record lists among the files that are in the folders that are wholly ours."""
    # Those that are not listed yet are left from before a rescan or a repair.
    known = {file.path for file in cache.manifest.files} | _finalised_paths(cache)
    for path in files:
        split, shard = shard_of(path) or ("", 0)
        planned = (
            split in cache
            and shard < cache[split].record.num_shards
            and path in shard_files(cache[split].layout, split, shard)
        )
        if not planned and path not in known:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            yield Finding(path=shown, kind="foreign", problem="no record lists this file")


def _visits(split: Split, traces: Collection[tuple[str, int]]) -> Iterator[range]:
    """Yields all shards of a split: one by one those that left a trace, the others in ranges."""
    total = split.record.num_shards
    numbers = sorted(shard for name, shard in traces if name == split.name and shard < total)
    rest = gaps(total, numbers)
    yield from sorted([*rest, *(range(n, n + 1) for n in numbers)], key=lambda shards: shards[0])


def _nothing_there(split: Split, shards: range) -> Finding:
    return Finding(
        path=commit_path(split.name, shards[0]),
        kind="missing",
        problem=f"{len(shards)} shards, {shards[0]} to {shards[-1]}, have no commit record "
        "and no files",
        split=split.name,
        shard=shards[0],
        last_shard=shards[-1],
        first_row=split.record.rows_of(shards[0]).start,
        last_row=split.record.rows_of(shards[-1]).stop - 1,
    )


def _check_arrays(split: Split) -> Iterator[Finding]:
    """Decodes labels and valid, and holds them against the index parts that can be read."""
    for name, column in zip(_ARRAYS, ("label", "status"), strict=True):
        try:
            array = split.labels if name == "labels" else split.valid
        except IntegrityError as error:
            yield _array_damage(split, name, str(error))
            continue
        wrong = []
        for shard in split.committed():
            try:
                values = read_index(split.cache.path, split.name, shard, [column])[column]
            except IntegrityError:
                # Named with its shard.
                continue
            rows = split.record.rows_of(shard)
            wanted = values if name == "labels" else pc.equal(values, "ok")
            if not np.array_equal(array[rows.start : rows.stop], wanted.to_numpy()):
                wrong.append(shard)
        if wrong:
            told = named_ranges({split.name: [range(shard, shard + 1) for shard in wrong]})
            yield _array_damage(split, name, f"it is not what the index says (shards {told})")


def _array_damage(split: Split, name: str, problem: str) -> Finding:
    path = f"{array_path(split.name, name)}/c.0"
    return Finding(path=path, kind="damaged", problem=problem, split=split.name)
