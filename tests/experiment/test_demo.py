"""The demo: its pictures, and both stages end to end on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ci2p_cache as cc
from ci2p_cache.encoding.progress import EncodeProgress
from ci2p_cache.errors import CacheError, ResourceError, UsageError
from ci2p_cache.experiment.demo import DEMO, run_demo
from ci2p_cache.experiment.run import StageEvent
from ci2p_cache.pictures.drawn import CLASSES, make_picture, write_pictures
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec

SMALL = dataclasses.replace(
    DEMO,
    generate=40,
    encode=dataclasses.replace(DEMO.encode, size=64),
    train=dataclasses.replace(DEMO.train, epochs=14, batch_size=20),
)
"""Quick, and still learnt well above chance."""


class Epochs(TrainObserver):
    def __init__(self) -> None:
        self.numbers: list[int] = []

    def epoch(self, record: EpochRecord) -> None:
        self.numbers.append(record.epoch)


class Images(cc.EncodeObserver):
    def __init__(self) -> None:
        self.done = 0

    def progress(self, progress: EncodeProgress) -> None:
        self.done = progress.done


def test_pictures_are_the_same_for_the_same_seed_only():
    first = make_picture("rings", 3, seed=1)
    assert np.array_equal(first, make_picture("rings", 3, seed=1))
    for other in (
        make_picture("rings", 4, seed=1),
        make_picture("rings", 3, seed=2),
        make_picture("dots", 3, seed=1),
    ):
        assert first.shape != other.shape or not np.array_equal(first, other)


def test_pictures_are_neither_square_nor_flat_and_come_both_ways():
    shapes = set()
    for name in CLASSES:
        for number in range(8):
            pixels = make_picture(name, number)
            shapes.add(pixels.shape[:2])
            assert pixels.dtype == np.uint8
            assert pixels.std(axis=(0, 1)).max() > 10
    assert all(height != width for height, width in shapes)
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)


def test_pictures_are_written_as_a_labelled_folder(tmp_path):
    paths = list(write_pictures(tmp_path, per_class=2))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"{name}/{number:03d}.jpg" for name in CLASSES for number in range(2)
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "JPEG"
            image.load()


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_learns(tmp_path):
    events: list[StageEvent] = []
    epochs, images = Epochs(), Images()
    folder = tmp_path / "demo"
    result = run_demo(
        folder,
        experiment=SMALL,
        on_event=events.append,
        encode_observer=images,
        train_observer=epochs,
    )
    steps = ["pictures", "encode", "verify", "train", "evaluate", "report"]
    assert [event.stage for event in events] == [step for step in steps for _ in range(2)]
    assert [event.seconds is None for event in events] == [True, False] * 6
    assert list(result.seconds) == steps
    assert images.done == result.images == 200
    assert epochs.numbers == list(range(1, 15))
    assert sum(result.splits.values()) == 200
    assert result.top1 >= 2 * result.chance
    assert "generated" in result.note
    assert result.report == str(folder / "report.html")
    assert {path.name for path in folder.iterdir()} == {
        "experiment.json",
        "pictures",
        "shards",
        "runs",
        "report.html",
    }
    assert cc.verify(result.cache) == []
    assert cc.open_cache(result.cache).classes == result.classes
    assert (Path(result.run) / "summary.csv").is_file()
    assert all(command.startswith("ci2p-cache ") for command in result.commands)


@pytest.mark.slow
def test_a_model_that_learns_nothing_fails_the_demo(tmp_path):
    # A single step is enough for these pictures: the installation is broken by a rate of nothing.
    experiment = dataclasses.replace(
        DEMO,
        generate=30,
        encode=dataclasses.replace(DEMO.encode, size=32),
        train=TrainSpec(model="vitds_tiny", epochs=1, batch_size=100, lr=1e-30, min_lr=0.0),
    )
    with pytest.raises(CacheError, match="the model did not learn") as caught:
        run_demo(tmp_path / "demo", experiment=experiment)
    assert caught.value.exit_code == 1


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty: it holds 'mine\.txt'"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="is a file"):
        run_demo(tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot use the folder"):
        run_demo(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["generate", "epochs", "batch_size"])
def test_a_demo_without_pictures_or_epochs_is_refused(name):
    with pytest.raises(UsageError, match=f"`{name}` is 0"):
        if name == "generate":
            dataclasses.replace(DEMO, generate=0)
        TrainSpec(**DEMO.train.to_dict() | {name: 0})
