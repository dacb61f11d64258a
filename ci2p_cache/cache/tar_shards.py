"""Shards as WebDataset tars: written byte for byte the same each time, read by position.

::

    000000123.latent.npy   (V, M, h, w), raw values, little-endian, numpy's format version 1.0
    000000123.cls          the label as decimal text; -1 where it is not known
    000000123.json         what the sample is: row, key, label, class, width, height, boxes, crc32c

One such triple for each valid row, in row order; the name is the row, in nine digits, so that no
key can be no file name. Headers are ustar (POSIX.1-1988) with owner 0, time 0 and mode 644, and two
empty blocks end the file. A tar has no checksum over its content (45 % of bit flips are read
silently by others): the index part has the crc32c of each latent, which every read is held against,
and its place, so that a read is one `pread`.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.commit import CommitRecord, sha256_file
from ci2p_cache.cache.index import IndexRow, read_index
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import index_path, tar_path
from ci2p_cache.cache.shard_reader import MISSING, ShardIndex, ShardReader
from ci2p_cache.errors import ManifestError, ShardError
from ci2p_cache.specs import LatentSpec

__all__ = [
    "TarFile",
    "npy_header",
    "open_tar",
    "pack_tar",
    "tar_index_crc32c",
    "tar_offsets",
    "tar_sample_bytes",
]

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_ALIGN = 64
_TYPICAL_JSON_BYTES = 512
_ROW_DIGITS = 9

RawOf = Callable[[int, int], bytes | memoryview]
"""(row, view) -> the raw stored values of one latent."""


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """Returns what comes before the values of an array in numpy's format 1.0, in C order.

    Args:
        dtype: int8, int16, float16 or float32; the values are little-endian.
        shape: The array's shape.
    """
    kind = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    before = len(_NPY_MAGIC) + 2
    length = -(-(before + len(text) + 1) // _NPY_ALIGN) * _NPY_ALIGN - before
    return _NPY_MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def tar_offsets(
    rows: Sequence[IndexRow], latent: LatentSpec, num_views: int
) -> dict[int, list[int]]:
    """Returns where the raw values of each view begin in the tar of a shard, by valid row.

    Args:
        rows: All rows of the shard, in order, with their checksums.
        latent: The shape and dtype of one latent.
        num_views: Views per sample.
    """
    found, position = {}, 0
    for row in rows:
        if row.status != "ok":
            continue
        before, after = _frame(row, latent, num_views)
        start = position + len(before)
        found[row.row] = [start + view * latent.num_bytes for view in range(num_views)]
        position = start + num_views * latent.num_bytes + len(after)
    return found


def pack_tar(
    rows: Sequence[IndexRow], latent: LatentSpec, num_views: int, raw_of: RawOf
) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a shard's tar piece by piece.

    Args:
        rows: All rows of the shard, in order, with their checksums.
        latent: The shape and dtype of one latent.
        num_views: Views per sample.
        raw_of: Gives the raw values of a valid row's view.
    """
    for row in rows:
        if row.status == "ok":
            before, after = _frame(row, latent, num_views)
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


def tar_index_crc32c(
    offsets: dict[int, list[int]], record: SplitRecord, latent: LatentSpec, shard: int
) -> int:
    """Returns the checksum over where the latents are, as a zarr shard's index would have it."""
    first = record.rows_of(shard).start
    entries = np.full((record.shard_rows, record.views, 2), MISSING, "<u8")
    for row, places in offsets.items():
        entries[row - first, :, 0] = places
        entries[row - first, :, 1] = latent.num_bytes
    return int(google_crc32c.value(entries.tobytes()))


