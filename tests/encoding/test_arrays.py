"""Labels and valid: verify holds them against the index, repair makes them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

import ci2p_cache as cc
from ci2p_cache.cache.codecs import FRAMES
from ci2p_cache.parquet import parquet_bytes
from tests.support.caches import data_digests, flip, swap, with_options
from tests.support.pictures import write_image_folder
from tests.support.seals import reseal, write_json
from tests.support.tiers import thinned

NAMES = ("labels", "valid")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged cache of 14 images and one that is none; read only."""
    root = tmp_path_factory.mktemp("arrays")
    write_image_folder(root / "src", {"ant": 5, "bee": 5, "cat": 4})
    (root / "src" / "bee" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    cc.encode(root / "src", root / "shards", with_options(max_errors="1"))
    return root / "shards"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


def array(name: str, split: str = "train") -> str:
    return f"latents.zarr/{split}/{name}/c.0"


def write_array(root: Path, name: str, values: np.ndarray) -> None:
    codec = FRAMES(level=1, chunk_bytes=values.nbytes)
    (root / array(name)).write_bytes(codec.encode(memoryview(values.tobytes())))


def labels_read_by_zarr(root: Path) -> list[int]:
    found: Any = zarr.open_array(root / "latents.zarr/train/labels", mode="r")
    return found[:].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["damaged", "missing", "swapped"])
def test_an_array_that_is_not_what_was_committed_is_named_once_and_mended(
    cache: Path, whole: Path, name: str, how: str
) -> None:
    wanted = {array(name)}
    if how == "damaged":
        flip(cache / array(name))
    elif how == "missing":
        (cache / array(name)).unlink()
    else:
        swap(cache / array(name), cache / array(name, "val"))
        wanted.add(array(name, "val"))
    assert [f.path for f in cc.verify(cache)] == sorted(wanted)
    summary = cc.repair(cache)
    assert (summary.remaining, set(summary.repaired)) == ((), wanted)
    assert summary.identical
    assert data_digests(cache) == data_digests(whole)


@pytest.mark.parametrize("name", thinned(NAMES, step=3))
@pytest.mark.parametrize(
    "how",
    thinned(["other values", "another length", "no frame", "not listed", "metadata not listed"]),
)
def test_an_array_whose_digest_fits_is_still_held_against_the_index(
    cache: Path, whole: Path, name: str, how: str
) -> None:
    path = array(name)
    values = getattr(cc.open_cache(cache)["train"], name).copy()
    if how == "other values":
        values[5] = (values[5] + 1) % 2
        write_array(cache, name, values)
    elif how == "another length":
        write_array(cache, name, values[:-1])
    elif how == "no frame":
        (cache / path).write_bytes(b"no zstd frame at all")
    else:
        path = path if how == "not listed" else path.replace("c.0", "zarr.json")
        data = json.loads((cache / "cache.json").read_text())
        data["files"] = [file for file in data["files"] if file["path"] != path]
        write_json(cache / "cache.json", data)
    reseal(cache)
    findings = cc.verify(cache)
    assert path in {finding.path for finding in findings}, findings
    if how == "other values":
        (finding,) = (f for f in findings if f.path == path)
        assert "(shards train 1)" in finding.problem
        assert (finding.kind, finding.split) == ("damaged", "train")
    summary = cc.repair(cache)
    assert path in summary.repaired
    assert summary.remaining == ()
    assert cc.verify(cache) == []
    shards = {p: d for p, d in data_digests(whole).items() if "/c." in p or "index" in p}
    assert shards.items() <= data_digests(cache).items()


def test_where_the_index_is_the_one_that_is_wrong_its_shard_is_encoded_again(
    cache: Path, whole: Path
) -> None:
    path = cache / "index/train-000001.parquet"
    table = pq.read_table(path)
    number = table.column_names.index("label")
    labels = pa.array([(label + 1) % 3 for label in table["label"].to_pylist()], pa.int32())
    table = table.set_column(number, table.schema.field("label"), labels)
    path.write_bytes(parquet_bytes(table))
    reseal(cache)
    before = labels_read_by_zarr(cache)
    assert array("labels") in {finding.path for finding in cc.verify(cache)}
    summary = cc.repair(cache)
    assert summary.shards == 1
    assert cc.verify(cache) == []
    assert labels_read_by_zarr(cache) == before == labels_read_by_zarr(whole)
    assert path.read_bytes() == (whole / "index/train-000001.parquet").read_bytes()


def test_a_quick_verify_leaves_the_arrays_to_their_digests(cache: Path) -> None:
    flip(cache / array("labels"))
    assert [f.path for f in cc.verify(cache, quick=True)] == [array("labels")]


def test_an_array_is_held_against_the_index_parts_that_can_be_read(cache: Path) -> None:
    flip(cache / "index/train-000000.parquet")
    values = cc.open_cache(cache)["train"].labels.copy()
    values[5] = (values[5] + 1) % 3
    write_array(cache, "labels", values)
    data = json.loads((cache / "cache.json").read_text())
    content = (cache / array("labels")).read_bytes()
    for entry in data["files"]:
        if entry["path"] == array("labels"):
            import hashlib

            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(cache / "cache.json", data)
    found = {finding.path: finding.problem for finding in cc.verify(cache)}
    assert set(found) == {"index/train-000000.parquet", array("labels")}
    assert "(shards train 1)" in found[array("labels")]
