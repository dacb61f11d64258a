"""The containers of latents, zarr shards and WebDataset tars: packed, opened, and `put_shard`.

::

    rows, raw latents --> zarr shard, tar (as the layout has it) --> index part --> commit record

A zarr shard is that of zarr's published `sharding_indexed` codec (zarr-specs, v3, "sharding codec"
version 1.0): the inner chunks one after another, then the index of (offset, size) pairs as
little-endian uint64, then the index's crc32c; a missing chunk has both set to 2^64 - 1. Shards are
packed here because zarr-python writes in place by reading first; they are read here because its
indexing reads 1.2 k samples/s where one positioned read and one decoder give 29 k. zarr-python is
the oracle in the tests. In a tar, the same bytes each time, are for each valid row, in row order::

    000000123.latent.npy   (V, M, h, w), raw values, little-endian, numpy's format version 1.0
    000000123.cls          the label as decimal text; -1 where it is not known
    000000123.json         what the sample is: row, key, label, class, width, height, boxes, crc32c

The name is the row, in nine digits, so that no key can be no file name. Headers are ustar
(POSIX.1-1988) with owner 0, time 0 and mode 644, and two empty blocks end the file. A tar has no
checksum over its content (45 % of bit flips are read silently by others): the index part has the
crc32c of each latent, which every read is held against, and its offset, so that a read is
one `pread`.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.codecs import CRC_BYTES, ChunkCodec
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import ChannelSums, IndexRow, index_bytes, read_index, require_intact
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import index_path, shard_path, tar_path
from ci2p_cache.cache.shard_reader import MISSING, ShardReader
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.errors import ShardError
from ci2p_cache.specs import LatentSpec, LayoutSpec

__all__ = [
    "index_crc32c", "npy_header", "open_tar", "open_zarr", "pack_shard", "pack_tar", "put_shard",
    "tar_sample_bytes",
]  # fmt: skip

_MAX_CHUNKS = 2**22
"""Of one shard: a 64 MiB index. Ours have 128 MiB of latents of at least 768 bytes: 2**18."""

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_ALIGN = 64
_TYPICAL_JSON_BYTES = 512
_ROW_DIGITS = 9

RawOf = Callable[[int, int], bytes | memoryview]
"""(row, view) -> the raw stored values of one latent."""


def put_shard(
    staging: StagingArea,
    record: Callable[..., CommitRecord],
    *,
    shard_id: tuple[str, int],
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
        shard_id: Split and number of the shard.
        layout: Which containers to write.
        shape: The shape of the split.
        latent: The shape and dtype of one latent.
        rows: Its rows in order, complete but for `tar_offset`, which is set here.
        sums: Its channel sums.
        chunks: Encoded chunks in C order, None for one that is not stored; unused without zarr.
        raw: (row, view) -> raw stored values of every valid row; unused without tars.

    Raises:
        ResourceError: writing failed.
    """
    split, shard = shard_id
    files, index_crc = [], 0
    for row in rows:
        row.tar_offset = None
    if layout.has_zarr:
        pieces = list(pack_shard(chunks))
        index_crc = index_crc32c(pieces[-1])
        files.append(staging.put(shard_path(*shard_id), pieces))
    if layout.has_tar:
        packed = pack_tar(rows, latent, shape.views, lambda row, view: raw[row, view])
        files.append(staging.put(tar_path(*shard_id), packed))
        if not layout.has_zarr:
            index_crc = tar_index_crc32c(rows, shape, latent)
    index = index_bytes(rows, sums, split=split if shape.names_split else None)
    files.append(staging.put(index_path(*shard_id), index))
    made = record(split=split, shard=shard, files=tuple(files), index_crc32c=index_crc)
    staging.commit(made)
    return made


def pack_shard(chunks: Sequence[bytes | None]) -> Iterator[bytes]:
    """Yields the bytes of a shard with these inner chunks (None: not stored), the index last."""
    entries = np.full((len(chunks), 2), MISSING, "<u8")
    position = 0
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            entries[number] = position, len(chunk)
            position += len(chunk)
            yield chunk
    index = entries.tobytes()
    yield index + struct.pack("<I", google_crc32c.value(index))


