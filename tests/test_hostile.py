"""R8: what a stranger sends costs an exit code and nothing else: no code run, no memory, no file.

Each case is made as somebody would who knows the format: digests are made to fit where the attack
does not lie in the digest itself.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
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
from tests.arena import Arena, Ran
from tests.conftest import write_image_folder
from tests.seals import digest, reseal, write_json

MAX_GROWTH = 300 * 2**20
TRAIN = ("--model", "vitds_tiny", "--epochs", "1", "--batch-size", "8", "--device", "cpu")
SHARD = "latents.zarr/train/latents/c.0.0.0.0.0"
INDEX = "index/train-000000.parquet"
COMMIT = "commits/train-000000.json"


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with Arena(tmp_path_factory.mktemp("arena")) as arena:
        yield arena


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `src`, a cache `shards` of 16 + 4 images and a run `runs/run`; read only."""
    root = tmp_path_factory.mktemp("good")
    write_image_folder(root / "src" / "train", {"ant": 9, "bee": 7})
    write_image_folder(root / "src" / "val", {"ant": 2, "bee": 2}, quality=60)
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=8)
    cc.encode(root / "src", root / "shards", options)
    spec = cc.TrainSpec(model="vitds_tiny", epochs=1, batch_size=8)
    cc.train(root / "shards", spec=spec, runs_dir=root / "runs", name="run", device="cpu")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy to be attacked, with an `outside` beside it that nothing may touch."""
    shutil.copytree(good, tmp_path / "place", symlinks=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"secret": 1}')
    (outside / "epoch-0009-step-000000").mkdir()
    return tmp_path / "place"


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(ran: Ran, codes: set[int], name: str) -> None:
    """One error with its exit code that names the file; no traceback, no escapes, little memory."""
    text = ran.out + ran.err
    assert "Traceback" not in text, text[-3000:]
    assert ran.code in codes, text[-3000:]
    assert name in text, text[-3000:]
    assert len(text) < 50_000
    assert "\x1b" not in text
    assert ran.grown_bytes < MAX_GROWTH, f"{ran.grown_bytes / 2**20:.0f} MiB"


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields by dotted names, numbers being places in a list: `a__b__0=1`."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        target = data
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        target[int(last) if last.isdigit() else last] = value
    write_json(path, data)


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


def pad(path: Path, size: int) -> None:
    text = path.read_text()
    path.write_text(text + " " * (size - len(text)))


def replace(path: Path, kind: str) -> None:
    """Puts something that is no file in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def set_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        edit_json(root / "cache.json", **changes)
        reseal(root)

    return change


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


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def lead_out(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(outside_of(folder))


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


def commands(place: Path, name: str) -> tuple[Any, ...]:
    shards = place / "shards"
    return {
        "inspect": ("inspect", shards),
        "sample": ("inspect", shards, "--row", "0", "--split", "train"),
        "picture": ("inspect", shards, "--picture", place / "look.png"),
        "verify": ("verify", shards),
        "train": ("train", shards, *TRAIN, "--runs", place / "new"),
    }[name]


@pytest.mark.parametrize("case", CACHES)
def test_a_hostile_cache_is_refused_by_every_command_that_would_use_it(
    arena: Arena, place: Path, case: str
) -> None:
    attack, names, named = CACHES[case]
    before = snapshot(place.parent / "outside")
    attack(place / "shards")
    for name in names:
        # Digests that were made to fit are no damage to `verify`; it may name the commit instead.
        codes, wanted = ({0, 3, 4, 5}, "") if name == "verify" else ({3, 4, 5}, named)
        refused(arena.run(*commands(place, name)), codes, wanted)
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


# --- names --------------------------------------------------------------------------------------

NAMES = {
    "html": "<script>alert(1)</script>",
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "c1 escape": "\x9b31mred",
    "markup": "[bold red]x[/bold red][/]",
    "newline": "a\nerror: all is well\r",
    "direction": "\u202egpj.exe\u2066",
    "long": "x" * 10**6,
}


@pytest.mark.parametrize("kind", NAMES)
def test_class_names_reach_the_terminal_as_plain_text(arena: Arena, place: Path, kind: str) -> None:
    name = NAMES[kind]
    set_manifest(classes__0=name, class_titles__0=name, source=name, software=name)(
        place / "shards"
    )
    for argv in (commands(place, "inspect"), commands(place, "verify"), commands(place, "sample")):
        ran = arena.run(*argv)
        assert ran.code == 0, ran.err[-2000:]
        text = (ran.out + ran.err).replace("\n", "")
        assert text.isprintable(), ascii(text[:3000])
        assert len(text) < 50_000
        assert ran.grown_bytes < MAX_GROWTH
    plain = arena.run(*commands(place, "inspect")).out
    assert "error: all is well" not in plain.splitlines()
    if kind in ("html", "markup"):
        assert name in plain
    assert json.loads(arena.run(*commands(place, "inspect"), "--json").out)["classes"][0] == name


# --- weights ------------------------------------------------------------------------------------


def zip_of(path: Path, payload: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """What torch.save writes, with another data.pkl."""
    torch.save({"g_a.0.weight": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, payload if name.endswith("data.pkl") else content)


def allocating(size: int) -> bytes:
    """A pickle that asks for a bytearray of `size` bytes, which torch's own loader grants."""
    call = b"cbuiltins\nbytearray\nq\0J" + size.to_bytes(4, "little") + b"\x85R"
    return b"\x80\x02}q\x01X\x01\0\0\0a" + call + b"s."


def tensors_file(header: dict[str, Any] | bytes, body: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def f32(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


WEIGHTS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "pickle in a zip": ("a.pth.tar", lambda p, c: zip_of(p, pickle.dumps({"x": Harmful(c)}, 2))),
    "pickle alone": ("a.pth", lambda p, c: p.write_bytes(pickle.dumps(Harmful(c), 2))),
    "pickle called safetensors": (
        "a.safetensors", lambda p, c: p.write_bytes(pickle.dumps(Harmful(c), 2))),
    "legacy torch pickle": (
        "a.pt", lambda p, c: torch.save(
            {"x": Harmful(c)}, p, _use_new_zipfile_serialization=False)),
    "bytearray of 2 GB in a zip": ("a.pth", lambda p, c: zip_of(p, allocating(2 * 10**9))),
    "bytearray of 2 GB alone": (
        "a.pth", lambda p, c: p.write_bytes(
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
            + pickle.dumps({"little_endian": True}, 2) + allocating(2 * 10**9))),
    "zip bomb": (
        "a.pth", lambda p, c: zip_of(p, bytes(2**28), compression=zipfile.ZIP_DEFLATED)),
    "header of 2**60 bytes": (
        "a.safetensors", lambda p, c: p.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
    "header of 90 MB": (
        "a.safetensors", lambda p, c: p.write_bytes(struct.pack("<Q", 9 * 10**7) + b"{" * 99)),
    "deep header": ("a.safetensors", lambda p, c: p.write_bytes(tensors_file(b'{"a":' * 10**5))),
    "tensors that overlap": (
        "a.safetensors", lambda p, c: p.write_bytes(
            tensors_file({"a": f32(0, 64, [16]), "b": f32(0, 64, [16])}))),
    "tensors outside the file": (
        "a.safetensors", lambda p, c: p.write_bytes(tensors_file({"a": f32(0, 2**50, [2**48])}))),
    "a shape that overflows": (
        "a.safetensors", lambda p, c: p.write_bytes(
            tensors_file({"a": f32(0, 64, [2**62, 2**62, 16])}))),
    "two tensors of one name": (
        "a.safetensors", lambda p, c: p.write_bytes(
            tensors_file(b'{"a":%b,"a":%b}' % (
                json.dumps(f32(0, 32, [8])).encode(), json.dumps(f32(32, 64, [8])).encode())))),
    "a pipe": ("a.pth", lambda p, c: os.mkfifo(p)),
    "a pipe of safetensors": ("a.safetensors", lambda p, c: os.mkfifo(p)),
    "a device": ("a.safetensors", lambda p, c: p.symlink_to("/dev/zero")),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_hostile_weights_are_refused_before_anything_is_written(
    arena: Arena, good: Path, tmp_path: Path, case: str
) -> None:
    name, make = WEIGHTS[case]
    canary, weights = tmp_path / "canary", tmp_path / name
    make(weights, canary)
    ran = arena.run(
        "encode", good / "src", "--out", tmp_path / "out", "--size", "64", "--weights", weights
    )
    refused(ran, {3}, name)
    assert not canary.exists()
    assert not (tmp_path / "out" / "cache.json").exists()


# --- runs ---------------------------------------------------------------------------------------

NEWEST = "checkpoints/epoch-0001-step-000000"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def outside_of(run: Path) -> Path:
    return next(p for p in run.parents if p.name == "place").parent / "outside"


def link_out(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside_of(path))


def set_digests(run: Path, files: list[dict[str, Any]]) -> None:
    (run / NEWEST / "digests.json").write_text(json.dumps({"version": 1, "files": files}))


def unsafe_model(run: Path) -> None:
    folder = run / NEWEST
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harmful(run.parent.parent / "canary")))
    listing = json.loads((folder / "digests.json").read_text())
    for entry in listing["files"]:
        data = (folder / entry["path"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), digest(data)
    set_digests(run, listing["files"])


def evil_tag(run: Path) -> None:
    text = f"!!python/object/apply:os.mkdir [{run.parent.parent / 'canary'}]\n"
    (run / "args.yaml").write_text(text)


RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "args: aliases": (lambda r: (r / "args.yaml").write_text(BOMB), "args.yaml"),
    "args: merged aliases": (lambda r: (r / "args.yaml").write_text(MERGE), "args.yaml"),
    "args: a python call": (evil_tag, "args.yaml"),
    "args: oversized": (lambda r: (r / "args.yaml").write_text("[]," * 10**6), "args.yaml"),
    "args: deep": (lambda r: (r / "args.yaml").write_text("[" * 60_000), "args.yaml"),
    "args: a pipe": (lambda r: replace(r / "args.yaml", "pipe"), "args.yaml"),
    "args: a device": (lambda r: replace(r / "args.yaml", "device"), "args.yaml"),
    "checkpoints lead out": (lambda r: link_out(r / "checkpoints"), "checkpoints"),
    "curves lead out": (lambda r: link_out(r / "tensorboard"), "tensorboard"),
    "lock leads out": (lambda r: (r / ".lock").symlink_to(outside_of(r) / "secret.json"), ".lock"),
    "staging leads out": (lambda r: link_out(r / ".staging"), ".staging"),
    "checkpoint leads out": (lambda r: link_out(r / NEWEST), "epoch-0001"),
    "checkpoint: foreign paths": (
        lambda r: set_digests(r, [{"path": "../../../outside/secret.json", "bytes": 1,
                                   "sha256": "0" * 64}]), "epoch-0001"),
    "checkpoint: absolute path": (
        lambda r: set_digests(r, [{"path": "/dev/zero", "bytes": 0, "sha256": "0" * 64}]),
        "epoch-0001"),
    "checkpoint: a pickle": (unsafe_model, "epoch-0001"),
    "checkpoint: a pipe": (lambda r: replace(r / NEWEST / "state.json", "pipe"), "epoch-0001"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_hostile_run_folder_is_refused(arena: Arena, place: Path, case: str) -> None:
    attack, named = RUNS[case]
    before = snapshot(place.parent / "outside")
    attack(place / "runs" / "run")
    argv = ("train", place / "shards", *TRAIN, "--runs", place / "runs", "--name", "run")
    refused(arena.run(*argv), {4, 5}, named)
    assert snapshot(place.parent / "outside") == before
    assert not (place / "canary").exists()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("checkpoints/last.json", '{"last": "../../../outside/epoch-0009-step-000000"}'),
        ("checkpoints/last.json", '{"last": {"a": ["epoch-0001"]}}'),
        ("checkpoints/last.json", "[" * 10**6),
        ("model.json", '{"model": "!!python/object"}'),
        ("model.json", "[" * 10**6),
        ("summary.csv", "=cmd|' /C calc'!A0\n"),
    ],
)
def test_what_a_run_folder_only_tells_others_is_not_believed(
    arena: Arena, place: Path, path: str, text: str
) -> None:
    before = snapshot(place.parent / "outside")
    (place / "runs/run" / path).write_text(text)
    argv = ("train", place / "shards", *TRAIN, "--runs", place / "runs", "--name", "run")
    ran = arena.run(*argv)
    assert ran.code == 0, ran.err[-2000:]
    assert "Traceback" not in ran.err
    assert ran.grown_bytes < MAX_GROWTH
    assert snapshot(place.parent / "outside") == before


def test_an_intact_cache_passes_all_the_same_commands(arena: Arena, place: Path) -> None:
    reseal(place / "shards")
    for name in ("inspect", "sample", "picture", "verify", "train"):
        ran = arena.run(*commands(place, name))
        assert ran.code == 0, ran.err[-2000:]
        # Training itself, with freed activations kept for reuse, takes more than an attack may.
        assert ran.grown_bytes < (2 * MAX_GROWTH if name == "train" else MAX_GROWTH)
