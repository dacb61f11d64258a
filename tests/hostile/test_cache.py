"""Cache folders that deceive."""

from __future__ import annotations

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from tests.hostile.attacks import (
    COMMIT,
    INDEX,
    MAX_GROWTH,
    SHARD,
    Harmful,
    attacked,
    commands,
    edit_json,
    lead_out,
    pad,
    refused,
    replace,
    set_manifest,
    snapshot,
)
from tests.support.seals import reseal
from tests.support.tiers import thinned
from tests.support.warm import WarmParent


def rle_frame(claimed: int, actual: int) -> bytes:
    """A zstd frame (RFC 8878) that says `claimed` bytes and unpacks to `actual` zeros."""
    blocks, block = [], 2**17
    count = -(-actual // block)
    for number in range(count):
        size = min(block, actual - number * block)
        blocks.append(
            ((size << 3) | (1 << 1) | (number == count - 1)).to_bytes(3, "little") + b"\0"
        )
    return b"\x28\xb5\x2f\xfd\xe0" + claimed.to_bytes(8, "little") + b"".join(blocks)


def rewrite_shard(root: Path, change: Callable[[np.ndarray, bytearray], None]) -> None:
    """Changes the index (n, 2) and the chunks of the first shard; its checksum is made to fit."""
    path = root / SHARD
    data = path.read_bytes()
    count = 8 * 2
    start = len(data) - 16 * count - 4
    body = bytearray(data[:start])
    entries = np.frombuffer(data[start:-4], "<u8").reshape(count, 2).copy()
    change(entries, body)
    index = entries.tobytes()
    path.write_bytes(bytes(body) + index + struct.pack("<I", google_crc32c.value(index)))
    reseal(root)


def chunk_is(frame: bytes) -> Callable[[np.ndarray, bytearray], None]:
    def change(entries: np.ndarray, body: bytearray) -> None:
        for number in range(len(entries)):
            entries[number] = len(body), len(frame)
            body += frame

    return change


def points_outside(entries: np.ndarray, body: bytearray) -> None:
    entries[0] = 2**63, 2**63


def overlaps(entries: np.ndarray, body: bytearray) -> None:
    entries[1] = entries[0]


def bomb_parquet(root: Path, path: Path) -> None:
    """1 GiB of zeros in the pages of one column, kilobytes on disk."""
    table = pa.table({"key": pa.array([bytes(2**26)], pa.binary())})
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(16):
            writer.write_table(table)
    reseal(root)


def dictionary_bomb(root: Path, path: Path) -> None:
    """The honest table, with one key of 1 MiB that 8,192 rows refer to: 8 GiB once unpacked."""
    table = pq.read_table(path)
    rows = pa.table({n: table[n].take(pa.array([0] * 8192)) for n in table.column_names})
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 8192, pa.int32()), ["k" * 2**20])
    number = table.column_names.index("key")
    rows = rows.set_column(number, pa.field("key", long.type, nullable=False), long)
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, compression="zstd", store_schema=False,
                   dictionary_pagesize_limit=2**24)  # fmt: skip
    path.write_bytes(buffer.getvalue().to_pybytes())
    reseal(root)


ALL = ("inspect", "verify", "train")
READS = ("verify", "train")
SAMPLE = ("sample", "verify")

