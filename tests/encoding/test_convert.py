"""Converting: one format into another and back to the same bytes, or into plain arrays."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.lock import locked
from tests.support.caches import data_digests
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zarr cache of 21 images with a bad one, level 3, in shards of 4; read only."""
    root = tmp_path_factory.mktemp("convert")
    source = write_image_folder(root / "src", {"ant": 9, "bee": 7, "cat": 5})
    (source / "bee" / "002.jpg").write_bytes(b"no image")
    options = cc.EncodeOptions(
        encoder="bundled", size=32, shard_samples=4, val_fraction=0.25, max_errors="1", level=3
    )
    cc.encode(source, root / "shards", options)
    return root / "shards"


@pytest.fixture(scope="module")
def arrays(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as plain arrays; read only."""
    out = tmp_path_factory.mktemp("arrays") / "arrays"
    summary = cc.convert(shards, out, format="npy")
    assert (summary.images, summary.shards) == (20, 6)
    return out


def values(path: Path) -> dict[str, list[torch.Tensor]]:
    cache = cc.open_cache(path)
    return {name: [split[int(r)][0] for r in split.valid_rows] for name, split in cache.items()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


class TestCaches:
    def test_to_tars_and_back_gives_the_same_bytes_in_every_file(
        self, shards: Path, tmp_path: Path
    ) -> None:
        seen: list[tuple[int, int]] = []
        first = cc.convert(
            shards, tmp_path / "tars", format="webdataset", on_shard=lambda *n: seen.append(n)
        )
        assert (first.converted_now, first.shards, first.images) == (6, 6, 20)
        assert seen[-1] == (6, 6)
        assert cc.verify(tmp_path / "tars") == []
        cc.convert(tmp_path / "tars", tmp_path / "back", format="zarr")
        assert data_digests(tmp_path / "back") == data_digests(shards)

    @pytest.mark.parametrize("format", ["webdataset", "both"])
    def test_it_is_what_encode_would_have_written(
        self, shards: Path, tmp_path: Path, format: Any
    ) -> None:
        cc.convert(shards, tmp_path / "converted", format=format)
        options = cc.EncodeOptions(
            encoder="bundled", size=32, shard_samples=4, val_fraction=0.25, max_errors="1",
            level=3, format=format,
        )  # fmt: skip
        cc.encode(shards.parent / "src", tmp_path / "encoded", options)
        assert data_digests(tmp_path / "converted") == data_digests(tmp_path / "encoded")

    def test_codec_and_level_may_change_and_no_value_does(
        self, shards: Path, tmp_path: Path
    ) -> None:
        cc.convert(shards, tmp_path / "raw", format="zarr", codec="none")
        cc.convert(tmp_path / "raw", tmp_path / "small", format="zarr", codec="zstd", level=9)
        for name, codec, level in (("raw", "none", 3), ("small", "zstd", 9)):
            cache = cc.open_cache(tmp_path / name)
            assert (cache.manifest.layout.codec, cache.manifest.layout.level) == (codec, level)
            assert cache.fingerprint == cc.open_cache(shards).fingerprint
            assert cc.verify(tmp_path / name) == []
            wanted, found = values(shards), values(tmp_path / name)
            for split, own in wanted.items():
                assert all(torch.equal(a, b) for a, b in zip(own, found[split], strict=True))

    def test_killed_at_any_time_it_goes_on_to_the_same_bytes(
        self, warm: WarmParent, shards: Path, tmp_path: Path
    ) -> None:
        cc.convert(shards, tmp_path / "whole", format="both")
        out = tmp_path / "out"
        process = warm.start("convert", shards, "--out", out, "--format", "both")
        while process.poll() is None and len(list(out.glob("commits/*.json"))) < 2:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        committed = len(list(out.glob("commits/*.json")))
        if not (out / "README.md").exists():
            with pytest.raises(errors.IncompleteCacheError):
                cc.open_cache(out)
        summary = cc.convert(shards, out, format="both")
        assert summary.converted_now == 6 - committed
        assert data_digests(out) == data_digests(tmp_path / "whole")
        assert cc.convert(shards, out, format="both").converted_now == 0

    @pytest.mark.slow
    def test_a_shard_that_was_damaged_since_is_converted_again(
        self, shards: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        cc.convert(shards, out, format="webdataset")
        before = data_digests(out)
        flip(out / "tar/train-000001.tar")
        (out / "commits/val-000000.json").write_text("{}")
        assert cc.convert(shards, out, format="webdataset").converted_now == 2
        assert data_digests(out) == before

    def test_a_damaged_shard_ends_it_with_its_rows_and_the_new_cache_does_not_count(
        self, shards: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(shards, broken)
        flip(broken / "latents.zarr/train/latents/c.2.0.0.0.0")
        with pytest.raises(errors.ShardError, match=r"shard 2 \(rows 8 to 11\)") as refused:
            cc.convert(broken, tmp_path / "out", format="webdataset")
        assert "--repair" in str(refused.value.hint)
        with pytest.raises(errors.IncompleteCacheError, match="2 of 6 shards"):
            cc.open_cache(tmp_path / "out")
        assert cc.convert(shards, tmp_path / "out", format="webdataset").converted_now == 4

    @pytest.mark.parametrize(
        "path", ["index/train-000001.parquet", "plan.parquet", "encoder.safetensors"]
    )
    def test_other_damage_is_named(self, shards: Path, tmp_path: Path, path: str) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(shards, broken)
        flip(broken / path)
        with pytest.raises(errors.IntegrityError, match=path):
            cc.convert(broken, tmp_path / "out", format="webdataset")


class TestRefused:
    def test_a_place_inside_the_cache_or_around_it(self, shards: Path) -> None:
        for out in (shards / "new", shards, shards.parent):
            with pytest.raises(errors.UsageError, match="are in each other"):
                cc.convert(shards, out, format="webdataset")

    @pytest.mark.parametrize("format", ["zarr", "npy"])
    def test_a_folder_of_something_else(self, shards: Path, tmp_path: Path, format: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        (tmp_path / "file").write_text("x")
        for name in ("out", "file"):
            with pytest.raises(errors.NotACacheError):
                cc.convert(shards, tmp_path / name, format=format)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]

    @pytest.mark.slow
    def test_a_cache_of_another_layout_or_of_other_images(
        self, shards: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        cc.convert(shards, out, format="webdataset")
        before = data_digests(out)
        with pytest.raises(errors.FingerprintMismatchError, match="format: 'webdataset'"):
            cc.convert(shards, out, format="both")
        source = write_image_folder(tmp_path / "src", {"ant": 8, "bee": 1})
        options = cc.EncodeOptions(
            encoder="bundled", size=32, shard_samples=4, val_fraction=0.25, level=3
        )
        cc.encode(source, tmp_path / "other", options)
        with pytest.raises(errors.FingerprintMismatchError, match="other images"):
            cc.convert(tmp_path / "other", out, format="webdataset")
        assert data_digests(out) == before

    def test_a_folder_that_another_process_writes_to(self, shards: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with locked(tmp_path / "out/.lock", what="convert"):
            with pytest.raises(errors.LockedError):
                cc.convert(shards, tmp_path / "out", format="zarr")
        with locked(tmp_path / ".arrays.converting.lock", what="convert"):
            with pytest.raises(errors.LockedError):
                cc.convert(shards, tmp_path / "arrays", format="npy")

    def test_a_cache_that_is_not_complete(self, shards: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(shards, broken)
        flip(broken / "latents.zarr/train/latents/c.2.0.0.0.0")
        with pytest.raises(errors.ShardError):
            cc.convert(broken, tmp_path / "half", format="webdataset")
        with pytest.raises(errors.IncompleteCacheError):
            cc.convert(tmp_path / "half", tmp_path / "out", format="zarr")

    def test_values_that_make_no_sense(self, shards: Path, tmp_path: Path) -> None:
        with pytest.raises(errors.UsageError, match="not compressed"):
            cc.convert(shards, tmp_path / "out", format="npy", level=3)
        with pytest.raises(errors.UsageError, match="`level` is 99"):
            cc.convert(shards, tmp_path / "out", format="zarr", level=99)
        assert not (tmp_path / "out").exists()


class TestArrays:
    def test_they_hold_the_valid_rows_and_what_the_index_says(
        self, shards: Path, arrays: Path
    ) -> None:
        import pandas

        cache = cc.open_cache(shards)
        told = json.loads((arrays / "latents.json").read_text())
        assert told["classes"] == list(cache.classes)
        assert told["fingerprint_sha256"] == cache.fingerprint.digest
        for name, split in cache.items():
            stored = np.load(arrays / f"{name}.npy", allow_pickle=False, mmap_mode="r")
            table = pandas.read_parquet(arrays / f"{name}.parquet")
            assert table["row"].tolist() == split.valid_rows.tolist()
            assert table["label"].tolist() == split.labels[split.valid].tolist()
            assert stored.shape == (len(split.valid_rows), *split.shape[1:])
            offset = np.asarray(told["offset"], np.float32)[:, None, None]
            y = stored.astype(np.float32) * np.float32(told["scale"]) + offset
            for found, row in zip(y, split.valid_rows, strict=True):
                assert torch.equal(torch.from_numpy(found), split[int(row)][0])

    def test_their_checksums_are_listed(self, arrays: Path) -> None:
        lines = (arrays / "checksums.sha256").read_text().splitlines()
        names = {path.name for path in arrays.iterdir()} - {"checksums.sha256"}
        assert {line.partition("  ")[2] for line in lines} == names
        for line in lines:
            digest, _, name = line.partition("  ")
            assert hashlib.sha256((arrays / name).read_bytes()).hexdigest() == digest

    def test_from_tars_they_are_the_same(self, shards: Path, arrays: Path, tmp_path: Path) -> None:
        cc.convert(shards, tmp_path / "tars", format="webdataset")
        (tmp_path / "again").mkdir()
        cc.convert(tmp_path / "tars", tmp_path / "again", format="npy")
        assert data_digests(tmp_path / "again") == data_digests(arrays)

    def test_damage_leaves_nothing_behind(self, shards: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(shards, broken)
        flip(broken / "latents.zarr/val/latents/c.0.0.0.0.0")
        with pytest.raises(errors.ShardError, match="split 'val' shard 0"):
            cc.convert(broken, tmp_path / "out", format="npy")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    def test_what_a_killed_one_left_is_replaced_and_never_taken_for_whole(
        self, shards: Path, arrays: Path, tmp_path: Path
    ) -> None:
        left = tmp_path / ".out.converting"
        left.mkdir()
        (left / "train.npy").write_bytes(b"half")
        cc.convert(shards, tmp_path / "out", format="npy")
        assert data_digests(tmp_path / "out") == data_digests(arrays)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        with pytest.raises(errors.NotACacheError):
            cc.convert(shards, tmp_path / "out", format="npy")


class TestCommand:
    def test_it_tells_and_takes_json(
        self, run: Callable[..., Ran], shards: Path, tmp_path: Path
    ) -> None:
        ran = run("convert", shards, "--out", tmp_path / "tars", "--format", "webdataset")
        assert ran.code == 0, ran.err
        assert "20 images as webdataset" in ran.out
        ran = run("convert", shards, "--out", tmp_path / "tars", "--format", "webdataset", "--json")
        assert json.loads(ran.out)["converted_now"] == 0
        ran = run("convert", shards, "--out", tmp_path / "x", "--format", "npy", "--level", "2")
        assert ran.code == 2
        ran = run("convert", tmp_path, "--out", tmp_path / "x", "--format", "npy")
        assert ran.code == 4


def test_the_index_is_read_by_pandas_as_the_readme_says(shards: Path) -> None:
    # README, "What is on disk".
    import pandas

    table = pandas.read_parquet(shards / "index")
    assert len(table) == 21
    assert set(table["class"]) == {"ant", "bee", "cat"}
    assert (table["status"] == "ok").sum() == 20


def test_the_index_is_read_by_datasets_as_the_readme_says(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    files = [str(path) for path in sorted(shards.glob("index/train-*.parquet"))]
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    wanted = pq.read_table(files).to_pylist()
    assert found["key"] == [row["key"] for row in wanted]


def test_the_index_is_read_by_duckdb_as_the_readme_says(shards: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="the package `duckdb` is not installed")
    query = f"SELECT class, count(*) FROM '{shards}/index/*.parquet' GROUP BY class ORDER BY class"
    assert duckdb.sql(query).fetchall() == [("ant", 9), ("bee", 7), ("cat", 5)]
