"""Observers see every event of a run once, in order, and trackers show a resumed run as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.caches import make_cache
from tests.support.commands import Ran

pytestmark = pytest.mark.usefixtures("one_thread", "nano")

SPEC = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=5)


class Events(cc.TrainObserver):
    """Keeps every event with what it is about, steps as their numbers; fails at one of them."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.kept: list[tuple[str, Any]] = []
        self.fail_at = fail_at

    def notice(self, text: str) -> None:
        self.kept.append(("notice", text))

    def planned(self, plan: cc.TrainPlan) -> None:
        self.kept.append(("planned", plan.done))

    def steps(self, steps: Sequence[cc.TakenStep]) -> None:
        numbers = [(each.epoch - 1) * 5 + each.step for each in steps]
        self.kept += [("step", number) for number in numbers]
        if self.fail_at in numbers:
            raise ZeroDivisionError("a bug of the user's")

    def epoch(self, record: cc.EpochRecord) -> None:
        self.kept.append(("epoch", record.epoch))

    def ended(self, error: BaseException | None) -> None:
        self.kept.append(("ended", error))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation latents (4, 4, 4) of three classes: epochs of five steps."""
    counts = {"train": {"ant": 9, "bee": 7, "cat": 8}, "val": {"ant": 3, "bee": 2, "cat": 3}}
    return make_cache(tmp_path_factory.mktemp("trackers") / "out", counts)


def train(cache_dir: Path, runs: Path, **options: Any) -> cc.TrainSummary:
    return cc.train(cache_dir, spec=SPEC, runs_dir=runs, name="run", device="cpu", **options)


def steps_of(begin: int, end: int) -> list[tuple[str, Any]]:
    return [("step", number) for number in range(begin, end)]


@pytest.fixture(scope="module")
def whole(cache_dir: Path, nano: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with `steps.csv`; read only."""
    return Path(train(cache_dir, tmp_path_factory.mktemp("whole"), track=["csv"]).path)


def test_an_observer_that_raises_ends_the_run_which_then_continues_as_if_it_had_not(
    cache_dir: Path, whole: Path, tmp_path: Path
) -> None:
    first, failing = Events(), Events(fail_at=7)
    with pytest.raises(ZeroDivisionError, match="of the user's") as caught:
        train(cache_dir, tmp_path, observers=[first, failing], save_every_steps=2, track=["csv"])
    assert caught.value.__notes__ == ["raised by the observer Events, in `steps`"]
    begun = [("planned", 0), *steps_of(0, 5), ("epoch", 1), *steps_of(5, 9)]
    # Both get the end, with the reason.
    assert first.kept == failing.kept == [*begun, ("ended", caught.value)]
    # It holds two steps that come again.
    assert (tmp_path / "run" / "steps.csv").read_bytes().count(b"\n") == 1 + 9
    again = Events()
    train(cache_dir, tmp_path, observers=[again], track=["csv"])
    assert again.kept == [("planned", 7), *steps_of(7, 10), ("epoch", 2), ("ended", None)]
    for name in ("steps.csv", "checkpoints/epoch-0002-step-000000/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_reports_a_notice_alone(cache_dir: Path, whole: Path) -> None:
    seen = Events()
    train(cache_dir, whole.parent, observers=[seen])
    assert [event for event, _ in seen.kept] == ["notice"]


def test_steps_csv_has_a_row_per_step(cache_dir: Path, whole: Path) -> None:
    header, *rows = (whole / "steps.csv").read_text().splitlines()
    assert header == "step,epoch,loss,lr,is_skipped"
    assert [row.split(",")[:2] for row in rows] == [[str(n), str(n // 5 + 1)] for n in range(10)]
    losses = [float(row.split(",")[2]) for row in rows]
    summary = [row.split(",") for row in (whole / "summary.csv").read_text().splitlines()]
    # The last batch of an epoch has four images, the others five.
    for epoch, row in enumerate(summary[1:]):
        five = losses[epoch * 5 : epoch * 5 + 5]
        mean = (5 * sum(five[:4]) + 4 * five[4]) / 24
        assert float(row[summary[0].index("train_loss")]) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("content", [b"mine\n1\n", b"step,epoch,loss,lr,is_skipped\n0,1,2.0", b""])
def test_another_file_in_its_place_is_replaced_from_where_it_differs(
    cache_dir: Path, whole: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_bytes((whole / "args.yaml").read_bytes())
    (tmp_path / "run" / "steps.csv").write_bytes(content)
    train(cache_dir, tmp_path, track=["csv"])
    assert (tmp_path / "run" / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()


def test_the_command_tracks_where_it_is_asked_to(
    run: Callable[..., Ran], cache_dir: Path, whole: Path, tmp_path: Path
) -> None:
    words = ("train", cache_dir, "--model", "vitds_nano", "--epochs", "2", "--batch-size", "5",
             "--out", tmp_path, "--device", "cpu", "--workers", "1")  # fmt: skip
    for name in ("mlflow", "csv,mlflow", ""):
        refused = run(*words, "--track", name)
        assert refused.code == 2
        assert "wanted some of tensorboard, csv, wandb" in " ".join(refused.err.split())
    assert not list(tmp_path.iterdir())
    ran = run(*words, "--name", "both", "--track", "csv,tensorboard,csv")
    assert ran.code == 0, ran.err
    assert "tensorboard --logdir" in ran.out
    assert (tmp_path / "both" / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert (tmp_path / "both" / "tensorboard").is_dir()
    # Another choice is the same run.
    ran = run(*words, "--name", "both", "--track", "none")
    assert ran.code == 0
    assert "is finished" in " ".join(ran.err.split())
    ran = run(*words, "--name", "neither", "--track", "none")
    assert ran.code == 0
    assert "tensorboard" not in ran.out
    left = {path.name for path in (tmp_path / "neither").iterdir()}
    assert left == {*("args.yaml", "model.json", "encoder.safetensors", "summary.csv"),
                    *("checkpoints", "curves.png")}  # fmt: skip


def test_without_wandb_it_is_refused_before_anything_is_written(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(errors.MissingDependencyError, match="wandb") as caught:
        train(cache_dir, tmp_path, track=["csv", "wandb"])
    assert caught.value.hint == "pip install 'ci2p-cache[track]'"
    assert not list(tmp_path.iterdir())