# Name of the case -> what is done to the cache, which commands must refuse it, what they must name.
CACHES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "manifest: oversized": (lambda r: pad(r / "cache.json", 9 * 2**20), ALL, "cache.json"),
    "manifest: deep": (
        lambda r: (r / "cache.json").write_text("[" * 10**6), ALL, "cache.json"),
    "manifest: a million lists": (
        lambda r: (r / "cache.json").write_text('{"a":[' + "[]," * 2_600_000 + "[]]}"),
        ALL, "cache.json"),
    "manifest: a list": (lambda r: (r / "cache.json").write_text("[]"), ALL, "cache.json"),
    "manifest: wrong type": (set_manifest(classes=7), ALL, "cache.json"),
    "manifest: a long wrong value": (set_manifest(offset="\x1b[2J" * 10**6), ALL, "cache.json"),
    "manifest: unknown field": (set_manifest(surprise=1), ALL, "cache.json"),
    "manifest: many unknown fields": (
        set_manifest(**{f"x{i}": 1 for i in range(50_000)}), ALL, "cache.json"),
    "manifest: unknown version": (set_manifest(format_version=999), ALL, "cache.json"),
    "manifest: huge number": (set_manifest(format_version=10**4000), ALL, "cache.json"),
    "manifest: no splits": (set_manifest(splits={}), ALL, "cache.json"),
    "manifest: split name leads out": (
        set_manifest(splits={"../../outside": {"rows": 1, "views": 1, "shard_rows": 1}}),
        ALL, "cache.json"),
    "manifest: absolute path": (set_manifest(plan__path="/etc/passwd"), ALL, "cache.json"),
    "manifest: path leads out": (
        set_manifest(encoder__path="../../outside/secret.json"), ALL, "cache.json"),
    "manifest: backslash path": (
        set_manifest(files__0__path="..\\..\\outside\\secret.json"), ALL, "cache.json"),
    "manifest: 2**60 rows": (set_manifest(splits__train__rows=2**60), ALL, "cache.json"),
    "manifest: 2**39 rows": (set_manifest(splits__train__rows=2**39), ALL, "cache.json"),
    "manifest: a million rows": (set_manifest(splits__train__rows=2**20), ("train",), "train"),
    "manifest: 10**9 channels": (
        set_manifest(fingerprint__latent__channels=10**9), ALL, "cache.json"),
    "manifest: latents of 65536": (
        set_manifest(fingerprint__latent__height=65536, fingerprint__latent__width=65536),
        ALL, "cache.json"),
    "manifest: image of a million pixels": (
        set_manifest(fingerprint__image__size=2**20, fingerprint__image__resize_side=2**20,
                     fingerprint__latent__height=2**16, fingerprint__latent__width=2**16),
        ALL, "cache.json"),
    "manifest: 1024 views": (set_manifest(splits__train__views=1024), ALL, "cache.json"),
    "manifest: 2**20 rows per shard": (
        set_manifest(splits__train__shard_rows=2**20), ALL, "cache.json"),
    "manifest: offset that is no number": (set_manifest(offset__0=float("nan")), ALL, "cache.json"),
    "manifest: a pipe": (lambda r: replace(r / "cache.json", "pipe"), ALL, "cache.json"),
    "manifest: a device": (lambda r: replace(r / "cache.json", "device"), ALL, "cache.json"),
    "commits lead out": (lambda r: lead_out(r / "commits"), ALL, "commits"),
    "labels lead out": (
        lambda r: lead_out(r / "latents.zarr/train/labels"), ALL, "latents.zarr/train/labels"),
    "labels: other metadata": (
        lambda r: edit_json(r / "latents.zarr/train/labels/zarr.json", codecs__1__name="gzip"),
        ALL, "labels"),
    "labels: deep metadata": (
        lambda r: (r / "latents.zarr/train/labels/zarr.json").write_text("[" * 10**6),
        ALL, "labels"),
    "labels: a frame of 4 GiB": (
        lambda r: small_is(r, "labels", rle_frame(2**32, 2**32)), READS, "labels"),
    "labels: a frame that says less": (
        lambda r: small_is(r, "labels", rle_frame(64, 2**32)), READS, "labels"),
    "valid: a frame of 4 GiB": (
        lambda r: small_is(r, "valid", rle_frame(2**32, 2**32)), READS, "valid"),
    "labels: a pipe": (
        lambda r: replace(r / "latents.zarr/train/labels/c.0", "pipe"), READS, "labels"),
    "labels: a device": (
        lambda r: replace(r / "latents.zarr/train/labels/c.0", "device"), READS, "labels"),
    "shard: chunks of another size": (
        lambda r: rewrite_shard(r, chunk_is(rle_frame(2**33, 2**33))), READS, SHARD),
    "shard: chunks that say less": (
        lambda r: rewrite_shard(r, chunk_is(rle_frame(3072, 2**31))), READS, SHARD),
    "shard: index points outside": (lambda r: rewrite_shard(r, points_outside), READS, SHARD),
    "shard: chunks overlap": (lambda r: rewrite_shard(r, overlaps), READS, SHARD),
    "shard: a pipe": (lambda r: replace(r / SHARD, "pipe"), READS, SHARD),
    "shard: a device": (lambda r: replace(r / SHARD, "device"), READS, SHARD),
    "index: pages of 1 GiB": (
        lambda r: bomb_parquet(r, r / INDEX), SAMPLE, INDEX),
    "index: a dictionary of 8 GiB": (
        lambda r: dictionary_bomb(r, r / INDEX), SAMPLE, INDEX),
    "index: another schema": (
        lambda r: (pq.write_table(pa.table({"row": [1]}), r / INDEX), reseal(r)), SAMPLE, INDEX),
    "index: noise": (
        lambda r: ((r / INDEX).write_bytes(b"PAR1" + bytes(900) + b"PAR1"), reseal(r)),
        SAMPLE, INDEX),
    "index: a label of 10**9": (lambda r: label_is(r, 10**9), SAMPLE, INDEX),
    "index: a pipe": (lambda r: replace(r / INDEX, "pipe"), SAMPLE, INDEX),
    "commit: of another shard": (
        lambda r: shutil.copy(r / "commits/train-000001.json", r / COMMIT), READS, COMMIT),
    "commit: foreign paths": (
        lambda r: edit_json(r / COMMIT, files__0__path="../../outside/secret.json"),
        READS, COMMIT),
    "commit: absolute path": (
        lambda r: edit_json(r / COMMIT, files__1__path="/etc/passwd"), READS, COMMIT),
    "commit: oversized": (lambda r: pad(r / COMMIT, 9 * 2**20), READS, COMMIT),
    "commit: deep": (lambda r: (r / COMMIT).write_text('{"a":' * 10**6), READS, COMMIT),
    "commit: sizes that cannot be": (
        lambda r: edit_json(r / COMMIT, files__0__bytes=2**62), READS, "train"),
    "commit: a pipe": (lambda r: replace(r / COMMIT, "pipe"), READS, COMMIT),
    "encoder: header of 2**60 bytes": (
        lambda r: ((r / "encoder.safetensors").write_bytes(
            struct.pack("<Q", 2**60) + b"{}"), reseal(r)), ("picture",), "encoder.safetensors"),
    "encoder: a pickle": (
        lambda r: ((r / "encoder.safetensors").write_bytes(
            pickle.dumps(Harmful(r.parent / "canary"))), reseal(r)),
        ("picture",), "encoder.safetensors"),
    "encoder: another model": (
        lambda r: (safetensors.torch.save_file({"a": torch.zeros(9)},
                                               r / "encoder.safetensors"), reseal(r)),
        ("picture",), "encoder.safetensors"),
    "encoder: a pipe": (
        lambda r: replace(r / "encoder.safetensors", "pipe"), ("picture",), "encoder.safetensors"),
}  # fmt: skip


