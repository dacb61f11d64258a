"""The GPU benchmark runs through the same code on a CPU: the rows are there, ratios are ratios."""

from __future__ import annotations

import pytest

from tests.benchmarks.gpu import Settings, measure_gpu


@pytest.mark.slow
def test_every_part_gives_its_rows() -> None:
    report = measure_gpu(
        Settings(
            device="cpu",
            count=14,
            size=64,
            models=("vitds_tiny",),
            batch_size=4,
            # In software bf16 takes minutes; the parts before training have it.
            precision="float32",
            seconds=0.1,
        )
    )
    g_a, stage_one, loading, training, wanted = report.tables
    assert [row[0] for row in g_a.rows] == ["float32", "bf16"]
    assert [row[0] for row in stage_one.rows] == ["float32", "bf16"]
    assert loading.rows
    assert [tuple(row[:2]) for row in training.rows] == [
        ("vitds_tiny", "cached"), ("vitds_tiny", "compute alone"), ("vitds_tiny", "in the loop"),
        ("vit_b16", "from JPEGs"),
    ]  # fmt: skip
    rates = {tuple(row[:2]): float(row[2].replace(",", "")) for row in training.rows}
    found = {tuple(row[:2]): row[2:] for row in wanted.rows}
    ratio, wish, holds = found["vitds_tiny", "cached over in the loop"]
    expected = rates["vitds_tiny", "cached"] / rates["vitds_tiny", "in the loop"]
    assert abs(float(ratio) / expected - 1) < 0.05
    assert (wish, holds) == (">= 3", "yes" if float(ratio) >= 3 else "NO")
    assert found["vitds_tiny", "waiting"][1] == "<= 0.02"
    assert ("vitds_tiny", "cached over ViT-B/16 from JPEGs") in found
