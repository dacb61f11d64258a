"""`ci2p-cache bench`: the rows are there, they are what they say, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.bench import (
    TrainReport,
    bench_encoding,
    bench_loading,
    bench_training,
    encode_rate,
)
from ci2p_cache.machine import BF16_GAIN, bf16_notice, has_bf16, matmul_flops
from ci2p_cache.models.complexity import complexity
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder

pytestmark = pytest.mark.usefixtures("nano")

SPEC = cc.TrainSpec(model="vitds_nano", batch_size=4)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    source = write_image_folder(root / "src", {"ant": 5, "bee": 6})
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.0)
    cc.encode(source, root / "out", options)
    return root / "out"


@pytest.fixture(scope="module")
def report(cache_dir: Path) -> TrainReport:
    before = {path: path.stat().st_mtime_ns for path in cache_dir.parent.rglob("*")}
    report = bench_training(cache_dir, spec=SPEC, device="cpu", seconds=0.1)
    assert {path: path.stat().st_mtime_ns for path in cache_dir.parent.rglob("*")} == before
    return report


@pytest.mark.slow
def test_every_way_is_measured_by_the_same_loop(report: TrainReport) -> None:
    assert [row.name for row in report.rows] == [
        "cached", "compute alone", "in the loop", "vit_b16",
    ]  # fmt: skip
    assert report.missing == ()
    for row in report.rows:
        assert row.steps >= 3
        assert row.images_per_second > 0
        assert 0 <= row.wait_share < 1
        assert row.epoch_seconds == pytest.approx(11 / row.images_per_second)


@pytest.mark.slow
def test_utilisation_is_the_models_arithmetic_over_the_measured_rate(report: TrainReport) -> None:
    cost = complexity("vitds_nano", size=64, num_classes=2)
    for name, macs in (
        ("cached", 3 * cost.model_macs),
        ("in the loop", 3 * cost.model_macs + cost.encoder_macs),
        ("vit_b16", 3 * cost.baseline_macs),
    ):
        row = report.row(name)
        assert row is not None
        wanted = 2 * macs * row.images_per_second / report.matmul_flops
        assert row.utilisation == pytest.approx(wanted)


@pytest.mark.slow
def test_encoding_pays_after_what_it_costs_over_what_an_epoch_saves(report: TrainReport) -> None:
    cached, online = report.row("cached"), report.row("in the loop")
    assert cached is not None
    assert online is not None
    saved = online.epoch_seconds - cached.epoch_seconds
    paid = report.paid_after(2.0)
    assert list(paid) == ["in the loop", "vit_b16"]
    wanted = pytest.approx(11 / 2.0 / saved) if saved > 0 else None
    assert paid["in the loop"] == wanted
    # A way that is no slower is never paid for.
    twice = dataclasses.replace(
        cached, name="twice as fast", epoch_seconds=cached.epoch_seconds / 2
    )
    assert dataclasses.replace(report, rows=(cached, twice)).paid_after(2.0) == {
        "twice as fast": None
    }


@pytest.mark.slow
def test_a_model_on_images_is_not_held_against_itself(cache_dir: Path) -> None:
    spec = cc.TrainSpec(model="vit_ti16", batch_size=4)
    with pytest.raises(errors.UsageError, match="vit_ti16 reads images"):
        bench_training(cache_dir, spec=spec, device="cpu", seconds=0.0)


@pytest.mark.slow
def test_what_needs_the_images_is_left_out_where_they_are_gone(
    cache_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache_dir.parent, tmp_path / "moved")
    manifest = tmp_path / "moved" / "out" / "cache.json"
    assert str(cache_dir.parent / "src") in manifest.read_text()
    gone = cache_dir.parent / "src"
    hidden = gone.with_name("hidden")
    gone.rename(hidden)
    try:
        report = bench_training(
            tmp_path / "moved" / "out", spec=SPEC, device="cpu", seconds=0.0,
            ways=("cached", "in the loop", "vit_b16"),
        )  # fmt: skip
    finally:
        hidden.rename(gone)
    assert [row.name for row in report.rows] == ["cached"]
    assert [text.partition(":")[0] for text in report.missing] == ["in the loop", "vit_b16"]


def test_loading_is_measured_for_one_thread_and_for_all(cache_dir: Path) -> None:
    report = bench_loading(cache_dir, batch_size=4, device="cpu", threads=3, seconds=0.05)
    assert [(row.name, row.threads) for row in report.rows] == [
        ("int8, as stored", 1), ("int8, as stored", 3), ("float32, dequantised", 3),
    ]  # fmt: skip
    for row in report.rows:
        assert 0 < row.slowest <= row.images_per_second <= row.fastest
    assert report.bytes_per_image == 192 * 4 * 4


def test_stage_one_is_measured_whole_and_in_its_parts(cache_dir: Path) -> None:
    source = cache_dir.parent / "src"
    before = {path: path.stat().st_mtime_ns for path in cache_dir.parent.rglob("*")}
    options = cc.EncodeOptions(encoder="bundled", size=64, batch_size=4, devices="cpu:2")
    report = bench_encoding(source, options, seconds=0.05)
    assert {path: path.stat().st_mtime_ns for path in cache_dir.parent.rglob("*")} == before
    assert [row.name for row in report.rows] == ["whole", "g_a", "decoding"]
    for row in report.rows:
        assert row.images_per_second > 0
        assert row.views_per_second == pytest.approx(2 * row.images_per_second)
    assert (report.views_per_image, report.batch_size) == (2, 4)
    assert report.device == "cpu, 2 replicas"
    assert 0 <= report.waiting_share <= 1
    # Both views of every image, whatever share of them would be drawn for validation.
    latents = sum(f.stat().st_size for f in cache_dir.glob("latents.zarr/train/latents/c.*"))
    assert report.bytes_per_image > 0.9 * latents / 11


def test_making_a_cache_again_is_measured_with_its_own_settings(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, cc.EncodeOptions]] = []

    def noted(source: str, out: Path, options: cc.EncodeOptions, **more: Any) -> cc.DryRunReport:
        asked.append((source, options))
        return cc.dry_run(source, out, options, **more)

    monkeypatch.setattr("ci2p_cache.bench.dry_run", noted)
    assert encode_rate(cc.open_cache(cache_dir), device="cpu") > 0
    [(source, options)] = asked
    assert source == str(cache_dir.parent / "src")
    assert (options.size, options.views, options.devices) == (64, "flip", "cpu")
    assert options.weights == cc.open_cache(cache_dir).encoder_path


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--executor", "processes", "--device", "cpu:1"), marks=pytest.mark.slow),
    ],
)
def test_where_bfloat16_is_computed_in_software_is_told(
    cache_dir: Path, tmp_path: Path, run: Callable[..., Ran], more: tuple[str, ...]
) -> None:
    told = bf16_notice(torch.device("cpu"))
    cpu = Path("/proc/cpuinfo").read_text()
    assert (told is None) == ("avx512_bf16" in cpu or "amx_bf16" in cpu or " bf16 " in cpu)
    ran = run(
        "encode", cache_dir.parent / "src", "--out", tmp_path / "out", "--encoder", "bundled",
        "--size", 64, "--precision", "bf16", *more,
    )  # fmt: skip
    assert ("no bfloat16 instructions" in ran.err) == (told is not None)
    assert BF16_GAIN not in ran.err


def test_a_new_float32_cache_says_once_what_bfloat16_would_give_here(
    cache_dir: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    there = bool(has_bf16(torch.device("cpu")))
    command = (
        "encode", cache_dir.parent / "src", "--out", tmp_path / "out", "--encoder", "bundled",
        "--size", 64, "--device", "cpu",
    )  # fmt: skip
    assert run(*command).err.count(BF16_GAIN) == there
    assert BF16_GAIN not in run(*command).err
    assert (BF16_GAIN in run("doctor", tmp_path, "--json").out) == there


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_rate_of_matrix_products_is_that_of_a_computer(precision: str) -> None:
    assert 1e8 < matmul_flops(torch.device("cpu"), precision) < 1e16


@pytest.mark.slow
def test_the_commands_print_tables_and_json(cache_dir: Path, run: Callable[..., Ran]) -> None:
    loader = ("bench", "loader", cache_dir, "--seconds", 0.02, "--device", "cpu")
    assert "int8, as stored" in run(*loader).out
    assert json.loads(run(*loader, "--json").out)["batch_size"] == 128
    train = run(
        "bench", "train", cache_dir, "--model", "vitds_nano", "--seconds", 0.0, "--batch-size", 4,
        "--device", "cpu", "--encode-rate", 30,
    )  # fmt: skip
    assert "compute alone" in train.out
    assert "has paid against vit_b16" in train.out
    measured = json.loads(run(
        "bench", "train", cache_dir, "--model", "vitds_nano", "--seconds", 0.0, "--batch-size", 4,
        "--device", "cpu", "--json",
    ).out)  # fmt: skip
    assert measured["encode_images_per_second"] > 0
    assert set(measured["paid_after"]) == {"in the loop", "vit_b16"}
    source = cache_dir.parent / "src"
    stage_one = ("bench", "encode", source, "--encoder", "bundled", "--size", 64, "--seconds", 0.05)
    assert "the encoder alone" in run(*stage_one).out
    assert json.loads(run(*stage_one, "--json").out)["views_per_image"] == 2


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.NotACacheError):
        bench_training(tmp_path, spec=SPEC)
