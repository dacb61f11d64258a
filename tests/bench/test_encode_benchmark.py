"""The encode benchmark runs: its rows and ratios are there. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.measure import Rates
from tests.support.pictures import write_image_folder


@pytest.fixture(scope="module")
def encode() -> ModuleType:
    """The benchmark; it imports torchvision, which takes seconds."""
    return importlib.import_module("tests.benchmarks.encode")


@pytest.mark.slow
def test_the_encode_benchmark_gives_its_rows_and_ratios(
    encode: ModuleType, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    only = ("whole float32 flip", "g_a float32", "naive")
    assert encode.main(
        [str(image_folder), "--count", "6", "--size", "64", "--repeats", "2", "--profile",
         "--only", ",".join(only), "--markdown", "--json", str(found)]
    ) == 0  # fmt: skip
    record = json.loads(found.read_text())
    assert tuple(record["rates"]) == only
    assert all(len(values) == 2 and min(values) > 0 for values in record["rates"].values())
    rates, ratios, profile, pixels = record["tables"].values()
    assert [row["contestant"] for row in rates] == list(only)
    assert [(row["of"], row["to"]) for row in ratios] == [
        ("whole float32 flip", "g_a float32"),
        ("whole float32 flip", "naive"),
    ]
    assert profile[0]["contestant"] == only[0]
    assert pixels[0]["pictures"] == "6"
    assert float(pixels[0]["largest difference"]) <= 2
    text = capsys.readouterr().out
    assert "| whole float32 flip | naive |" in text
    assert str(tmp_path.parent) not in text + found.read_text()


def test_bars_hold_the_median_against_the_same_arithmetic(encode: ModuleType) -> None:
    rates = {
        "whole float32 none": Rates((8.0, 9.0, 7.0)),
        "whole bf16 none": Rates((16.0, 9.0, 15.0)),
        "g_a float32": Rates((10.0, 10.0, 10.0)),
        "g_a bf16": Rates((20.0, 20.0, 20.0)),
        "other whole bf16 none": Rates((10.0, 10.0, 10.0)),
        "naive": Rates((4.0, 4.0, 4.0)),
    }
    rows = {(row[0], row[1]): row for row in encode._ratio_table(rates).rows}
    assert rows["whole float32 none", "g_a float32"][2:] == [
        "0.80", "0.70", "0.90", ">= 0.8", "0.9", "yes"
    ]  # fmt: skip
    assert rows["whole bf16 none", "g_a bf16"][-1] == "NO"
    assert rows["whole float32 none", "naive"][-1] == "yes"
    assert rows["whole bf16 none", "naive"][5:] == [">= 4", "5", "NO"]
    assert rows["whole bf16 none", "other whole bf16 none"][-1] == "yes"
    assert len(rows) == 5


def test_what_cannot_be_measured_is_refused_by_name(encode: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        encode.main([str(tmp_path), "--only", "fastest"])
    with pytest.raises(SystemExit, match="holds no image"):
        encode.main([str(tmp_path)])
    few = encode._copied(
        encode.Settings(images=write_image_folder(tmp_path / "src", {"ant": 3}), count=7),
        tmp_path / "copies",
    )
    assert len(list(few.rglob("*.jpg"))) == 7
