"""`put_shard`: writes the files of one shard in the containers of its layout, and commits it.

::

    rows, raw latents --> zarr shard, tar (as the layout has it) --> index part --> commit record
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import ChannelSums, IndexRow, index_bytes
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import index_path, shard_path, tar_path
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.tar_shards import pack_tar, tar_index_crc32c, tar_offsets
from ci2p_cache.cache.zarr_shards import index_crc32c, pack_shard
from ci2p_cache.specs import LatentSpec, LayoutSpec

__all__ = ["put_shard"]


def put_shard(
    staging: StagingArea,
    record: Callable[..., CommitRecord],
    *,
    place: tuple[str, int],
    layout: LayoutSpec,
    shape: SplitRecord,
    latent: LatentSpec,
    rows: Sequence[IndexRow],
    sums: ChannelSums,
    chunks: Sequence[bytes | None],
    raw: Mapping[tuple[int, int], bytes | memoryview],
) -> CommitRecord:
    """Writes one shard; the same arguments give the same bytes.

    Args:
        staging: Where files are staged.
        record: Makes the commit record, but for `split`, `shard`, `files` and `index_crc32c`, which
            are passed to it.
        place: Split and number of the shard.
        layout: Which containers to write.
        shape: The shape of the split.
        latent: The shape and dtype of one latent.
        rows: Its rows in order, complete but for `tar_offset`, which is set here.
        sums: Its channel sums.
        chunks: Encoded chunks in C order, None for one that is not stored; unused without zarr.
        raw: (row, view) -> raw stored values of every valid row; unused without tars.

    Returns:
        The record, committed.

    Raises:
        ResourceError: writing failed.
    """
    files = []
    offsets = tar_offsets(rows, latent, shape.views) if layout.has_tar else {}
    for row in rows:
        row.tar_offset = offsets.get(row.row)
    index_crc = 0
    if layout.has_zarr:
        pieces = list(pack_shard(chunks))
        index_crc = index_crc32c(pieces[-1])
        files.append(staging.put(shard_path(*place), pieces))
    if layout.has_tar:
        packed = pack_tar(rows, latent, shape.views, lambda row, view: raw[row, view])
        files.append(staging.put(tar_path(*place), packed))
        if not layout.has_zarr:
            index_crc = tar_index_crc32c(offsets, shape, latent, place[1])
    split, shard = place
    index = index_bytes(rows, sums, split=split if shape.names_split else None)
    files.append(staging.put(index_path(*place), index))
    made = record(split=split, shard=shard, files=tuple(files), index_crc32c=index_crc)
    staging.commit(made)
    return made
