"""`verify`: holds every byte of a cache against what was committed, and says what is wrong.

Findings are values: a damaged cache is an answer here, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ci2p_cache.cache.commit import CommitRecord, FileRecord, sha256_file
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.store import Cache, Split, open_cache
from ci2p_cache.errors import IntegrityError
from ci2p_cache.record import Record

__all__ = ["Finding", "verify"]

_SMALL_BYTES = 4 * 2**20
"""Files up to this size have their digest checked even by a quick verify."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(Record):
    """One thing that is wrong."""

    path: str
    """The file it is about, relative to the cache folder."""
    problem: str
    """What is wrong with it."""
    split: str | None = None
    """The split that loses rows by it, if one does."""
    shard: int | None = None
    """The shard."""
    first_row: int | None = None
    """First row of the shard."""
    last_row: int | None = None
    """Last row of the shard."""


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Checks a cache.

    Full: the sha256 of every file; every chunk's checksum, decoded, and its crc32c against the
    index; labels, valid and rows of the arrays against the index. Quick: commit records, sizes, and
    digests of small files; the latents themselves are not read.

    Args:
        path: The cache folder; one that is still being encoded is checked as far as it goes.
        quick: Leave the latents unread.
        on_shard: Called with (shards checked, shards in all).

    Returns:
        What is wrong; empty for an intact cache.

    Raises:
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` itself is damaged: nothing can be held against it.
    """
    cache = open_cache(path, partial=True)
    findings = list(_check_files(cache))
    total = sum(split.record.num_shards for split in cache.values())
    done = 0
    for split in cache.values():
        for shard in range(split.record.num_shards):
            findings += _check_shard(split, shard, quick=quick)
            done += 1
            if on_shard is not None:
                on_shard(done, total)
    return findings


def _check_files(cache: Cache) -> Iterator[Finding]:
    """Checks the files that belong to no shard."""
    manifest = cache.manifest
    if not manifest.is_complete:
        yield Finding(path="cache.json", problem="encoding has not finished")
    for file in (manifest.plan, manifest.encoder, *manifest.files):
        problem = _file_problem(cache.path, file, quick=False)
        if problem is not None:
            yield Finding(path=file.path, problem=problem)


def _file_problem(root: Path, file: FileRecord, *, quick: bool) -> str | None:
    """Says what is wrong with one file, None where nothing is."""
    path = root / file.path
    if path.is_symlink() or not path.is_file():
        return "it is missing" if not path.exists() else "it is no regular file"
    size = path.stat().st_size
    if size != file.bytes:
        return f"it has {size} bytes, {file.bytes} were committed"
    if quick and size > _SMALL_BYTES:
        return None
    try:
        digest = sha256_file(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if digest != file.sha256:
        return f"its sha256 is {digest[:12]}..., {file.sha256[:12]}... was committed"
    return None


def _check_shard(split: Split, shard: int, *, quick: bool) -> list[Finding]:
    rows = split.record.rows_of(shard)

    def finding(path: str, problem: str) -> Finding:
        return Finding(
            path=path,
            problem=problem,
            split=split.name,
            shard=shard,
            first_row=rows.start,
            last_row=rows.stop - 1,
        )

    record_path = f"commits/{split.name}-{shard:06d}.json"
    try:
        commit = split.read_commit(shard)
    except IntegrityError as error:
        return [finding(record_path, str(error))]
    if commit is None:
        if not split.cache.is_complete:
            return []
        return [finding(record_path, "the shard has no commit record")]
    if (commit.first_row, commit.rows) != (rows.start, len(rows)):
        return [finding(record_path, f"it speaks of {commit.rows} rows from {commit.first_row}")]
    if commit.fingerprint != split.cache.fingerprint.digest:
        return [finding(record_path, "it has another fingerprint than cache.json")]
    problems = [
        finding(file.path, problem)
        for file in commit.files
        if (problem := _file_problem(split.cache.path, file, quick=quick)) is not None
    ]
    if problems or quick:
        return problems
    shard_file = commit.files[0].path
    return [finding(shard_file, problem) for problem in _content_problems(split, commit)]


def _content_problems(split: Split, commit: CommitRecord) -> Iterator[str]:
    """Decodes every chunk of a shard and holds it and the small arrays against the index."""
    try:
        index = read_index(split.cache.path, split.name, commit.shard)
        file = split.open_shard(commit.shard)
    except IntegrityError as error:
        yield str(error)
        return
    rows = split.record.rows_of(commit.shard)
    if index["row"].to_pylist() != list(rows):
        yield "the index does not list its rows one after another"
        return
    good = np.array([status == "ok" for status in index["status"].to_pylist()], np.bool_)
    stored = file.stored.reshape(split.record.shard_rows, split.num_views)
    if not np.array_equal(stored[: len(rows)], np.repeat(good[:, None], split.num_views, 1)):
        yield "the chunks that are stored are not those of the rows that the index calls ok"
    yield from _small_array_problems(split, index, rows, good)
    out = np.empty(split.latent.num_bytes, np.uint8)
    checksums = index["latent_crc32c"].to_pylist()
    for offset in np.flatnonzero(good).tolist():
        for view in range(split.num_views):
            try:
                file.read_into(offset * split.num_views + view, out)
            except IntegrityError as error:
                yield str(error)
                continue
            if google_crc32c.value(out.tobytes()) != checksums[offset][view]:
                yield f"row {rows[offset]} view {view} is not the latent that the index speaks of"


def _small_array_problems(
    split: Split, index: pa.Table, rows: range, good: npt.NDArray[np.bool_]
) -> Iterator[str]:
    if not split.cache.is_complete:
        return
    part = slice(rows.start, rows.stop)
    try:
        labels, valid = split.labels[part], split.valid[part]
    except IntegrityError as error:
        yield str(error)
        return
    if labels.tolist() != index["label"].to_pylist():
        yield "the labels array and the index disagree"
    if not np.array_equal(valid, good):
        yield "the valid array and the index disagree"