def small_is(root: Path, name: str, frame: bytes) -> None:
    (root / f"latents.zarr/train/{name}/c.0").write_bytes(frame)
    reseal(root)


def label_is(root: Path, label: int) -> None:
    table = pq.read_table(root / INDEX)
    labels = pa.array([label] * table.num_rows, pa.int32())
    number = table.column_names.index("label")
    table = table.set_column(number, table.schema.field("label"), labels)
    pq.write_table(table, root / INDEX)
    reseal(root)


@pytest.mark.parametrize("case", thinned(CACHES, step=12))
def test_a_hostile_cache_is_refused_by_every_command_that_would_use_it(
    warm: WarmParent, place: Path, case: str
) -> None:
    attack, names, named = CACHES[case]
    before = snapshot(place.parent / "outside")
    attack(place / "shards")
    for name in names:
        # Digests that were made to fit are no damage to `verify`; it may name the commit instead.
        codes, wanted = ({0, 3, 4, 5}, "") if name == "verify" else ({3, 4, 5}, named)
        refused(attacked(warm, *commands(place, name)), codes, wanted)
    assert snapshot(place.parent / "outside") == before
    assert not (place / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**60, 2, 192, 4, 4]},
        {"codecs": [{"name": "surprise"}]},
        {"chunk_grid__configuration__chunk_shape": [2**40, 2, 192, 4, 4]},
        {"storage_transformers": [{"name": "surprise"}]},
        {"codecs__0__configuration__chunk_shape": [8, 2, 192, 4, 4]},
        {"data_type": "float64"},
    ],
    ids=["shape", "codec", "shard", "transformer", "chunk", "dtype"],
)
def test_metadata_that_does_not_fit_the_manifest_opens_no_array(
    place: Path, change: dict[str, Any]
) -> None:
    shards = place / "shards"
    edit_json(shards / "latents.zarr/train/latents/zarr.json", **change)
    with pytest.raises(errors.ManifestError, match="was committed"):
        _ = cc.open_cache(shards)["train"].latents
    reseal(shards)
    with pytest.raises(errors.ManifestError, match=r"train/latents"):
        _ = cc.open_cache(shards)["train"].latents


def test_labels_that_changed_on_disk_are_never_trained_on(place: Path) -> None:
    path = place / "shards/latents.zarr/train/labels/c.0"
    other = place / "shards/latents.zarr/val/labels/c.0"
    path.write_bytes(other.read_bytes())
    with pytest.raises(errors.ManifestError, match=r"labels.*was committed"):
        _ = cc.open_cache(place / "shards")["train"].labels
    path.unlink()
    with pytest.raises(errors.ManifestError, match=r"labels.*No such file"):
        _ = cc.open_cache(place / "shards")["train"].labels


def test_an_intact_cache_passes_all_the_same_commands(warm: WarmParent, place: Path) -> None:
    reseal(place / "shards")
    for name in ("inspect", "sample", "picture", "verify", "train"):
        ran = attacked(warm, *commands(place, name))
        assert ran.code == 0, ran.err[-2000:]
        # Training itself, with freed activations kept for reuse, takes more than an attack may.
        assert ran.grown_bytes < (2 * MAX_GROWTH if name == "train" else MAX_GROWTH)
