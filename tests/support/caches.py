"""Small caches, what their files hold, and ways to damage them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet

import ci2p_cache as cc
from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import put_shard
from ci2p_cache.cache.index import (
    ChannelSums,
    IndexRow,
    index_bytes,
    index_rows,
    read_index,
    read_sums,
)
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.manifest import Manifest, SplitRecord
from ci2p_cache.cache.paths import CHECKSUMS, ENCODER, PLAN
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.plan import ShardPlan, build_plan
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.source import ImageRef
from ci2p_cache.specs import (
    FORMAT_VERSION,
    CodecName,
    DType,
    EncoderSpec,
    Fingerprint,
    ImageSpec,
    LatentSpec,
    LayoutSpec,
    ViewSpec,
    default_level,
)
from tests.support.seals import digest, reseal, write_json

__all__ = [
    "SMALL",
    "data_digests",
    "flip",
    "keys_of",
    "make_cache",
    "make_old",
    "swap",
    "with_options",
]

SMALL = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.25)


def with_options(**changes: Any) -> cc.EncodeOptions:
    return dataclasses.replace(SMALL, **changes)


def data_digests(root: Path) -> dict[str, str]:
    """sha256 of every file of a cache, commit records and manifest included."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def keys_of(root: Path) -> dict[str, list[str]]:
    """The keys of each split, in the order of their rows."""
    table = pyarrow.parquet.read_table(root / PLAN)
    found: dict[str, list[str]] = {}
    for split, key in zip(table["split"].to_pylist(), table["key"].to_pylist(), strict=True):
        found.setdefault(split, []).append(key)
    return found


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    mine, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs)
    other.write_bytes(mine)


