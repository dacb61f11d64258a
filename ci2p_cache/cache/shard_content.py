"""What is wrong inside a shard whose files have the sizes and digests that were committed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import google_crc32c
import numpy as np

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import index_rows
from ci2p_cache.cache.paths import data_paths, tar_path
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.tar_shards import pack_tar
from ci2p_cache.errors import IntegrityError

__all__ = ["shard_problems"]


def shard_problems(split: Split, commit: CommitRecord, *, quick: bool) -> Iterator[tuple[str, str]]:
    """Checks the files of a shard against each other.

    Quick: each file's own index, which tells shards of one size apart. Full: also every latent's
    checksums, and every tar against the one that index and latents make.

    Args:
        split: The split.
        commit: The shard's commit record.
        quick: Leave the latents unread.

    Yields:
        The path of a file and what is wrong with it.
    """
    first, *others = data_paths(split.layout, split.name, commit.shard)
    for path in (first, *others):
        try:
            split.open_tar(commit.shard) if path in others else split.open_shard(commit.shard)
        except IntegrityError as error:
            yield path, str(error)
            return
    if quick:
        return
    problems = list(_latent_problems(split, commit))
    yield from ((first, text) for text in problems)
    if split.layout.has_tar and not problems:
        yield from _tar_problems(split, commit)


def _latent_problems(split: Split, commit: CommitRecord) -> Iterator[str]:
    """Decodes every chunk of a shard and holds it against the index."""
    try:
        index = split.read_index(commit.shard)
        file = split.open_shard(commit.shard)
    except IntegrityError as error:
        yield str(error)
        return
    rows = split.record.rows_of(commit.shard)
    if index["row"].to_pylist() != list(rows):
        yield "the index does not list its rows one after another"
        return
    if set(index["split"].to_pylist()) != {split.name}:
        yield "the index is that of another split"
    good = np.array([status == "ok" for status in index["status"].to_pylist()], np.bool_)
    stored = file.stored.reshape(split.record.shard_rows, split.num_views)
    if not np.array_equal(stored[: len(rows)], np.repeat(good[:, None], split.num_views, 1)):
        yield "the chunks that are stored are not those of the rows that the index calls ok"
    out = np.empty(split.latent.num_bytes, np.uint8)
    checksums = index["latent_crc32c"].to_pylist()
    for offset in np.flatnonzero(good).tolist():
        if len(checksums[offset] or ()) != split.num_views:
            yield f"row {rows[offset]} has not one checksum per view in the index"
            continue
        for view in range(split.num_views):
            try:
                file.read_into(offset * split.num_views + view, out)
            except IntegrityError as error:
                yield str(error)
                continue
            if google_crc32c.value(out.tobytes()) != checksums[offset][view]:
                yield f"row {rows[offset]} view {view} is not the latent that the index speaks of"


def _tar_problems(split: Split, commit: CommitRecord) -> Iterator[tuple[str, str]]:
    """Holds an intact tar against the one that the index and the latents make."""
    file = split.open_shard(commit.shard)
    first = split.record.rows_of(commit.shard).start

    def raw(row: int, view: int) -> bytes:
        out = np.empty(split.latent.num_bytes, np.uint8)
        file.read_into((row - first) * split.num_views + view, out)
        return out.tobytes()

    path, digest, size = tar_path(split.name, commit.shard), hashlib.sha256(), 0
    try:
        rows = index_rows(split.read_index(commit.shard))
        for piece in pack_tar(rows, split.latent, split.num_views, raw):
            digest.update(piece)
            size += len(piece)
    except IntegrityError as error:
        yield path, str(error)
        return
    committed = next(each for each in commit.files if each.path == path)
    if (size, digest.hexdigest()) != (committed.bytes, committed.sha256):
        yield path, "it is not what the index and the latents make"
