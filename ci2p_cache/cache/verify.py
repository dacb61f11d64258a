"""`verify`: holds every byte of a cache against what was committed, and says what is wrong.

Findings are values: a damaged cache is an answer here, not an error.

::

    cache.json (vouches for itself) --> plan, encoder, metadata, labels, valid, checksums.sha256
    commit record (vouches for itself, listed in checksums.sha256) --> shard, index part
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import pyarrow.compute as pc

from ci2p_cache.cache.commit import CommitRecord, FileRecord, file_problem, sha256_file
from ci2p_cache.cache.containers import pack_tar
from ci2p_cache.cache.folder import listed_digests
from ci2p_cache.cache.index import index_rows
from ci2p_cache.cache.paths import (
    CHECKSUMS,
    MANIFEST,
    array_path,
    commit_path,
    data_paths,
    own_files,
    shard_files,
    shard_of,
    tar_list_path,
    tar_path,
)
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.cache.survey import gaps, named_ranges, record_problem
from ci2p_cache.errors import IntegrityError, UsageError
from ci2p_cache.record import Record

__all__ = ["Finding", "FindingKind", "verify"]

_ARRAYS = ("labels", "valid")

_SMALL_BYTES = 4 * 2**20
"""Files up to this size have their digest checked even by a quick verify."""

FindingKind = Literal["missing", "damaged", "foreign", "unfinished", "differs"]
"""missing, damaged: a file that was committed. foreign: a file that no record lists. unfinished:
encoding has not ended. differs: encoding again gives other values than those stored."""

_Problem = tuple[str, FindingKind, str]
"""A path, and what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(Record):
    """One thing that is wrong."""

    path: str
    """The file it is about, relative to the cache folder."""
    kind: FindingKind
    """What sort of thing."""
    problem: str
    """What is wrong with it."""
    split: str | None = None
    """The split that loses rows by it, if one does."""
    shard: int | None = None
    """The shard."""
    last_shard: int | None = None
    """The last one of a range of shards of which nothing is there; None where it is one."""
    first_row: int | None = None
    """First row that is lost."""
    last_row: int | None = None
    """Last row that is lost."""


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Checks a cache.

    Full: the sha256 of every file; every chunk's checksum, decoded, and its crc32c against the
    index; every tar against the one that index and latents make; labels, valid and rows of the
    arrays against the index. Quick: commit records, sizes, every shard's own index, and digests of
    small files; the latents themselves are not read. Either way files that no record lists are
    found in `latents.zarr`, `tar`, `index` and `commits`.

    Args:
        path: The cache folder; one that is still being encoded is checked as far as it is done.
            Every file of one behind a URL is fetched again.
        quick: Leave the latents unread.
        on_shard: Called with (shards checked, shards in all).

    Returns:
        What is wrong; empty for an intact cache.

    Raises:
        UsageError: a cache behind a URL cannot be verified quickly.
        ResourceError: the server of such a cache does not answer.
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` itself is damaged: nothing can be checked against it.
    """
    cache = open_cache(path, partial=True)
    if cache.mirror is not None:
        if quick:
            raise UsageError(
                f"{cache.mirror.remote} can only be verified whole",
                hint="leave out --quick: every file is fetched and checked",
            )
        cache.mirror.need_all()
    files, digests = list(own_files(cache.path)), listed_digests(cache)
    traces = {found for file in chain(files, digests) if (found := shard_of(file)) is not None}
    findings = [
        Finding(path=path, kind=kind, problem=problem)
        for path, kind, problem in chain(_file_problems(cache), _foreign_files(cache, files))
    ]
    done, total = 0, sum(split.record.num_shards for split in cache.values())
    limit = _SMALL_BYTES if quick else math.inf
    for split in cache.values():
        for shards in _visits(split, traces):
            for name, kind, problem in _shard_problems(split, shards, digests, limit):
                findings.append(
                    Finding(
                        path=name,
                        kind=kind,
                        problem=problem,
                        split=split.name,
                        shard=shards[0],
                        last_shard=shards[-1] if len(shards) > 1 else None,
                        first_row=split.record.rows_of(shards[0]).start,
                        last_row=split.record.rows_of(shards[-1]).stop - 1,
                    )
                )
            done += len(shards)
            if on_shard is not None:
                on_shard(done, total)
        if cache.is_complete and not quick:
            named = {finding.path for finding in findings}
            findings += [
                Finding(path=path, kind="damaged", problem=problem, split=split.name)
                for path, problem in _array_problems(split)
                if path not in named
            ]
    return findings


def _file_problems(cache: Cache) -> Iterator[_Problem]:
    """Checks the files that belong to no shard."""
    manifest = cache.manifest
    if not manifest.is_complete:
        left = {s.name: gaps(s.record.num_shards, s.committed()) for s in cache.values()}
        count = sum(map(len, chain.from_iterable(left.values())))
        problem = f"encoding has not finished: {count} shards are not committed"
        yield MANIFEST, "unfinished", problem + (f" ({named_ranges(left)})" if count else "")
    else:
        listed = {file.path for file in manifest.files}
        for path in sorted(_finalised_paths(cache) - listed):
            yield path, "missing", f"{MANIFEST} does not list it"
    for file in (manifest.plan, manifest.encoder, *manifest.files):
        found = file_problem(cache.path, file, max_read_bytes=math.inf)
        if found is not None:
            yield file.path, *found


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


def _foreign_files(cache: Cache, files: Collection[str]) -> Iterator[_Problem]:
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
            yield shown, "foreign", "no record lists this file"


def _visits(split: Split, traces: Collection[tuple[str, int]]) -> Iterator[range]:
    """Yields all shards of a split: one by one those that left a trace, the others in ranges."""
    total = split.record.num_shards
    numbers = sorted(shard for name, shard in traces if name == split.name and shard < total)
    rest = gaps(total, numbers)
    yield from sorted([*rest, *(range(n, n + 1) for n in numbers)], key=lambda shards: shards[0])


def _shard_problems(
    split: Split, shards: range, digests: Mapping[str, str], max_read_bytes: float
) -> Iterator[_Problem]:
    """Checks a shard, or a range of which nothing is there; one not yet encoded has no problem."""
    cache, shard = split.cache, shards[0]
    path = commit_path(split.name, shard)
    if len(shards) > 1:
        if cache.is_complete:
            text = f"{len(shards)} shards, {shard} to {shards[-1]}, have no commit record"
            yield path, "missing", f"{text} and no files"
        return
    try:
        commit = split.read_commit(shard)
    except IntegrityError as error:
        yield path, "damaged", str(error)
        yield from _unvouched(split, shard, digests, max_read_bytes)
        return
    if commit is None:
        if cache.is_complete:
            yield path, "missing", "the shard has no commit record"
            yield from _unvouched(split, shard, digests, max_read_bytes)
        return
    problem = record_problem(cache.manifest, commit)
    if problem is None and path in digests and sha256_file(cache.path / path) != digests[path]:
        problem = f"it is intact, but not the one that {CHECKSUMS} lists"
    if problem is not None:
        yield path, "damaged", problem
        return
    problems: list[_Problem] = [
        (file.path, *found)
        for file in commit.files
        if (found := file_problem(cache.path, file, max_read_bytes=max_read_bytes)) is not None
    ]
    yield from problems or _content_problems(split, commit, quick=max_read_bytes < math.inf)


def _unvouched(
    split: Split, shard: int, digests: Mapping[str, str], max_read_bytes: float
) -> Iterator[_Problem]:
    """Checks the files of a shard whose commit record is lost, as far as other records allow."""
    for path in shard_files(split.layout, split.name, shard)[:-1]:
        file = split.cache.path / path
        size = file.stat().st_size if file.is_file() else 0
        record = FileRecord(path=path, bytes=size, sha256=digests.get(path, ""))
        found = file_problem(split.cache.path, record, max_read_bytes=max_read_bytes)
        if found is not None and (found[0] == "missing" or path in digests):
            yield path, *found


def _content_problems(split: Split, commit: CommitRecord, *, quick: bool) -> Iterator[_Problem]:
    """Checks the files of a shard, which have the committed sizes, against each other.

    Quick: each file's own index, which differs between shards of one size. Full: also every
    latent's checksums, and every tar against the one that index and latents make.
    """
    first, *others = data_paths(split.layout, split.name, commit.shard)
    for path in (first, *others):
        try:
            split.open_tar(commit.shard) if path in others else split.open_shard(commit.shard)
        except IntegrityError as error:
            yield path, "damaged", str(error)
            return
    if quick:
        return
    problems = list(_latent_problems(split, commit))
    for text in problems:
        yield first, "damaged", text
    if split.layout.has_tar and not problems:
        problem = _tar_problem(split, commit)
        if problem is not None:
            yield tar_path(split.name, commit.shard), "damaged", problem


def _latent_problems(split: Split, commit: CommitRecord) -> Iterator[str]:
    """Decodes every chunk of a shard and holds it against the index."""
    try:
        index = split.read_index(commit.shard)
        file = split.open_shard(commit.shard)
    except IntegrityError as error:
        yield str(error)
        return
    rows, views = split.record.rows_of(commit.shard), split.num_views
    if index["row"].to_pylist() != list(rows):
        yield "the index does not list its rows one after another"
        return
    if set(index["split"].to_pylist()) != {split.name}:
        yield "the index is that of another split"
    good = np.array([status == "ok" for status in index["status"].to_pylist()], np.bool_)
    stored = file.stored.reshape(split.record.shard_rows, views)
    if not np.array_equal(stored[: len(rows)], np.repeat(good[:, None], views, 1)):
        yield "the chunks that are stored are not those of the rows that the index calls ok"
    out = np.empty(split.latent.num_bytes, np.uint8)
    checksums = index["latent_crc32c"].to_pylist()
    for offset in np.flatnonzero(good).tolist():
        if len(checksums[offset] or ()) != views:
            yield f"row {rows[offset]} has not one checksum per view in the index"
            continue
        for view in range(views):
            try:
                file.read_into(offset * views + view, out)
            except IntegrityError as error:
                yield str(error)
                continue
            if google_crc32c.value(out.tobytes()) != checksums[offset][view]:
                yield f"row {rows[offset]} view {view} is not the latent that the index speaks of"


def _tar_problem(split: Split, commit: CommitRecord) -> str | None:
    """Holds an intact tar against the one that the index and the latents make."""
    file = split.open_shard(commit.shard)

    def raw(row: int, view: int) -> bytes:
        out = np.empty(split.latent.num_bytes, np.uint8)
        file.read_into((row - commit.first_row) * split.num_views + view, out)
        return out.tobytes()

    digest, size = hashlib.sha256(), 0
    try:
        rows = index_rows(split.read_index(commit.shard))
        for piece in pack_tar(rows, split.latent, split.num_views, raw):
            digest.update(piece)
            size += len(piece)
    except IntegrityError as error:
        return str(error)
    committed = commit.file(tar_path(split.name, commit.shard))
    if (size, digest.hexdigest()) != (committed.bytes, committed.sha256):
        return "it is not what the index and the latents make"
    return None


def _array_problems(split: Split) -> Iterator[tuple[str, str]]:
    """Decodes labels and valid, and holds them against the index parts that can be read."""
    for name, column in zip(_ARRAYS, ("label", "status"), strict=True):
        path = f"{array_path(split.name, name)}/c.0"
        try:
            array = split.labels if name == "labels" else split.valid
        except IntegrityError as error:
            yield path, str(error)
            continue
        wrong = []
        for shard in split.committed():
            try:
                values = split.read_index(shard, [column])[column]
            except IntegrityError:
                # Named with its shard.
                continue
            rows = split.record.rows_of(shard)
            wanted = values if name == "labels" else pc.equal(values, "ok")
            if not np.array_equal(array[rows.start : rows.stop], wanted.to_numpy()):
                wrong.append(shard)
        if wrong:
            names = named_ranges({split.name: [range(shard, shard + 1) for shard in wrong]})
            yield path, f"it is not what the index says (shards {names})"
