"""Several seeds of one recipe: one cache, found again by its fingerprint, and what they come to."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.errors import UsageError
from ci2p_cache.experiment.run import StageEvent
from ci2p_cache.report.compared import difference, seed_groups
from ci2p_cache.report.data import read_run
from tests.experiment.test_experiment import EXPERIMENT, RECIPES
from tests.support.caches import data_digests
from tests.support.commands import Ran
from tests.support.run_records import write_evaluation, write_run

pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def experiment(image_folder: Path) -> cc.Experiment:
    train = dataclasses.replace(EXPERIMENT.train, epochs=1)
    return dataclasses.replace(EXPERIMENT, source=str(image_folder), train=train)


def test_all_seeds_and_recipes_of_one_encoding_share_a_cache_that_is_encoded_once(
    experiment: cc.Experiment, tmp_path: Path
) -> None:
    caches, events = tmp_path / "caches", list[StageEvent]()
    made = cc.run_seeds(
        experiment, (0, 4), tmp_path / "one", device="cpu", cache_dir=caches,
        on_event=events.append,
    )  # fmt: skip
    assert made.encoded_now == 21
    assert [path.name for path in caches.iterdir()] == [Path(made.cache).name]
    assert made.mean == pytest.approx(statistics.fmean(made.top1))
    assert made.deviation == pytest.approx(statistics.stdev(made.top1))
    assert [Path(run).name for run in made.runs] == ["tiny-seed-0", "tiny-seed-4"]
    page = Path(str(made.report)).read_text("utf-8")
    assert "standard deviation" in page
    assert "tiny-seed-0, tiny-seed-4" in page
    stored = data_digests(Path(made.cache))
    # Another recipe with other training, and one more seed: nothing is encoded.
    other = dataclasses.replace(
        experiment, name="other", train=dataclasses.replace(experiment.train, lr=1e-2)
    )
    alone = cc.run_experiment(
        other, tmp_path / "two", device="cpu", until="train", cache_dir=caches
    )
    assert alone.encoded is not None
    assert (alone.cache, alone.encoded.encoded_now) == (made.cache, 0)
    more = cc.run_seeds(
        experiment, (0, 4, 5), tmp_path / "one", device="cpu", cache_dir=caches, until="evaluate"
    )
    assert (more.cache, more.encoded_now, more.top1[:2]) == (made.cache, 0, made.top1)
    assert data_digests(Path(made.cache)) == stored
    # Another way to encode is another cache.
    encode = dataclasses.replace(experiment.encode, views="none")
    third = dataclasses.replace(experiment, encode=encode)
    third_made = cc.run_experiment(
        third, tmp_path / "three", device="cpu", until="encode", cache_dir=caches
    )
    assert third_made.cache != made.cache
    assert Path(third_made.cache).parent == caches


def test_seeds_on_the_command_line_and_those_that_cannot_be(
    image_folder: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    recipes = tmp_path / "recipes.py"
    recipes.write_text(RECIPES)
    words = ("run", f"{recipes}:bundled", image_folder, "--out", tmp_path / "out")
    given = ("--seeds", "2,3", "--set", "train.epochs=1", "--device", "cpu")
    seen = run(*words, *given)
    assert seen.code == 0, seen.err
    assert "of 2 seeds: " in seen.out
    assert "21 images encoded now" in seen.out
    again = json.loads(run(*words, *given, "--json").out)
    assert (again["encoded_now"], again["seeds"]) == (0, [2, 3])
    for bad, message in (
        (("--seeds", "1,1"), "none twice"),
        (("--seeds", "1,x"), "whole numbers"),
        (("--seeds", "-1"), "`seed` is -1"),
        (("--seeds", "1", "--set", "train.seed=2"), "do not go together"),
    ):
        refused = run(*words, *bad)
        assert (refused.code, message in refused.err) == (2, True), refused.err
    with pytest.raises(UsageError, match="wanted one or more"):
        cc.run_seeds(EXPERIMENT, ())


def test_configurations_are_held_against_the_first_image_by_image(tmp_path: Path) -> None:
    labels, rows = [0, 1] * 50, list(range(100))
    right = {"a0": 60, "a1": 70, "b0": 80, "b1": 90}
    for name, count in right.items():
        made = write_run(tmp_path / name, seed=int(name[1]), lr=0.1 if name[0] == "a" else 0.2)
        predicted = [label if row < count else 1 - label for row, label in enumerate(labels)]
        write_evaluation(
            made, rows=rows, keys=[f"{row}.jpg" for row in rows], labels=labels,
            predicted=predicted, confidence=[0.9] * 100,
        )  # fmt: skip
    runs = [read_run(tmp_path / name) for name in right]
    first, second = seed_groups(runs)
    assert (first.top1, second.top1) == ((0.6, 0.7), (0.8, 0.9))
    assert (first.mean, first.deviation) == pytest.approx((0.65, 0.05 * 2**0.5))
    assert first.over_first is None
    assert second.over_first is not None
    points, low, high = second.over_first
    assert points == pytest.approx(20)
    # Half of the images gain half a point, ten a whole one: the normal interval is close.
    gains = [0.0] * 60 + [0.5] * 10 + [1.0] * 10 + [0.5] * 10 + [0.0] * 10
    half = 1.96 * statistics.pstdev(gains) * 10
    assert (low, high) == pytest.approx((20 - half, 20 + half), abs=1)
    assert difference([runs[1]], [runs[0]]) == pytest.approx((10, 5, 16), abs=1)
    # Runs of one seed each are no configurations of several.
    assert not seed_groups([runs[0], runs[2]])
