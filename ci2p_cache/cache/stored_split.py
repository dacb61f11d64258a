"""`StoredSplit`: the arrays of a split as they are stored, with every read checked."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ci2p_cache.cache.chunk_codec import ChunkCodec
from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.open_shards import OpenShards
from ci2p_cache.cache.paths import array_path
from ci2p_cache.cache.raw_shards import RawShards
from ci2p_cache.cache.shard_files import ShardFiles
from ci2p_cache.errors import ManifestError, ShardError, UsageError, command

if TYPE_CHECKING:
    import zarr

__all__ = ["StoredSplit"]

_MAX_METADATA_BYTES = 2**20
"""Of one zarr.json; ours have a few thousand, most of it the offsets."""


class StoredSplit(ShardFiles):
    """The arrays of one split: latents, not dequantised, labels, and which rows are valid.

    Args:
        cache: The cache it belongs to.
        name: Its name.
    """

    def __init__(self, cache: CacheFolder, name: str) -> None:
        super().__init__(cache, name)
        self._shards = OpenShards(self.open_shard)

    @property
    def num_rows(self) -> int:
        """Planned samples, N, with those that could not be decoded."""
        return self.record.rows

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(N, V, M, h, w)."""
        return (self.num_rows, self.num_views, *self.latent.shape)

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
        if not self.cache.is_complete:
            return self._gathered(name, dtype)
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