def index_crc32c(last_part: bytes) -> int:
    """Returns the index's checksum from the last piece that `pack_shard` yields."""
    return int(struct.unpack("<I", last_part[-CRC_BYTES:])[0])


def open_zarr(
    path: Path, *, num_chunks: int, codec: ChunkCodec, file_bytes: int, index_crc: int
) -> ShardReader:
    """Opens one zarr shard for reading.

    Args:
        path: The shard's file.
        num_chunks: Number of inner chunks, stored or not.
        codec: The codec of its chunks.
        file_bytes: Size of the file as committed.
        index_crc: crc32c of its index as committed; swapped shards differ in it.

    Raises:
        ShardError: the file is missing, has another size, or its index is damaged.
    """
    if num_chunks > _MAX_CHUNKS:
        raise ShardError(f"{path}: a shard of {num_chunks} chunks; at most {_MAX_CHUNKS} fit")
    file = ShardReader(path, file_bytes=file_bytes, codec=codec)
    index_bytes = 16 * num_chunks
    start = file_bytes - index_bytes - CRC_BYTES
    tail = file.read(index_bytes + CRC_BYTES, start) if start >= 0 else b""
    if len(tail) != index_bytes + CRC_BYTES:
        raise ShardError(f"{path} is too short for an index of {num_chunks} chunks")
    stored_crc = index_crc32c(tail)
    if google_crc32c.value(tail[:index_bytes]) != stored_crc:
        raise ShardError(f"{path}: the checksum of its index is wrong")
    if stored_crc != index_crc:
        raise ShardError(f"{path} is intact but is not the shard that was committed here")
    entries = np.frombuffer(tail, "<u8", 2 * num_chunks).reshape(num_chunks, 2)
    problem = _index_problem(entries, start, codec.max_stored_bytes)
    if problem is not None:
        raise ShardError(f"{path}: its index {problem}")
    file.set_index(entries)
    return file


