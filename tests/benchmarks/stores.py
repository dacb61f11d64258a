"""The same stored int8 latents, as caches of ours: whatever codec, level and shard size.

Shapes: N samples, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs.zstd import Zstd

import ci2p_cache as cc
from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import index_crc32c, pack_shard
from ci2p_cache.cache.index import ChannelSums, IndexRow, index_bytes
from ci2p_cache.cache.manifest import Manifest, SplitRecord, shard_rows
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN, index_path, shard_path
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.plan import Sample, plan_of_rows
from ci2p_cache.pictures.drawn import write_pictures
from ci2p_cache.specs import FORMAT_VERSION, CodecName, LayoutSpec, ViewSpec, default_level

__all__ = ["PEER", "Data", "encoded", "frame_decoder", "generated", "read_data", "write_cache"]

PEER = "peer: "
"""Begins the names of the peers' folders."""


@dataclass(frozen=True)
class Data:
    """What every contestant reads."""

    base: cc.Cache
    """The cache that the latents come from."""
    latents: npt.NDArray[np.int8]
    """(N, M, h, w), in memory."""
    distinct: int
    """How many of them are distinct; the rest repeats these, and is compressed on its own."""

    @cached_property
    def frames(self) -> list[bytes]:
        """A zstd frame with checksum for each, as zarr and everyone's own code write them."""
        encode = Zstd(level=1, checksum=True).encode
        return [bytes(encode(latent)) for latent in self.latents]

    @property
    def scale(self) -> np.float32:
        return np.float32(self.base.manifest.scale)

    @property
    def offset(self) -> npt.NDArray[np.float32]:
        """(M, 1, 1)."""
        return np.array(self.base.manifest.offset, np.float32)[:, None, None]

    def dequantised(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self.latents[rows].astype(np.float32)
        return values * self.scale + self.offset


def frame_decoder() -> Callable[[Any, npt.NDArray[np.uint8]], None]:
    """Decodes a frame into an array, and checks it, with one context for all: for one thread."""
    decompress = zstandard.ZstdDecompressor().decompress

    def decode(frame: Any, out: npt.NDArray[np.uint8]) -> None:
        out[:] = np.frombuffer(decompress(frame), np.uint8)

    return decode


def generated(folder: Path, *, per_class: int, size: int) -> cc.Cache:
    """A cache of pictures that the package itself draws."""
    list(write_pictures(folder / "pictures", per_class=per_class))
    return encoded(folder / "pictures", folder / "base", limit=None, size=size)


def encoded(images: Path, out: Path, *, limit: int | None, size: int = 256) -> cc.Cache:
    """A cache of a folder of images, by the bundled encoder, each with its mirror image."""
    options = cc.EncodeOptions(encoder="bundled", size=size, val_fraction=0.0, limit=limit)
    cc.encode(images, out, options)
    return cc.open_cache(out)


def read_data(cache: cc.Cache, samples: int) -> Data:
    """Reads the views of a cache's first split, and repeats them up to `samples`."""
    split = cache[cache.splits[0]]
    if split.latent.dtype != "int8":
        raise SystemExit(f"the cache holds {split.latent.dtype}; an int8 cache is wanted")
    rows = split.valid_rows[: -(-samples // split.num_views)]
    stored = np.empty((len(rows), split.num_views, *split.latent.shape), np.int8)
    for row, views in zip(rows.tolist(), stored, strict=True):
        for view, latent in enumerate(views):
            split.read_into(row, view, latent)
    latents = stored.reshape(-1, *split.latent.shape)
    distinct = min(len(latents), samples)
    return Data(cache, latents[np.arange(samples) % distinct], distinct)


def write_cache(
    folder: Path,
    data: Data,
    *,
    codec: CodecName,
    level: int | None = None,
    shard_samples: int = 1024,
) -> cc.Split:
    """Writes the latents as a cache of one view per sample, with the package's own writers."""
    base = data.base.manifest
    if level is None:
        level = default_level(FORMAT_VERSION, codec, fold=False)
    layout = LayoutSpec(val_fraction=0.0, shard_samples=shard_samples, codec=codec, level=level)
    fingerprint = dataclasses.replace(base.fingerprint, views=ViewSpec.parse("none"))
    size = shard_rows(layout, fingerprint.latent, 1)
    count = len(data.latents)
    classes = len(base.classes)
    samples = [Sample(row, f"{row}", row % classes, b"%d" % row) for row in range(count)]
    record = SplitRecord(rows=count, views=1, shard_rows=size)
    plan = plan_of_rows({"train": samples}, {"train": record})
    chunks = codec_of(FORMAT_VERSION, layout, fingerprint.latent)
    with StagingArea(folder) as staging:
        manifest = Manifest(
            software=base.software,
            state="encoding",
            fingerprint=fingerprint,
            layout=layout,
            source="benchmark",
            classes=base.classes,
            class_titles=base.class_titles,
            splits=plan.splits,
            plan=staging.put(PLAN, plan.to_bytes()),
            encoder=staging.put(ENCODER, data.base.encoder_path.read_bytes()),
            offset=base.offset,
        )
        staging.put_sealed(MANIFEST, manifest.to_dict())
        commits = []
        for shard in range(record.num_shards):
            rows = record.rows_of(shard)
            latents = data.latents[rows.start : rows.stop]
            encoded_chunks: list[bytes | None] = [
                chunks.encode(memoryview(latent.reshape(-1).view(np.uint8))) for latent in latents
            ]
            pieces = list(pack_shard(encoded_chunks + [None] * (size - len(rows))))
            table = [_index_row(samples[row], base, data.latents[row]) for row in rows]
            stored: npt.NDArray[Any] = latents
            sums = ChannelSums.of(stored, np.zeros(latents.shape[1]))
            commit = CommitRecord(
                split="train",
                shard=shard,
                first_row=rows.start,
                rows=len(rows),
                valid_rows=len(rows),
                plan_sha256=plan.shard_sha256("train", shard),
                fingerprint=fingerprint.digest,
                index_crc32c=index_crc32c(pieces[-1]),
                files=(
                    staging.put(shard_path("train", shard), pieces),
                    staging.put(
                        index_path("train", shard), index_bytes(table, sums, split="train")
                    ),
                ),
                numerics={},
            )
            staging.commit(commit)
            commits.append(commit)
        finalise(folder, manifest, plan, commits, staging)
    return cc.open_cache(folder)["train"]


def _index_row(sample: Sample, base: Manifest, latent: npt.NDArray[np.int8]) -> IndexRow:
    return IndexRow(
        row=sample.row,
        key=sample.key,
        label=sample.label,
        class_name=base.classes[sample.label],
        path=sample.key,
        path_bytes=sample.path,
        source_bytes=0,
        exif_orientation=1,
        clipped=0,
        latent_crc32c=[google_crc32c.value(latent.tobytes())],
    )
