"""The files of a split's shards: which are committed, and each opened against its record.

What the stored values mean, and which rows are asked for, is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ci2p_cache.cache.chunk_codec import ChunkCodec
from ci2p_cache.cache.commit import CommitRecord, read_commit
from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.manifest import SplitRecord
from ci2p_cache.cache.paths import commit_path, data_paths, index_path, tar_path
from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.cache.tar_shards import TarFile, open_tar
from ci2p_cache.cache.zarr_shards import ShardFile
from ci2p_cache.errors import ShardError
from ci2p_cache.specs import LatentSpec, LayoutSpec

__all__ = ["ShardFiles"]


class ShardFiles:
    """The files of the shards of one split; safe from many threads.

    Args:
        cache: The folder they are in.
        name: The split's name.
    """

    def __init__(self, cache: CacheFolder, name: str) -> None:
        manifest = cache.manifest
        self.cache = cache
        self.name = name
        self.record: SplitRecord = manifest.splits[name]
        self.layout: LayoutSpec = manifest.layout
        self.latent: LatentSpec = manifest.fingerprint.latent
        self._codec = ChunkCodec(
            manifest.layout.codec,
            level=manifest.layout.level,
            chunk_bytes=self.latent.num_bytes,
        )

    @property
    def num_views(self) -> int:
        """Views per sample, V."""
        return self.record.views

    def read_commit(self, shard: int) -> CommitRecord | None:
        """Returns a shard's commit record, None where it is not committed."""
        self.cache.need(commit_path(self.name, shard))
        return read_commit(self.cache.path, self.name, shard)

    def committed(self) -> list[int]:
        """Returns the numbers of the shards that have a commit record."""
        if self.cache.mirror is not None:
            return list(range(self.record.num_shards))
        pattern = re.compile(rf"{self.name}-(\d{{6,12}})\.json")
        # Listed, because asking for each shard would take as long as the manifest says there are.
        try:
            found = [pattern.fullmatch(p.name) for p in (self.cache.path / "commits").iterdir()]
        except OSError:
            return []
        numbers = sorted(int(match[1]) for match in found if match is not None)
        return [
            shard
            for shard in numbers
            if shard < self.record.num_shards
            and (self.cache.path / commit_path(self.name, shard)).is_file()
        ]

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
        """Opens the file that a shard is read from anew, checked against its commit record.

        Raises:
            ShardError: it is missing, damaged or not committed.
        """
        return self._open_zarr(shard) if self.layout.has_zarr else self.open_tar(shard)

    def open_tar(self, shard: int) -> TarFile:
        """Opens a shard's tar anew, checked against its commit record and index part.

        Raises:
            ShardError: it is missing, damaged or not committed.
        """
        commit = self._committed(shard)
        for each in commit.files:
            if each.path in (tar_path(self.name, shard), index_path(self.name, shard)):
                self.cache.need(each.path, each)
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
        return commit

    def _open_zarr(self, shard: int) -> ShardFile:
        commit = self._committed(shard)
        path = data_paths(self.layout, self.name, shard)[0]
        committed = next((file for file in commit.files if file.path == path), None)
        if committed is None:
            raise ShardError(f"its commit record does not list {path}")
        self.cache.need(path, committed)
        file = ShardFile(
            self.cache.path / path,
            num_chunks=self.record.shard_rows * self.num_views,
            codec=self._codec,
            file_bytes=committed.bytes,
            index_crc=commit.index_crc32c,
        )
        if self._codec.name == "none":
            self._require_own_chunks(file, shard)
        return file

    def _require_own_chunks(self, file: ShardFile, shard: int) -> None:
        """Tells shards of raw chunks apart, whose own indexes are all alike.

        The first and the last chunk that are stored are held against the index part.
        """
        stored = np.flatnonzero(file.stored)
        if not stored.size:
            return
        table = self.read_index(shard, ["latent_crc32c"])
        wanted = table["latent_crc32c"].to_pylist()
        for chunk in {int(stored[0]), int(stored[-1])}:
            offset, view = divmod(chunk, self.num_views)
            listed = (wanted[offset] or ()) if offset < len(wanted) else ()
            if file.stored_crc32c(chunk) not in listed[view : view + 1]:
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