def _index_problem(entries: npt.NDArray[Any], end: int, max_bytes: int) -> str | None:
    """Says why an index cannot be that of chunks before `end`; None where it can."""
    offsets, sizes = entries[:, 0], entries[:, 1]
    missing = (offsets == MISSING) & (sizes == MISSING)
    inside = (offsets <= end) & (sizes <= end) & (offsets + sizes <= end)
    if not np.all(missing | inside):
        return "points outside the file"
    if np.any(sizes[~missing] > max_bytes):
        return "has chunks that are larger than raw ones"
    order = np.argsort(offsets[~missing], kind="stable")
    starts, lengths = offsets[~missing][order], sizes[~missing][order]
    if np.any(starts[:-1] + lengths[:-1] > starts[1:]):
        return "has chunks that overlap"
    return None


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """Returns what comes before an array's values, little-endian, in numpy's format 1.0."""
    kind = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    before = len(_NPY_MAGIC) + 2
    length = -(-(before + len(text) + 1) // _NPY_ALIGN) * _NPY_ALIGN - before
    return _NPY_MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def pack_tar(
    rows: Sequence[IndexRow], latent: LatentSpec, num_views: int, raw_of: RawOf
) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a shard's tar piece by piece, and sets `tar_offset` of its valid rows.

    Args:
        rows: All rows of the shard, in order, with their checksums.
        latent: The shape and dtype of one latent.
        num_views: Views per sample.
        raw_of: Gives the raw values of a valid row's view.
    """
    position = 0
    for row in rows:
        if row.status == "ok":
            before, after = _frame(row, latent, num_views)
            position += len(before)
            row.tar_offset = [position + view * latent.num_bytes for view in range(num_views)]
            position += num_views * latent.num_bytes + len(after)
            yield before
            for view in range(num_views):
                yield raw_of(row.row, view)
            yield after
    yield _END


def _frame(row: IndexRow, latent: LatentSpec, num_views: int) -> tuple[bytes, bytes]:
    """Returns what comes before and after a sample's raw values."""
    name = f"{row.row:0{_ROW_DIGITS}d}"
    npy = npy_header(latent.dtype, (num_views, *latent.shape))
    size = len(npy) + num_views * latent.num_bytes
    described = {
        "row": row.row,
        "key": row.key,
        "label": row.label,
        "class": row.class_name,
        "width": row.width,
        "height": row.height,
        "boxes": row.boxes,
        "latent_crc32c": row.latent_crc32c,
    }
    after = [bytes(-size % _BLOCK)]
    for end, data in ((".cls", str(row.label)), (".json", json.dumps(described))):
        content = data.encode()
        after += [_header(name + end, len(content)), content, bytes(-len(content) % _BLOCK)]
    return _header(f"{name}.latent.npy", size) + npy, b"".join(after)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def tar_sample_bytes(latent: LatentSpec, num_views: int) -> int:
    """Returns about what a sample takes in a tar; its JSON is longer where its key is."""
    data = num_views * latent.num_bytes + len(npy_header(latent.dtype, (num_views, *latent.shape)))
    return 3 * _BLOCK + data + -data % _BLOCK + _BLOCK + _TYPICAL_JSON_BYTES


def tar_index_crc32c(rows: Sequence[IndexRow], record: SplitRecord, latent: LatentSpec) -> int:
    """Returns the checksum over where the latents are, as a zarr shard's index would have it."""
    stored = [at for at, row in enumerate(rows) if row.tar_offset is not None]
    offsets = np.array([rows[at].tar_offset for at in stored], np.uint64)
    return int(google_crc32c.value(_entries(stored, offsets, record, latent).tobytes()))


def _entries(
    stored: Sequence[int] | npt.NDArray[Any],
    offsets: npt.NDArray[Any],
    record: SplitRecord,
    latent: LatentSpec,
) -> npt.NDArray[Any]:
    """Returns offset and size of each latent of a shard in C order, MISSING where there is none."""
    entries = np.full((record.shard_rows, record.views, 2), MISSING, "<u8")
    entries[stored, :, 0] = offsets.reshape(-1, record.views)
    entries[stored, :, 1] = latent.num_bytes
    return entries.reshape(-1, 2)


def open_tar(
    root: Path, record: SplitRecord, latent: LatentSpec, commit: CommitRecord
) -> ShardReader:
    """Opens the tar of a committed shard, by the offsets and checksums of its index part.

    The index part is held against its committed digest, and the first and the last latent against
    their checksums, which differ between tars of one size.

    Raises:
        ShardError: the tar or its index part is missing, damaged or not the one committed.
    """
    path, index = (of(commit.split, commit.shard) for of in (tar_path, index_path))
    require_intact(root, commit)
    table = read_index(root, commit.split, commit.shard, ["latent_crc32c", "tar_offset"])
    entries, checksums = _offsets(root / index, table, record, latent)
    opened = ShardReader(root / path, file_bytes=commit.file(path).bytes, codec=None)
    stored = entries[entries[:, 0] != MISSING]
    if np.any(stored[:, 0] > opened.file_bytes) or np.any(stored.sum(axis=1) > opened.file_bytes):
        raise ShardError(f"{root / path}: its index part points outside the file")
    opened.set_index(entries, checksums)
    ends = np.flatnonzero(opened.stored)
    out = np.empty(latent.num_bytes, np.uint8)
    for chunk in {int(ends[0]), int(ends[-1])} if ends.size else ():
        opened.read_into(chunk, out)
    return opened


def _offsets(
    path: Path, table: pa.Table, record: SplitRecord, latent: LatentSpec
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
    """Returns offset and size, and crc32c, of each latent of a shard, in C order."""
    offsets, checksums = (table[name].combine_chunks() for name in ("tar_offset", "latent_crc32c"))
    rows = np.flatnonzero(np.asarray(pc.is_valid(offsets)))
    lengths = [
        pc.list_value_length(column).drop_null().to_numpy() for column in (offsets, checksums)
    ]
    if table.num_rows > record.shard_rows or any(
        len(each) != len(rows) or np.any(each != record.views) for each in lengths
    ):
        raise ShardError(f"{path} has not one offset and checksum for each view of each valid row")
    offsets, flat = (
        pc.list_flatten(column).to_numpy(zero_copy_only=False) for column in (offsets, checksums)
    )
    if np.any(offsets < 0):
        raise ShardError(f"{path} has an offset before the tar's beginning")
    found = np.zeros((record.shard_rows, record.views), np.uint32)
    found[rows] = flat.reshape(-1, record.views)
    return _entries(rows, offsets, record, latent), found.reshape(-1)