class _Named:
    """A source of images that have names and labels, and that no one ever reads."""

    notices = ()

    def __init__(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        self._counts = counts
        self.classes = self.class_titles = tuple(
            sorted({c for own in counts.values() for c in own})
        )

    def location(self) -> str:
        return "/nowhere"

    def scan(self) -> Iterator[ImageRef]:
        for split, own in self._counts.items():
            for name, count in own.items():
                for number in range(count):
                    key = f"{name}/{number:03d}.jpg"
                    yield ImageRef(key, split, self.classes.index(name), f"{split}/{key}".encode())

    def file_of(self, path: bytes) -> None:
        """None has a file."""

    def read(self, path: bytes) -> bytes:
        raise AssertionError(f"{path!r} was read")


def make_cache(
    root: Path,
    counts: Mapping[str, Mapping[str, int]],
    *,
    channels: int = 4,
    side: int = 4,
    dtype: DType = "int8",
    views: ViewSpec | None = None,
    format: str = "zarr",
    codec: CodecName = "zstd",
    fold: bool = False,
    format_version: int = FORMAT_VERSION,
    shard_samples: int = 8,
    bad: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Writes a valid cache of drawn latents into `root`, without images and without an encoder.

    The latents of a class have a mean of their own, so that training learns something. The same
    arguments give the same latents.

    Args:
        root: The folder to make.
        counts: Images per split and class.
        channels: M.
        side: Rows and columns of a latent.
        dtype: What is stored.
        views: The views of a training sample; None for the image and its mirror.
        format: Container of the latents.
        codec: Byte codec of the chunks.
        fold: Whether they hold folded symbols.
        format_version: Version of the cache.
        shard_samples: Images per shard.
        bad: Rows of each split that could not be decoded.
    """
    source = _Named(counts)
    layout = LayoutSpec(
        format=format,  # type: ignore[arg-type]  # one of the formats
        codec=codec,
        level=default_level(format_version, codec, fold=fold),
        fold=fold,
        shard_samples=shard_samples,
        # What format 1 has; nothing is drawn where the splits are given.
        split="hashed",
    )
    fingerprint = Fingerprint(
        image=ImageSpec(decoder=decoder_name(), size=16 * side, resize_side=16 * side),
        views=views or ViewSpec(),
        encoder=EncoderSpec(weights_sha256="0" * 64),
        latent=LatentSpec(dtype=dtype, channels=channels, height=side, width=side),
    )
    plan = build_plan(source, layout, fingerprint.views, fingerprint.latent)
    root.mkdir(parents=True)
    with locked(root / ".lock", what="test"), StagingArea(root) as staging:
        manifest = Manifest(
            format_version=format_version,
            software="ci2p-cache tests",
            state="encoding",
            fingerprint=fingerprint,
            layout=layout,
            source=source.location(),
            classes=source.classes,
            class_titles=source.class_titles,
            splits=plan.splits,
            plan=staging.put(PLAN, plan.to_bytes()),
            encoder=staging.put(ENCODER, b"no encoder made these latents"),
            offset=(0.25 if fingerprint.latent.is_symbols else 0.0,) * channels,
        )
        commits = [
            _put_shard(
                staging, manifest, plan.shard(split, number), set((bad or {}).get(split, ()))
            )
            for split, number in plan.shard_numbers()
        ]
        finalise(root, manifest, plan, commits, staging)
    return root


def _put_shard(
    staging: StagingArea, manifest: Manifest, shard: ShardPlan, bad: set[int]
) -> CommitRecord:
    """Draws and commits one shard; every latent is a pure function of its split, row and view."""
    latent, layout = manifest.fingerprint.latent, manifest.layout
    shape: SplitRecord = manifest.splits[shard.split]
    codec = codec_of(manifest.format_version, layout, latent)
    rows: list[IndexRow] = []
    chunks: list[bytes | None] = [None] * (shape.shard_rows * shape.views)
    raw: dict[tuple[int, int], bytes] = {}
    drawn = []
    for sample in shard.samples:
        good = sample.row not in bad
        row = IndexRow(
            row=sample.row, key=sample.key, label=sample.label,
            class_name=manifest.classes[sample.label], path=sample.path.decode(),
            path_bytes=sample.path, source_bytes=100, source_sha256="0" * 64, width=90, height=70,
            mode="RGB", format="JPEG", exif_orientation=1, boxes=[],
        )  # fmt: skip
        rows.append(row)
        if not good:
            row.status, row.error = "invalid", "drawn to be bad"
            continue
        row.clipped, row.latent_crc32c = 0, []
        for view in range(shape.views):
            rng = np.random.default_rng([len(shard.split), sample.row, view])
            centre = 2.0 * sample.label
            values = rng.normal(centre, 2.0, (latent.channels, latent.height, latent.width))
            stored = np.rint(values) if latent.is_symbols else values
            stored = stored.astype(latent.dtype)
            drawn.append(stored)
            raw[sample.row, view] = stored.tobytes()
            row.latent_crc32c.append(google_crc32c.value(raw[sample.row, view]))
            if layout.has_zarr:
                place = (sample.row - shard.first_row) * shape.views + view
                chunks[place] = codec.encode(memoryview(raw[sample.row, view]))
    sums = ChannelSums.empty(latent.channels)
    if drawn:
        sums = ChannelSums.of(np.stack(drawn), np.zeros(latent.channels))

    def record(**fields: Any) -> CommitRecord:
        return CommitRecord(
            format_version=manifest.format_version,
            first_row=shard.first_row,
            rows=len(shard.samples),
            valid_rows=sum(row.status == "ok" for row in rows),
            plan_sha256=shard.sha256,
            fingerprint=manifest.fingerprint.digest,
            numerics={"device_type": "none"},
            **fields,
        )

    return put_shard(
        staging, record, shard_id=(shard.split, shard.shard), layout=layout, shape=shape,
        latent=latent, rows=rows, sums=sums, chunks=chunks, raw=raw,
    )  # fmt: skip


def make_old(root: Path) -> Path:
    """Turns a complete cache into the one that was written before the index had `split`."""
    manifest = json.loads((root / "cache.json").read_text())
    for part in sorted((root / "index").iterdir()):
        name, _, number = part.stem.rpartition("-")
        table = read_index(root, name, int(number))
        part.write_bytes(index_bytes(index_rows(table), read_sums(table), split=None))
    for split in manifest["splits"].values():
        del split["names_split"]
        split["bytes"] = 0
    write_json(root / "cache.json", manifest)
    reseal(root)
    for path in (root / "commits").iterdir():
        commit = json.loads(path.read_text())
        manifest["splits"][commit["split"]]["bytes"] += sum(f["bytes"] for f in commit["files"])
    listed = [line.partition("  ")[2] for line in (root / CHECKSUMS).read_text().splitlines()]
    lines = (f"{digest((root / path).read_bytes())}  {path}\n" for path in listed)
    (root / CHECKSUMS).write_text("".join(lines))
    write_json(root / "cache.json", manifest)
    reseal(root)
    return root
