"""`Split`: one split of a cache: its shards and arrays as stored, and as Python sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.codecs import CRC_BYTES, FRAMES, codec_of
from ci2p_cache.cache.commit import CommitRecord, listed_commits, read_commit
from ci2p_cache.cache.containers import open_tar, open_zarr
from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import array_path, commit_path, index_path, shard_path, tar_path
from ci2p_cache.cache.shard_reader import OpenShards, RawShards, ShardReader
from ci2p_cache.errors import (
    InvalidRowError,
    ManifestError,
    ShardError,
    UsageError,
    command,
)
from ci2p_cache.specs import LatentSpec, LayoutSpec

if TYPE_CHECKING:
    import zarr
    from torch import Tensor
    from torch.utils.data import ConcatDataset, Dataset

    from ci2p_cache.cache.dataset import SplitDataset

    _Samples = Dataset[tuple[Tensor, int]]
else:
    # torch takes seconds to import, and looking at a cache needs none of it.
    _Samples = object

__all__ = ["Split"]

_MAX_METADATA_BYTES = 2**20
"""Largest zarr.json; ours have a few thousand bytes, mostly offsets."""


class Split(_Samples):
    """One split of a cache; reading is safe from many threads, and from forked processes.

    ::

        y, label = split[3]                # float32 (V, M, h, w), int; -1 is the last row
        y, labels = split[[3, 5]]          # float32 (n, V, M, h, w), int64 (n,); a slice, list,
                                           # array or tensor of rows, or a mask, bool (N,)
        for y, label in split: ...         # every valid row, ascending

    `len(split)` is N. A row whose image could not be decoded keeps its number but holds nothing:
    `valid` is false there, and asking for it raises `InvalidRowError`. A loop over the split leaves
    it out, and so do `split[split.valid]` and `zip(split.valid_rows, split)`.

    It is a map-style dataset for `torch.utils.data.DataLoader`. Where rows are not valid, pass
    `sampler=SubsetRandomSampler(split.valid_rows)` too. A pickle holds the cache's absolute path or
    URL, the split's name, and for a subset a bit per row. It opens the cache again, which must
    still be the same one.

    Args:
        cache: The cache it belongs to; `open_cache` makes both.
        name: Its name.
    """

    def __init__(self, cache: CacheFolder, name: str) -> None:
        manifest = cache.manifest
        self.cache = cache
        self.name = name
        self.record: SplitRecord = manifest.splits[name]
        self.layout: LayoutSpec = manifest.layout
        self.latent: LatentSpec = manifest.fingerprint.latent
        self.scale: float = manifest.scale
        self.offset = np.array(manifest.offset, np.float32)
        self._codec = codec_of(manifest.format_version, self.layout, self.latent)
        self._shards = OpenShards(self.open_shard)
        self._is_subset = False

    def __repr__(self) -> str:
        valid = len(self.valid_rows) if self._is_subset else self.record.valid_rows
        return (
            f"Split({self.name!r} of {str(self.cache.path)!r}, rows={self.num_rows}, "
            f"valid_rows={valid}, shape={self.shape[1:]}, dtype={self.latent.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Nothing that was read, and no open file.
        valid = np.packbits(self.valid).tobytes() if self._is_subset else None
        return _unpickled, (self.cache, self.name, valid)

    def __copy__(self) -> Self:
        # Shares the open files; without this, copying would go by `__reduce__`.
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __len__(self) -> int:
        return self.num_rows

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.cache.classes

    @cached_property
    def targets(self) -> list[int]:
        """`labels` as a list, the name that torchvision's datasets have for it."""
        labels: list[int] = self.labels.tolist()
        return labels

    @cached_property
    def valid_rows(self) -> npt.NDArray[Any]:
        """Rows that hold a latent, ascending, int64; read-only, because loaders go by it."""
        return _valid_rows(self.valid)

    def subset(self, rows: Sequence[int] | npt.NDArray[Any] | Tensor) -> Split:
        """Returns a view of this split that holds some of its valid rows only.

        It reads the same files. Row numbers, `num_rows`, `shape`, `labels` and `latents` stay those
        of the whole split; `valid` and `valid_rows`, which loaders go by, are restricted.

        Args:
            rows: Distinct valid rows in any order, (n,), or a mask, bool (N,), as `split[rows]`
                takes them.

        Raises:
            UsageError: a row is named twice, or is not valid here.
            IndexError, TypeError: as for `split[rows]`.
        """
        wanted = np.sort(self._numbers(rows))
        odd = np.concatenate(
            [np.setdiff1d(wanted, self.valid_rows), wanted[1:][wanted[1:] == wanted[:-1]]]
        )
        if len(odd):
            raise UsageError(
                f"row {odd[0]} cannot be in a subset of split {self.name!r}: it is named twice, or "
                f"is none of its {len(self.valid_rows)} valid rows"
            )
        valid = np.zeros(self.num_rows, np.bool_)
        valid[wanted] = True
        return self._restricted(valid)

    def _restricted(self, valid: npt.NDArray[np.bool_]) -> Split:
        subset = self.__copy__()
        # As if read: cached properties are looked up among the instance's attributes first.
        subset.valid = valid
        subset.valid_rows = _valid_rows(valid)
        subset._is_subset = True
        return subset

    def as_dataset(
        self,
        view: int | Literal["random"] = 0,
        *,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> SplitDataset:
        """Returns the valid rows as a map-style dataset of (latent, label), one view of each.

        Args:
            view: 0 <= view < V; or random: each access draws one with torch's generator, which
                DataLoader seeds anew in each worker and epoch.
            transform: Applied to each latent, float32 (M, h, w).

        Raises:
            UsageError: there is no such view.
        """
        # A module of its own: it imports torch, and who only looks at a cache does not.
        from ci2p_cache.cache.dataset import SplitDataset

        return SplitDataset(self, view, transform)

    @overload
    def __getitem__(
        self, rows: slice | Sequence[int] | npt.NDArray[Any] | Tensor
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, rows: int | np.integer[Any]) -> tuple[Tensor, int]: ...

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor | int]:
        """Returns the dequantised latents and the label of a row, or of many in the order given.

        Args:
            rows: A row, -N <= row < N, where negative ones count from the end. Or many: a slice, a
                list, range, array or tensor (n,) of rows, with repetitions, or a mask, bool (N,). A
                tuple is refused, because arrays take it for one index per axis.

        Returns:
            float32 (V, M, h, w) and an int; of many float32 (n, V, M, h, w) and int64 (n,), also
            where n is 0 or 1. The tensors are new ones on the CPU.

        Raises:
            IndexError: there is no such row, or a mask has not N entries.
            InvalidRowError: one of the rows is not valid.
            TypeError: `rows` is nothing of that kind.
            ShardError: a shard is missing or damaged.
        """
        if isinstance(rows, slice):
            return self._samples(np.arange(*rows.indices(self.num_rows), dtype=np.int64))
        if getattr(rows, "ndim", None) == 0:
            # A number of numpy's or torch's.
            rows = rows.item()
        if not isinstance(rows, int) or isinstance(rows, bool):
            return self._samples(self._numbers(rows))
        if not -self.num_rows <= rows < self.num_rows:
            raise self._no_row(rows)
        y, labels = self._samples(np.array([rows % self.num_rows]))
        return y[0], int(labels[0])

    def __add__(self, other: Dataset[Any]) -> ConcatDataset[Any]:
        """Returns both one after the other, as torch's `ConcatDataset`."""
        from torch.utils.data import ConcatDataset

        return ConcatDataset([self, other])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Returns what `split[row]` gives for each row, read in one call; DataLoader asks for it.

        Raises:
            IndexError, InvalidRowError, ShardError: as for `split[rows]`.
        """
        y, labels = self[rows]
        return list(zip(y, labels.tolist(), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Yields `split[row]` of every valid row, ascending.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        return (self[row] for row in self.valid_rows)

    def __reversed__(self) -> Iterator[tuple[Tensor, int]]:
        """Yields `split[row]` of every valid row, descending."""
        return (self[row] for row in self.valid_rows[::-1])

    # Python would read every row for `x in split`, and compare tensors.
    __contains__ = None

    def _numbers(self, rows: Any) -> npt.NDArray[np.int64]:
        """Returns the rows that a list, array, tensor or mask names, (n,), 0 <= row < N."""
        # Only a tensor's `numpy` takes it from its device and out of autograd.
        found = np.asarray(rows.numpy(force=True) if hasattr(rows, "numpy") else rows)
        if found.ndim and found.dtype == np.bool_:
            if found.shape != (self.num_rows,):
                raise IndexError(
                    f"a mask of shape {found.shape} for the {self.num_rows} rows of split "
                    f"{self.name!r}"
                )
            return np.flatnonzero(found).astype(np.int64)
        if not found.size:
            # numpy takes an empty list for floats.
            found = found.astype(np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu" or isinstance(rows, tuple):
            raise TypeError(
                f"split {self.name!r} takes a row, or a slice, list, array or tensor of rows, or a "
                f"mask; got {type(rows).__name__} of {found.dtype}, shape {found.shape}"
            )
        outside = found[(found < -self.num_rows) | (found >= self.num_rows)]
        if len(outside):
            raise self._no_row(int(outside[0]))
        return found.astype(np.int64) % max(1, self.num_rows)

    def _no_row(self, row: int) -> IndexError:
        return IndexError(f"row {row} of {self.num_rows} in split {self.name!r}")

    def _samples(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Reads rows (n,) with all their views."""
        invalid = rows[~self.valid[rows]]
        if len(invalid):
            raise InvalidRowError(
                f"row {invalid[0]} of split {self.name!r} holds no latent, because its image could "
                f"not be decoded (see {self.cache.path / 'errors.parquet'}), or is not in this "
                f"subset{'' if self.cache.is_complete else ', or is not encoded yet'}",
                hint="`split.valid_rows` lists the rows that hold one",
            )
        import torch

        views = np.tile(np.arange(self.num_views), len(rows))
        flat = self.read_views(np.repeat(rows, self.num_views), views)
        y = flat.reshape(len(rows), *self.shape[1:])
        return y, torch.from_numpy(self.labels[rows].astype(np.int64))

    def read_views(self, rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Tensor:
        """Reads one view of each row, dequantised.

        Args:
            rows: (n,), each 0 <= row < N and valid, with repetitions.
            views: (n,), each 0 <= view < V.

        Returns:
            float32 (n, M, h, w), new memory on the CPU.

        Raises:
            ShardError: a shard is missing, damaged or not committed, or a row holds nothing.
        """
        stored = np.empty((len(rows), *self.latent.shape), self.latent.dtype)
        if len(set(rows.tolist())) == 1:
            # Read by position: for a single row no file is mapped.
            for row, view, out in zip(rows.tolist(), views.tolist(), stored, strict=True):
                self.read_into(row, view, out)
        else:
            self.read_batch_into(rows, views, stored)
        import torch

        y = torch.from_numpy(stored.astype(np.float32, copy=False))
        if self.latent.is_symbols:
            y.mul_(self.scale).add_(torch.from_numpy(self.offset)[:, None, None])
        return y

    @property
    def num_views(self) -> int:
        """Views per sample, V."""
        return self.record.views

    @property
    def num_rows(self) -> int:
        """Planned samples, N, with those that could not be decoded."""
        return self.record.rows

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(N, V, M, h, w)."""
        return (self.num_rows, self.num_views, *self.latent.shape)

    def read_commit(self, shard: int) -> CommitRecord | None:
        """Returns a shard's commit record, None where it is not committed."""
        self.cache.need(commit_path(self.name, shard))
        return read_commit(self.cache.path, self.name, shard)

    def committed(self) -> list[int]:
        """Returns the numbers of the shards that have a commit record."""
        root, total = self.cache.path, self.record.num_shards
        if self.cache.mirror is not None:
            return list(range(total))
        found = [shard for name, shard in listed_commits(root) if name == self.name]
        return [n for n in found if n < total and (root / commit_path(self.name, n)).is_file()]

    def index_file(self, shard: int) -> Path:
        """Returns the path of a shard's index part."""
        return self.cache.path / index_path(self.name, shard)

    def read_index(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the index part of a shard, or some of its columns.

        Args:
            shard: Its number, from 0.
            columns: Names of columns; None: all of them, as cache/README.md lists them.

        Raises:
            ShardError: it is missing or damaged.
        """
        self.cache.need(index_path(self.name, shard))
        return read_index(self.cache.path, self.name, shard, columns)

    def open_shard(self, shard: int) -> ShardReader:
        """Opens a shard's file again, checked against its commit record.

        Raises:
            ShardError: it is missing, damaged or not committed.
        """
        return self._open_zarr(shard) if self.layout.has_zarr else self.open_tar(shard)

    def open_tar(self, shard: int) -> ShardReader:
        """Opens a shard's tar again, checked against its commit record and index part.

        Raises:
            ShardError: it is missing, damaged or not committed.
        """
        commit = self._committed(shard)
        for path in (tar_path(self.name, shard), index_path(self.name, shard)):
            self.cache.need(path, commit.file(path))
        file = open_tar(self.cache.path, self.record, self.latent, commit)
        if not self.layout.has_zarr and file.index.crc32c != commit.index_crc32c:
            raise ShardError(f"{file.path}: its index part has other places than were committed")
        return file

    def _committed(self, shard: int) -> CommitRecord:
        commit = self.read_commit(shard)
        if commit is None:
            raise ShardError("it has no commit record")
        if commit.fingerprint != self.cache.fingerprint.digest:
            raise ShardError("its commit record has another fingerprint")
        if commit.format_version != self.cache.manifest.format_version:
            raise ShardError(f"its commit record has format version {commit.format_version}")
        return commit

    def _open_zarr(self, shard: int) -> ShardReader:
        commit = self._committed(shard)
        committed = commit.file(shard_path(self.name, shard))
        self.cache.need(committed.path, committed)
        file = open_zarr(
            self.cache.path / committed.path,
            num_chunks=self.record.shard_rows * self.num_views,
            codec=self._codec,
            file_bytes=committed.bytes,
            index_crc=commit.index_crc32c,
        )
        if self._codec.is_raw:
            self._require_own_chunks(file, shard)
        return file

    def _require_own_chunks(self, file: ShardReader, shard: int) -> None:
        """Distinguishes shards of raw chunks, whose own indexes are all alike.

        The first and the last stored chunk are checked against the index part.
        """
        stored = np.flatnonzero(file.stored)
        wanted = self.read_index(shard, ["latent_crc32c"])["latent_crc32c"].to_pylist()
        for chunk in {int(stored[0]), int(stored[-1])} if stored.size else ():
            offset, view = divmod(chunk, self.num_views)
            listed = (wanted[offset] or ()) if offset < len(wanted) else ()
            checksum = int.from_bytes(file.last_bytes(chunk, CRC_BYTES), "little")
            if checksum not in listed[view : view + 1]:
                raise ShardError(f"{file.path} is intact but is not the shard of this index part")

    def damage(self, shard: int, reason: str) -> ShardError:
        """Returns the error that names a shard, its rows and the command that repairs it.

        Args:
            shard: Its number, from 0.
            reason: What is wrong with it.
        """
        rows = self.record.rows_of(shard)
        return ShardError(
            f"split {self.name!r} shard {shard} (rows {rows.start} to {rows.stop - 1}): {reason}",
            hint=self.cache.repair_hint,
        )

    @cached_property
    def labels(self) -> npt.NDArray[Any]:
        """Class index of every row, int32 (N,); -1 where the class is not known.

        Of a cache that is still encoded, -1 too in shards that were not committed when it was read.
        """
        return self._small_array("labels", np.int32)

    @cached_property
    def valid(self) -> npt.NDArray[Any]:
        """Which rows hold a latent, bool (N,).

        Of a cache that is still encoded, those committed when it was read.
        """
        return self._small_array("valid", np.bool_)

    @cached_property
    def latents(self) -> zarr.Array[Any]:
        """The zarr array itself, (N, V, M, h, w), as plain zarr opens it.

        Its metadata is checked; what is then read through zarr is not checked against commits. With
        `layout.fold` it holds codes, which `cache.codecs.unfolded` turns into symbols.

        Raises:
            UsageError: the cache holds tars only, or is a remote one: zarr would take what was not
                fetched for holes.
            ManifestError: the metadata is not what was committed, or does not fit the manifest.
        """
        if not self.layout.has_zarr:
            raise UsageError(
                f"{self.cache.path} holds its latents in tars, not in a zarr array",
                hint=command("convert", self.cache.path, "--out", "NEW", "--format", "zarr"),
            )
        import zarr

        if self.cache.mirror is not None:
            raise UsageError(
                f"{self.cache.mirror.remote} is a remote cache; zarr itself opens it: "
                f"zarr.open(URL + '/latents.zarr')['{self.name}/latents']"
            )
        folder = array_path(self.name)
        path = self.cache.path / folder
        self.cache.read_committed(f"{folder}/zarr.json", max_bytes=_MAX_METADATA_BYTES)
        try:
            array = zarr.open_array(path, mode="r")
            found = (array.shape, array.shards, array.chunks, array.dtype)
        except Exception as error:
            # zarr refuses unknown codecs and grids with nearly any type.
            raise ManifestError(f"{path} cannot be opened: {error}") from error
        shard = (self.record.shard_rows, *self.shape[1:])
        dtype = np.dtype(self.layout.array_values(self.latent)[0])
        wanted = (self.shape, shard, (1, 1, *self.latent.shape), dtype)
        if found != wanted:
            raise ManifestError(
                f"{path} has (shape, shards, chunks, dtype) {found}; the manifest says {wanted}"
            )
        return array

    @property
    def is_mapped(self) -> bool:
        """Whether reading is copying from mapped files: raw chunks in zarr shards."""
        return self.layout.has_zarr and self._codec.is_raw

    @cached_property
    def _raw_shards(self) -> RawShards:
        return RawShards(
            self._open_zarr,
            self.damage,
            num_shards=self.record.num_shards,
            shard_chunks=self.record.shard_rows * self.num_views,
            chunk_bytes=self.latent.num_bytes,
        )

    def read_into(self, row: int, view: int, out: npt.NDArray[Any]) -> None:
        """Reads one stored latent, not dequantised, checking its checksum.

        Args:
            row: 0 <= row < N.
            view: 0 <= view < V.
            out: C-contiguous (M, h, w) of the stored dtype; overwritten.

        Raises:
            ShardError: the shard is missing, damaged or not committed, or the row holds nothing.
        """
        shard, offset = divmod(row, self.record.shard_rows)
        chunk = offset * self.num_views + view
        try:
            self._shards.get(shard).read_into(chunk, out.reshape(-1).view(np.uint8))
        except ShardError as error:
            raise self.damage(shard, str(error)) from error

    def read_batch_into(
        self, rows: npt.NDArray[Any], views: npt.NDArray[Any], out: npt.NDArray[Any]
    ) -> None:
        """Reads many stored latents as `read_into` does, at a fraction of its cost for each.

        Args:
            rows: int64 (B,), each 0 <= row < N.
            views: int64 (B,), each 0 <= view < V.
            out: C-contiguous (B, M, h, w) of the stored dtype; overwritten.

        Raises:
            ShardError: as for `read_into`; `out` may then hold anything.
        """
        if not len(rows):
            return
        flat = out.reshape(len(rows), -1).view(np.uint8)
        shards, offsets = np.divmod(rows, self.record.shard_rows)
        chunks = offsets * self.num_views + views
        if self.is_mapped:
            self._raw_shards.gather(shards, chunks, flat)
            return
        places = zip(shards.tolist(), chunks.tolist(), strict=True)
        shard, get = -1, self._shards.get
        try:
            for (shard, chunk), latent in zip(places, flat, strict=True):
                get(shard).read_into(chunk, latent)
        except ShardError as error:
            raise self.damage(shard, str(error)) from error

    def _small_array(self, name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Reads labels or valid by their committed digest, whatever the array's metadata says.

        Not by zarr: it gives fill values for a chunk that is missing, and these look like labels.
        """
        if not self.cache.is_complete:
            return self._gathered(name, dtype)
        folder = array_path(self.name, name)
        size = self.num_rows * np.dtype(dtype).itemsize
        codec = FRAMES(level=1, chunk_bytes=size)
        raw = np.empty(size, np.uint8)
        try:
            self.cache.read_committed(f"{folder}/zarr.json", max_bytes=_MAX_METADATA_BYTES)
            if size:
                stored = self.cache.read_committed(
                    f"{folder}/c.0", max_bytes=codec.max_stored_bytes
                )
                codec.decode_into(stored, raw)
        except (ManifestError, ValueError) as error:
            raise ManifestError(
                f"{self.cache.path / folder} cannot be read: {error}",
                hint=self.cache.repair_hint,
            ) from error
        if dtype is np.bool_:
            return raw.astype(np.bool_)
        return raw.view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)

    def _gathered(self, name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Puts labels or valid of an unfinished cache together, from its committed index parts."""
        found = np.full(self.num_rows, False if dtype is np.bool_ else -1, dtype)
        for shard in self.committed():
            rows = self.record.rows_of(shard)
            table = self.read_index(shard, ["label", "status"])
            if table.num_rows != len(rows):
                raise self.damage(shard, f"its index part has {table.num_rows} rows")
            values = table["label"] if name == "labels" else pc.equal(table["status"], "ok")
            found[rows.start : rows.stop] = values.to_numpy()
        return found


def _valid_rows(valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(valid).astype(np.int64)
    # Shuffled in place, it would change the order of every loader and of no seed.
    rows.flags.writeable = False
    return rows


def _unpickled(cache: Mapping[str, Split], name: str, valid: bytes | None) -> Split:
    """Returns a split of a cache, restricted to the rows whose bit is set if any are given."""
    split = cache[name]
    if valid is None:
        return split
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), count=split.num_rows)
    return split._restricted(bits.astype(np.bool_))
