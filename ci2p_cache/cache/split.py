"""`Split`: one split of a cache, with every read checked."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.chunk_codec import ChunkCodec
from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.open_shards import OpenShards
from ci2p_cache.cache.paths import array_path
from ci2p_cache.cache.raw_shards import RawShards
from ci2p_cache.cache.shard_files import ShardFiles
from ci2p_cache.errors import ManifestError, ShardError, UsageError, command

if TYPE_CHECKING:
    import zarr

__all__ = ["Split"]

_MAX_METADATA_BYTES = 2**20
"""Of one zarr.json; ours have a few thousand, most of it the offsets."""


class Split(ShardFiles):
    """One split of a cache; reading is safe from many threads.

    `split[row]` gives the dequantised latents and the label. Rows whose image could not be decoded
    hold nothing (`valid` is false) and raise. Made by `open_cache`, not by hand.

    Args:
        cache: The cache it belongs to.
        name: Its name.
    """

    def __init__(self, cache: CacheFolder, name: str) -> None:
        super().__init__(cache, name)
        self.scale: float = cache.manifest.scale
        self.offset = np.array(cache.manifest.offset, np.float32)
        self._shards = OpenShards(self.open_shard)

    @property
    def num_rows(self) -> int:
        """Planned samples, N, with those that could not be decoded."""
        return self.record.rows

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(N, V, M, h, w)."""
        return (self.num_rows, self.num_views, *self.latent.shape)

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def labels(self) -> npt.NDArray[Any]:
        """Class index of every row, int32 (N,); -1 where the class is not known."""
        return self._small_array("labels", np.int32)

    @cached_property
    def valid(self) -> npt.NDArray[Any]:
        """Which rows hold a latent, bool (N,)."""
        return self._small_array("valid", np.bool_)

    @cached_property
    def valid_rows(self) -> npt.NDArray[Any]:
        """Rows that hold a latent, ascending, int64."""
        return np.flatnonzero(self.valid).astype(np.int64)

    def subset(self, rows: npt.NDArray[Any]) -> Split:
        """Returns a view of this split that holds some of its valid rows only.

        It reads the same files. Row numbers, `num_rows`, `shape`, `labels` and `latents` stay those
        of the whole split; `valid` and `valid_rows`, which loaders go by, are restricted.

        Args:
            rows: Distinct valid rows in any order, integers (n,).

        Raises:
            UsageError: a row is named twice, or is not valid here.
        """
        wanted = np.sort(np.asarray(rows, np.int64).reshape(-1))
        odd = np.concatenate(
            [np.setdiff1d(wanted, self.valid_rows), wanted[1:][wanted[1:] == wanted[:-1]]]
        )
        if len(odd):
            raise UsageError(
                f"row {odd[0]} cannot be in a subset of split {self.name!r}: it is named twice, or "
                f"is none of its {len(self.valid_rows)} valid rows"
            )
        subset = copy.copy(self)
        # As if read: cached properties are looked up among the instance's attributes first.
        subset.valid_rows = wanted
        subset.valid = np.zeros(self.num_rows, np.bool_)
        subset.valid[wanted] = True
        return subset

    @cached_property
    def latents(self) -> zarr.Array[Any]:
        """The zarr array itself, (N, V, M, h, w), as plain zarr opens it.

        Its metadata is checked; what is then read through zarr is not held against commits.

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
        wanted = (self.shape, shard, (1, 1, *self.latent.shape), np.dtype(self.latent.dtype))
        if found != wanted:
            raise ManifestError(
                f"{path} has (shape, shards, chunks, dtype) {found}; the manifest says {wanted}"
            )
        return array

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        """Returns the dequantised latents of a row, float32 (V, M, h, w), and its label.

        Raises:
            IndexError: no such row, or the row's image could not be decoded.
            ShardError: its shard is missing or damaged.
        """
        if not -self.num_rows <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows} in split {self.name!r}")
        row %= self.num_rows
        if not self.valid[row]:
            raise IndexError(
                f"row {row} of split {self.name!r} holds no latent, because its image could not "
                f"be decoded (see {self.cache.path / 'errors.parquet'}), or is not in this subset"
            )
        stored = np.empty((self.num_views, *self.latent.shape), self.latent.dtype)
        for view in range(self.num_views):
            self.read_into(row, view, stored[view])
        y = torch.from_numpy(stored.astype(np.float32))
        if self.latent.is_symbols:
            y.mul_(self.scale).add_(torch.from_numpy(self.offset)[:, None, None])
        return y, int(self.labels[row])

    @property
    def is_mapped(self) -> bool:
        """Whether reading is copying from mapped files: raw chunks in zarr shards."""
        return self.layout.has_zarr and self.layout.codec == "none"

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
        folder = array_path(self.name, name)
        size = self.num_rows * np.dtype(dtype).itemsize
        codec = ChunkCodec("zstd", level=1, chunk_bytes=size)
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