class TarFile(ShardReader):
    """One tar opened for reading by position; every read is held against its crc32c.

    Args:
        path: The tar.
        file_bytes: Its size as committed.
        entries: Offset and size of each latent, little-endian uint64 (num_chunks, 2).
        checksums: crc32c of each latent, uint32 (num_chunks,); anything where none is stored.
        identity: Which file it was when it was open before; None where it was not.

    Raises:
        ShardError: the tar is missing, has another size, is not the file it was, or `entries` lead
            out of it.
    """

    def __init__(
        self,
        path: Path,
        *,
        file_bytes: int,
        entries: npt.NDArray[Any],
        checksums: npt.NDArray[np.uint32],
        identity: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(path, file_bytes=file_bytes)
        if identity is not None:
            if identity != self.identity:
                raise ShardError(f"{path} has been replaced")
        else:
            stored = entries[entries[:, 0] != MISSING]
            if np.any(stored[:, 0] > file_bytes) or np.any(stored.sum(axis=1) > file_bytes):
                raise ShardError(f"{path}: its index part points outside the file")
        self._checksums = memoryview(checksums.data)
        crc = google_crc32c.value(entries.tobytes())
        self._set_index(ShardIndex(entries, int(crc), file_bytes, self.identity))

    @property
    def known_bytes(self) -> int:
        """Memory that `reopener` keeps of the file."""
        return int(self.index.entries.nbytes + self._checksums.nbytes)

    def reopener(self) -> Callable[[], ShardReader]:
        """Returns what opens the tar again for as long as it is the same file."""
        return partial(
            TarFile,
            self.path,
            file_bytes=self.index.file_bytes,
            entries=self.index.entries,
            checksums=np.asarray(self._checksums),
            identity=self.identity,
        )

    def read_into(self, chunk: int, out: npt.NDArray[Any]) -> None:
        """Reads one latent into `out`, uint8 (chunk_bytes,), and verifies it.

        Raises:
            ShardError: it is not stored, its checksum is wrong, or reading failed.
        """
        stored = self._stored(chunk)
        if google_crc32c.value(stored) != self._checksums[chunk]:
            raise ShardError(f"{self.path}: chunk {chunk} is damaged: crc32c is wrong")
        out[:] = np.frombuffer(stored, np.uint8)


def open_tar(root: Path, record: SplitRecord, latent: LatentSpec, commit: CommitRecord) -> TarFile:
    """Opens the tar of a committed shard, by the places and checksums of its index part.

    The index part is held against its committed digest, and the first and the last latent against
    their checksums, which tells tars of one size apart.

    Args:
        root: The cache folder.
        record: The shape of the split.
        latent: The shape and dtype of one latent.
        commit: The shard's commit record.

    Raises:
        ShardError: the tar or its index part is missing, damaged or not the one committed.
    """
    files = {file.path: file for file in commit.files}
    path, index = (of(commit.split, commit.shard) for of in (tar_path, index_path))
    for each in (path, index):
        if each not in files:
            raise ShardError(f"its commit record does not list {each}")
    try:
        digest = sha256_file(root / index)
    except OSError as error:
        raise ShardError(f"{root / index} cannot be read: {error.strerror}") from error
    except ManifestError as error:
        raise ShardError(str(error)) from error
    if digest != files[index].sha256:
        raise ShardError(f"{root / index} is not the index part that was committed")
    table = read_index(root, commit.split, commit.shard, ["latent_crc32c", "tar_offset"])
    entries, checksums = _places(root / index, table, record, latent)
    opened = TarFile(
        root / path, file_bytes=files[path].bytes, entries=entries, checksums=checksums
    )
    ends = np.flatnonzero(opened.stored)
    out = np.empty(latent.num_bytes, np.uint8)
    for chunk in {int(ends[0]), int(ends[-1])} if ends.size else ():
        opened.read_into(chunk, out)
    return opened


def _places(
    path: Path, table: pa.Table, record: SplitRecord, latent: LatentSpec
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
    """Returns offset and size, and crc32c, of each latent of a shard, in C order."""
    offsets, checksums = (table[name].combine_chunks() for name in ("tar_offset", "latent_crc32c"))
    stored = np.asarray(pc.is_valid(offsets))
    lengths = [
        pc.list_value_length(column).drop_null().to_numpy() for column in (offsets, checksums)
    ]
    if table.num_rows > record.shard_rows or any(
        len(each) != stored.sum() or np.any(each != record.views) for each in lengths
    ):
        raise ShardError(f"{path} has not one place and checksum for each view of each valid row")
    entries = np.full((record.shard_rows, record.views, 2), MISSING, "<u8")
    found = np.zeros((record.shard_rows, record.views), np.uint32)
    rows = np.flatnonzero(stored)
    places = pc.list_flatten(offsets).to_numpy(zero_copy_only=False).reshape(-1, record.views)
    if np.any(places < 0):
        raise ShardError(f"{path} has a place before the tar's beginning")
    entries[rows, :, 0] = places
    entries[rows, :, 1] = latent.num_bytes
    flat = pc.list_flatten(checksums).to_numpy(zero_copy_only=False)
    found[rows] = flat.reshape(-1, record.views)
    return entries.reshape(-1, 2), found.reshape(-1)
