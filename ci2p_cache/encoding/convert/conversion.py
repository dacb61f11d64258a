"""A conversion into a cache: begun, continued, finalised; plain arrays are not known here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ci2p_cache import __version__
from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import CommitRecord, FileRecord, read_commit, sha256_file
from ci2p_cache.cache.containers import put_shard
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.manifest import Manifest, read_manifest, refuse_difference
from ci2p_cache.cache.paths import MANIFEST, data_paths, index_path
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import StagingArea, disk_errors
from ci2p_cache.cache.store import Cache
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.shard_values import read_values
from ci2p_cache.errors import FingerprintMismatchError, IntegrityError, ManifestError, command
from ci2p_cache.machine import num_cores
from ci2p_cache.record import read_regular
from ci2p_cache.specs import LayoutSpec

__all__ = ["Conversion"]


class Conversion:
    """One conversion into a cache while it runs."""

    def __init__(
        self, cache: Cache, root: Path, layout: LayoutSpec, on_shard: Callable[[int, int], None]
    ) -> None:
        self._cache = cache
        self._root = root
        self._layout = layout
        self._on_shard = on_shard
        self._codec = codec_of(layout, cache.fingerprint.latent)

    def run(self) -> tuple[int, int]:
        """Converts what is not yet, and finalises; returns the bytes and the shards converted."""
        root = self._root
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        with (
            locked(root / ".lock", what="convert"),
            StagingArea(root) as staging,
            ThreadPoolExecutor(num_cores(), "convert") as pool,
        ):
            manifest = self._begun() or self._start(staging)
            plan = read_plan(root, manifest)
            places = list(plan.shard_numbers())
            commits, now = [], 0
            for done, (name, shard) in enumerate(places, 1):
                split = self._cache[name]
                commit = self._converted(split, shard)
                if commit is None:
                    commit = self._convert(manifest, split, shard, pool, staging)
                    now += 1
                commits.append(commit)
                self._on_shard(done, len(places))
            if now or not manifest.is_complete:
                manifest = finalise(root, manifest, plan, commits, staging)
        return sum(record.bytes or 0 for record in manifest.splits.values()), now

    def _begun(self) -> Manifest | None:
        """Returns the manifest of a conversion that was begun, None where there is none."""
        if not (self._root / MANIFEST).exists():
            return None
        theirs, ours = read_manifest(self._root), self._cache.manifest
        refuse_difference(self._root, theirs, ours.fingerprint, self._layout)
        if theirs.plan != ours.plan or theirs.classes != ours.classes:
            raise FingerprintMismatchError(
                f"{self._root} holds a cache of other images; nothing was changed",
                hint="choose another --out folder",
            )
        return theirs

    def _start(self, staging: StagingArea) -> Manifest:
        """Copies plan and encoder, and writes the manifest: a cache is begun."""
        ours = self._cache.manifest
        manifest = dataclasses.replace(
            ours,
            software=f"ci2p-cache {__version__}",
            state="encoding",
            layout=self._layout,
            splits={
                name: dataclasses.replace(
                    record,
                    valid_rows=None,
                    bytes=None,
                    source_bytes=None,
                    clipped=None,
                    exif_turned=None,
                    names_split=True,
                )
                for name, record in ours.splits.items()
            },
            plan=self._copied(ours.plan, staging),
            encoder=self._copied(ours.encoder, staging),
            files=(),
        )
        staging.put_sealed(MANIFEST, manifest.to_dict())
        return manifest

    def _copied(self, file: FileRecord, staging: StagingArea) -> FileRecord:
        path, hint = self._cache.path / file.path, command("verify", self._cache.path, "--repair")
        try:
            content = read_regular(path, max_bytes=file.bytes)
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ManifestError(f"{path} is not what was committed", hint=hint)
        return staging.put(file.path, content)

    def _converted(self, split: Split, shard: int) -> CommitRecord | None:
        """Returns the record of a shard that was converted; its files' digests are checked."""
        ours = split.read_commit(shard)
        wanted = {*data_paths(self._layout, split.name, shard), index_path(split.name, shard)}
        try:
            theirs = read_commit(self._root, split.name, shard)
            if ours is None or theirs is None or {file.path for file in theirs.files} != wanted:
                return None
            as_theirs = dataclasses.replace(
                ours, files=theirs.files, index_crc32c=theirs.index_crc32c
            )
            if theirs != as_theirs:
                return None
            intact = all(sha256_file(self._root / f.path) == f.sha256 for f in theirs.files)
        except (IntegrityError, OSError):
            return None
        return theirs if intact else None

    def _convert(
        self,
        manifest: Manifest,
        split: Split,
        shard: int,
        pool: ThreadPoolExecutor,
        staging: StagingArea,
    ) -> CommitRecord:
        values, views = read_values(split, shard, pool), split.num_views
        first = split.record.rows_of(shard).start
        chunks: list[bytes | None] = [None] * (split.record.shard_rows * views)
        raw = {
            (row, view): memoryview(latent.reshape(-1).view(np.uint8))
            for row, latents in values.latents.items()
            for view, latent in enumerate(latents)
        }
        if self._layout.has_zarr:
            encoded = pool.map(self._codec.encode, raw.values())
            for (row, view), chunk in zip(raw, encoded, strict=True):
                chunks[(row - first) * views + view] = chunk
        return put_shard(
            staging,
            partial(dataclasses.replace, values.commit),
            place=(split.name, shard),
            layout=self._layout,
            shape=manifest.splits[split.name],
            latent=split.latent,
            rows=values.rows,
            sums=values.sums,
            chunks=chunks,
            raw=raw,
        )
