"""A run that does not learn is told of after its first epochs, one that does never."""

from __future__ import annotations

import dataclasses
from typing import Any

from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.trainer import early_notice

EPOCH = EpochRecord(
    epoch=1, epochs=30, train_loss=1.2, train_top1=0.5, val_loss=1.3, val_top1=0.45, val_top5=1.0,
    lr=1e-3, grad_norm=1.0, skipped_steps=0, images=880, images_per_second=50.0, wait_share=0.0,
    epoch_seconds=20.0,
)  # fmt: skip


def told(*, steps: int = 14, num_classes: int = 5, num_val: int = 120, **fields: object) -> str:
    record = dataclasses.replace(EPOCH, **fields)  # type: ignore[arg-type]  # any field
    return early_notice(record, steps=steps, num_classes=num_classes, num_val=num_val) or ""


def test_a_run_that_learns_is_left_alone() -> None:
    assert told() == told(steps=200) == told(epoch=30, steps=420) == ""


def test_a_loss_of_guessing_is_told_once_when_100_steps_are_done() -> None:
    assert told(train_loss=1.62) == ""
    notice = told(train_loss=1.62, epoch=8, steps=112)
    assert "nothing was learned in 112 steps" in notice
    assert "guessing among 5 classes gives 1.609" in notice
    assert told(train_loss=1.62, epoch=9, steps=126) == ""
    assert told(train_loss=1.60, epoch=8, steps=112) == ""
    assert "nothing was learned" in told(train_loss=1.62, epoch=1, steps=1250)
    assert told(train_loss=float("nan"), images=0, steps=1250) == ""


def test_validation_at_chance_is_told_once_when_100_steps_are_done() -> None:
    notice = told(val_top1=0.21, epoch=8, steps=112)
    assert "validation (21.0% of 120)" in notice
    assert "is no better than guessing while training is ahead of it (50.0%)" in notice
    assert "whether both splits have the same classes" in notice
    assert told(val_top1=0.21, epoch=1, steps=1250).endswith("classes and kind of images.")
    for epoch in (1, 2, 3, 7, 9):
        assert told(val_top1=0.21, epoch=epoch, steps=14 * epoch) == ""


def test_chance_allows_for_few_images() -> None:
    warm: dict[str, Any] = {"epoch": 8, "steps": 112}
    assert told(**warm, val_top1=0.21, train_top1=0.22) == ""
    assert told(**warm, val_top1=0.4) == ""
    assert told(**warm, val_top1=0.4, num_val=10) == ""
    assert told(**warm, val_top1=0.4, num_val=10, train_top1=0.7) != ""
    assert told(**warm, val_top1=None, val_loss=None, val_top5=None, num_val=0) == ""
