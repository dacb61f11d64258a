"""Tensors of a checkpoint: read as safetensors wrote them, in no more memory than the file has."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import CheckpointError, ManifestError
from ci2p_cache.training.checkpoint import read_tensors


def recorded(path: Path, data: bytes) -> FileRecord:
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return FileRecord(path=path.name, bytes=len(data), sha256=digest)


def file_of(header: Any, body: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: Any, end: Any, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        **{str(d): torch.randn(3, 5).mul(50).to(d) for d in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.bool)},
        "bytes": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    record = recorded(path, safetensors.torch.save(tensors, metadata={"a": "b"}))
    found = read_tensors(path, record)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    found["scalar"].add_(1)
    assert torch.equal(found["bytes"], tensors["bytes"])


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    record = recorded(path, safetensors.torch.save({"a": torch.ones(2**22)}))
    tracemalloc.start()
    read_tensors(path, record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < record.bytes + 2**20


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "header of 0 bytes in 0"),
        (struct.pack("<Q", 2**60) + b"{}", f"header of {2**60} bytes"),
        (struct.pack("<Q", 5 * 2**20) + bytes(6 * 2**20), "header of 5242880 bytes"),
        (file_of(b"[]"), "damaged header"),
        (file_of(b"[" * 10**5), "damaged header"),
        (file_of({"a": entry(0, 64, [16], "F4")}), "damaged header"),
        (file_of({"a": {"dtype": "F32"}}), "damaged header"),
        (file_of({"a": entry(0, 64, [-4, -4])}), "damaged header"),
        (file_of({"a": entry(0, 64, [16.0])}), "damaged header"),
        (file_of({"a": entry(0, 64, [2**62, 2**62, 16])}), "damaged header"),
        (file_of({"a": entry(0, 2, [1], "I16"), "b": entry(2, 64, [15])}), "damaged header"),
        (file_of({"a": entry(0, 64, [16]), "b": entry(0, 64, [16])}), "overlap"),
        (file_of({"a": entry(4, 64, [15])}), "a gap at 4"),
        (file_of({"a": entry(0, 2**50, [2**48])}), "speaks of"),
        (file_of({"a": entry(0, 60, [15])}), "holds 64 bytes of tensors"),
        (file_of({}), "speaks of 0"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, content: bytes, match: str
) -> None:
    path = tmp_path / "model.safetensors"
    record = recorded(path, content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=match):
        read_tensors(path, record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(content) + 2**25


def test_another_size_digest_or_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    record = recorded(path, safetensors.torch.save({"a": torch.ones(9)}))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        read_tensors(path, record)
    path.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match=f"{len(data)} bytes, now {len(data) - 4} bytes"):
        read_tensors(path, record)
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(ManifestError, match="link"):
        read_tensors(path, record)


def test_a_sparse_file_that_fits_no_memory_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 2**45
    head = file_of({"a": entry(0, size, [size], "U8")}, b"")
    path.write_bytes(head)
    with path.open("r+b") as file:
        try:
            file.truncate(len(head) + size)
        except OSError:
            pytest.skip("this file system holds no file of 32 TiB")
    with pytest.raises(CheckpointError, match="more than memory"):
        read_tensors(path, FileRecord(path=path.name, bytes=len(head) + size, sha256="0" * 64))
