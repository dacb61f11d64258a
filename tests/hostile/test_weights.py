"""Weights files that would like to be programs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hostile.attacks import Harmful, attacked, refused
from tests.support.tiers import thinned
from tests.support.warm import WarmParent


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


@pytest.mark.parametrize("case", thinned(WEIGHTS))
def test_hostile_weights_are_refused_before_anything_is_written(
    warm: WarmParent, good: Path, tmp_path: Path, case: str
) -> None:
    name, make = WEIGHTS[case]
    canary, weights = tmp_path / "canary", tmp_path / name
    make(weights, canary)
    ran = attacked(
        warm,
        "encode",
        good / "src",
        "--out",
        tmp_path / "out",
        "--size",
        "64",
        "--weights",
        weights,
    )
    refused(ran, {3}, name)
    assert not canary.exists()
    assert not (tmp_path / "out" / "cache.json").exists()
