"""The benchmarks run: their rows are there, and equal data were read. Nothing is timed here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ci2p_cache.specs import CodecName
from tests.benchmarks import loader, size
from tests.benchmarks.contestants import Contestant
from tests.benchmarks.measure import Rates, rotated
from tests.benchmarks.peers import Shelf, peers
from tests.benchmarks.stores import Data, generated, read_data, write_cache
from tests.benchmarks.targets import ratio_table
from tests.benchmarks.workers import Worker


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return read_data(generated(tmp_path_factory.mktemp("base"), per_class=1, size=64), 24)


@pytest.mark.slow
def test_the_loader_benchmark_gives_every_row_of_ours_and_of_the_limits(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    assert loader.main(
        ["--cache", str(data.base.path), "--samples", "12", "--batch", "4", "--threads", "1",
         "--seconds", "0.001", "--repeats", "2", "--only", "ours|bare|gather|mem|npy|webd",
         "--markdown", "--json", str(found)]
    ) == 0  # fmt: skip
    record = json.loads(found.read_text())
    keys = set(record["rates"])
    assert {"ours zstd", "ours zstd stored", "ours none stored", "ours many", "ours zstd owned",
            "bare zstd", "bare zstd float", "gather", "memmap"} <= keys  # fmt: skip
    assert all(len(values) == 2 for values in record["rates"].values())
    text = capsys.readouterr().out
    for words in (
        "| ours zstd stored | bare zstd |",
        "ours, none, 12 shards",
        "| True | int8 |",
        "| False | float32 |",
    ):
        assert words in text
    assert str(tmp_path.parent) not in text + found.read_text()


def test_a_contestant_that_reads_other_values_ends_the_benchmark(data: Data) -> None:
    def stream():
        while True:
            yield np.array([1, 0]), data.latents[:2]

    wrong = Contestant(key="wrong", name="wrong", stream=stream)
    with pytest.raises(SystemExit, match=r"(?s)wrong.*it reads other values"):
        Worker(wrong, data, samples=4)


def test_a_contestant_that_ends_or_fails_ends_the_benchmark(data: Data) -> None:
    def contestant(stream):
        return Contestant(key="lost", name="lost", stream=stream)

    def failing():
        raise RuntimeError("no such store")

    with pytest.raises(SystemExit, match=r"(?s)lost.*no such store"):
        Worker(contestant(failing), data, samples=4)
    with pytest.raises(SystemExit, match=r"lost.*ended by itself"):
        Worker(contestant(lambda: iter([os._exit(3)])), data, samples=4)


def test_a_peer_that_is_not_installed_is_a_row_and_no_failure(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.peers.installed", lambda name: None)
    split = write_cache(tmp_path / "zstd", data, codec="zstd", shard_samples=10)
    found, missing = peers(Shelf(data, tmp_path, 4, split, split), [1])
    ours = {"ours DataLoader", "ours as_dataset", "ours indexed"}
    assert {each.key for each in found} == {"npy files", *ours}
    assert {lack.reason for lack in missing} == {"not installed"}
    table = loader.rate_table({}, missing, loader.Settings())
    assert [row[:2] for row in table.rows] == [[lack.name, "not installed"] for lack in missing]


def test_the_stores_hold_the_latents_at_their_rows(data: Data, tmp_path: Path) -> None:
    cases: list[tuple[CodecName, int]] = [("zstd", 1), ("lz4", 3), ("none", 1)]
    for codec, level in cases:
        split = write_cache(
            tmp_path / f"{codec}{level}", data, codec=codec, level=level, shard_samples=10
        )
        assert np.array_equal(split.latents[:, 0], data.latents)
    assert data.distinct == 10
    assert np.array_equal(data.latents[10:20], data.latents[:10])


@pytest.mark.slow
def test_the_size_benchmark_gives_every_row(data: Data, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    images = data.base.path.parent / "pictures"
    assert size.main(
        [str(images), "--size", "64", "--repeats", "2", "--count", "3", "--levels=1,2",
         "--json", str(found)]
    ) == 0  # fmt: skip
    tables = list(json.loads(found.read_text())["tables"].values())
    sizes = {row["stored as"]: float(row["bytes"].replace(",", "")) for row in tables[0]}
    assert sizes["int8, none"] == 192 * 4 * 4 + 4
    assert sizes["float16, none"] - 4 == 2 * (sizes["int8, none"] - 4)
    assert sizes["entropy bound at step 1"] < sizes["folded, zstd 1"] < sizes["int8, none"]
    assert [row["step"] for row in tables[1]][:4] == ["0.25", "0.5", "1", "2"]
    rates = [float(row["bound, bytes"].replace(",", "")) for row in tables[1][:4]]
    assert rates == sorted(rates, reverse=True)


def test_ratios_are_taken_within_a_repeat_and_places_rotate() -> None:
    rates = {"ours zstd stored": Rates((8.0, 90.0, 30.0)), "bare zstd": Rates((10.0, 100.0, 20.0))}
    (row,) = ratio_table(rates).rows
    assert row == ["ours zstd stored", "bare zstd", "0.90", "0.80", "1.50", ">= 0.92", "NO"]
    assert [rotated("abcd", repeat, 2)[0] for repeat in range(2)] == ["a", "c"]
