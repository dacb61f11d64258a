"""Experiments: what a recipe may be, how it is changed, and that a folder holds one."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.errors import (
    InterruptedRunError,
    LockedError,
    ManifestError,
    RunMismatchError,
    UsageError,
    command,
)
from ci2p_cache.experiment.run import StageEvent
from ci2p_cache.experiment.spec import (
    list_recipes,
    read_experiment,
    settable_fields,
    with_changes,
)
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from tests.support.commands import REPO, Ran
from tests.support.rank_jobs import launch
from tests.support.trained import evaluation_of

EXPERIMENT = cc.Experiment(
    name="tiny",
    encode=cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.3),
    train=cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=8),
)

RECIPES = '''
"""Recipes."""
from __future__ import annotations
import ci2p_cache as cc
from ci2p_cache import Experiment

def good() -> cc.Experiment:
    """The good one.

    More."""
    return Experiment(name="good")

def also(epochs: int = 3) -> Experiment:
    return Experiment(name="also", train=cc.TrainSpec(epochs=epochs))

def bundled() -> Experiment:
    return Experiment(
        name="bundled",
        encode=cc.EncodeOptions(encoder="bundled", size=32),
        train=cc.TrainSpec(model="vitds_nano", epochs=3, batch_size=8),
    )

def wants(source: str) -> Experiment:
    return Experiment(name="wants")

def returns_text():
    return "text"

def raises() -> Experiment:
    return cc.TrainSpec(epochs=0)

def divides() -> Experiment:
    return 1 / 0

def _helper() -> Experiment:
    return Experiment(name="helper")
'''


pytestmark = pytest.mark.usefixtures("one_thread", "nano", "takes_ctrl_c")


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    path = tmp_path / "my recipes.py"
    path.write_text(RECIPES)
    return path


def test_the_recipes_of_a_file_are_its_public_annotated_functions(recipes: Path) -> None:
    found = list_recipes(recipes)
    assert list(found) == ["good", "also", "bundled", "raises", "divides"]
    assert found["good"] == "The good one."
    assert cc.load_experiment(f"{recipes}:also").train.epochs == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("god", r"has no recipe 'god'; it has good, also, bundled, raises, divides"),
        ("_helper", "has no recipe '_helper'"),
        ("RECIPES", "has no recipe"),
        ("wants", "wants the arguments source"),
        ("returns_text", "returns str; a recipe returns an Experiment"),
        ("raises", r"raises UsageError in line 30: `epochs` is 0"),
        ("divides", "raises ZeroDivisionError in line 33: division by zero"),
    ],
)
def test_a_function_that_is_no_recipe_is_refused_by_name(
    recipes: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cc.load_experiment(f"{recipes}:{name}")


def test_a_near_miss_gets_the_command(recipes: Path) -> None:
    with pytest.raises(UsageError) as refused:
        cc.load_experiment(f"{recipes}:god")
    assert refused.value.hint is not None
    assert refused.value.hint.endswith("my recipes.py:good' IMAGES")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\ndef f(:\n", "raises SyntaxError in line 2"),
        ("import no_such_package_at_all\n", "raises ModuleNotFoundError in line 1"),
        ("\nraise SystemExit(3)\n", "raises SystemExit in line 2"),
    ],
)
def test_a_file_that_raises_names_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        cc.load_experiment(f"{path}:f")


def test_a_missing_file_and_one_that_is_no_python_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*nowhere\.py"):
        cc.load_experiment(f"{tmp_path / 'nowhere.py'}:f")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is no Python file"):
        cc.load_experiment(str(tmp_path / "notes.txt"))


def test_a_file_alone_lists_and_an_empty_one_says_so(
    run: Callable[..., Ran], recipes: Path, tmp_path: Path
) -> None:
    shown = run("run", recipes)
    assert shown.code == 0
    assert "The good one." in shown.out
    assert json.loads(run("run", recipes, "--json").out)[0]["name"] == "good"
    (tmp_path / "empty.py").write_text('"""Nothing."""\n')
    refused = run("run", tmp_path / "empty.py")
    assert refused.code == 2
    assert "has no recipe" in refused.err


@pytest.mark.parametrize("asked", ["", ":bad_name", ":goo"])
@pytest.mark.parametrize(("images", "wanted"), [("", ["IMAGES"]), (", generate=4", [])])
def test_the_command_that_runs_a_recipe_names_images_where_it_has_none(
    run: Callable[..., Ran], tmp_path: Path, images: str, wanted: list[str], asked: str
) -> None:
    path = tmp_path / "own recipes.py"
    path.write_text(
        "import ci2p_cache as cc\n\n\ndef good_name() -> cc.Experiment:\n"
        f"    return cc.Experiment(name='mine'{images})\n"
    )
    shown = run("run", f"{path}{asked}")
    line = (shown.out + shown.err).rpartition("ci2p-cache ")[2]
    words = shlex.split(line)
    assert words == ["run", f"{path}:good_name", *wanted]
    assert run(*words, "--dry-run").code == 0


def test_changes_are_read_as_the_type_of_their_field() -> None:
    changed = with_changes(
        EXPERIMENT,
        ["train.epochs=5", "train.lr=2e-3", "train.pos_embed=true", "train.betas=0.9,0.95",
         "train.warmup_epochs=none", "encode.views=none", "encode.limit=7",
         "encode.weights=w.pth.tar", "encode.dtype=int16", "name=other", "checkpoint=best"],
    )  # fmt: skip
    assert changed == cc.Experiment(
        name="other",
        checkpoint="best",
        encode=dataclasses.replace(
            EXPERIMENT.encode, views="none", limit=7, weights=Path("w.pth.tar"), dtype="int16"
        ),
        train=dataclasses.replace(
            EXPERIMENT.train, epochs=5, lr=2e-3, pos_embed=True, betas=(0.9, 0.95)
        ),
    )
    assert with_changes(EXPERIMENT, []) == EXPERIMENT
    assert not any("version" in name for name in settable_fields())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epochs", "wanted FIELD=VALUE"),
        ("train.epoch=2", r"did you mean train\.epochs"),
        ("epochs=2", r"did you mean train\.epochs\?"),
        ("seed=2", r"did you mean encode\.seed or train\.seed\?"),
        ("nonsense=2", "the fields are name, claim"),
        ("train.epochs=two", "`train.epochs` is 'two'; wanted a whole number"),
        ("train.epochs=none", "wanted a whole number"),
        ("train.lr=fast", "wanted a number"),
        ("train.pos_embed=maybe", "wanted true or false"),
        ("train.precision=half", "wanted one of float32, bf16"),
        ("train.epochs=0", "`epochs` is 0"),
        ("encode.size=65", "multiple of 32"),
        ("encode.plan_only=true", "encodes everything"),
        ("name=../up", "experiment `name` is '../up'"),
        ("version=2", "no field is named 'version'"),
        ("generate=1", "wanted 2 or more"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_changes(EXPERIMENT, [change])


def test_a_field_is_set_once() -> None:
    with pytest.raises(UsageError, match=r"names train\.epochs twice"):
        with_changes(EXPERIMENT, ["train.epochs=1", "train.epochs=2"])


def test_an_experiment_survives_json_and_refuses_another_version() -> None:
    whole = dataclasses.replace(
        EXPERIMENT, encode=dataclasses.replace(EXPERIMENT.encode, weights=Path("a/b.safetensors"))
    )
    data = json.loads(json.dumps(whole.to_dict()))
    assert cc.Experiment.from_dict(data) == whole
    with pytest.raises(ManifestError, match="`version` is 2"):
        cc.Experiment.from_dict(data | {"version": 2})
    with pytest.raises(ManifestError, match="unknown fields"):
        cc.Experiment.from_dict(data | {"colour": 1})
    with pytest.raises(UsageError, match="do not go together"):
        cc.Experiment(name="a", source="b", generate=2)


class Stops(TrainObserver):
    """Presses Ctrl-C at the end of the first epoch."""

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def experiment(image_folder: Path) -> cc.Experiment:
    return dataclasses.replace(EXPERIMENT, source=str(image_folder))


@pytest.fixture(scope="module")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted experiment; read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    cc.run_experiment(EXPERIMENT, out, source=image_folder, device="cpu")
    return out


def test_one_call_leaves_cache_run_evaluation_and_report(
    experiment: cc.Experiment, finished: Path
) -> None:
    recorded = json.loads((finished / "experiment.json").read_text())
    assert cc.Experiment.from_dict(recorded) == experiment
    assert (finished / "shards" / "cache.json").exists()
    assert evaluation_of(finished / "runs" / "tiny", which=experiment.checkpoint).exists()
    assert (finished / "report.html").read_text("utf-8").startswith("<!")
    assert not (finished / ".lock").exists()


def test_an_interrupted_experiment_goes_on_and_ends_with_the_same_numbers(
    experiment: cc.Experiment, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = cc.run_experiment(experiment, out, device="cpu", until="encode")
    assert first.trained is None
    assert first.scores is None
    with pytest.raises(InterruptedRunError):
        cc.run_experiment(experiment, out, device="cpu", train_observer=Stops())
    assert not (out / "report.html").exists()
    events: list[StageEvent] = []
    summary = cc.run_experiment(experiment, out, device="cpu", on_event=events.append)
    assert summary.encoded is not None
    assert summary.encoded.encoded_now == 0
    assert summary.scores is not None
    assert summary.trained is not None
    assert summary.scores.top1 == summary.trained.last.val_top1
    ours, theirs = (
        json.loads(evaluation_of(folder / "runs" / "tiny", which=experiment.checkpoint).read_text())
        for folder in (out, finished)
    )
    for name in ("checkpoint", "top1", "nll", "ece", "confusion"):
        assert ours[name] == theirs[name]
    # Few images and two epochs: nothing is learnt, and the run says so.
    assert ours["top1_low"] <= 1 / len(ours["per_class"])
    assert any("better than guessing" in event.text for event in events)


def test_ctrl_c_prints_the_command_that_goes_on(
    run: Callable[..., Ran],
    recipes: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ci2p_cache.cli.watch.TrainWatch.epoch", Stops.epoch)
    words = ["run", f"{recipes}:bundled", str(image_folder), "--out", str(tmp_path / "out")]
    ran = run(*words, "--device", "cpu")
    assert ran.code == 130
    assert command(*words, "--device", "cpu") in " ".join(ran.err.split())


def test_a_finished_experiment_does_nothing_again(
    experiment: cc.Experiment, finished: Path
) -> None:
    # `train` writes the rows of summary.csv again, the same ones.
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != "summary.csv"
    }
    stages: list[StageEvent] = []
    summary = cc.run_experiment(experiment, finished, device="cpu", on_event=stages.append)
    assert summary.trained is not None
    assert summary.trained.trained_epochs == 0
    assert summary.scores is not None
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [event.stage for event in stages if event.seconds is not None][:2] == ["encode", "train"]


def test_another_experiment_is_refused_by_its_fields_and_free_ones_are_not(
    experiment: cc.Experiment, finished: Path
) -> None:
    other = with_changes(experiment, ["train.epochs=3", "encode.views=none"])
    with pytest.raises(RunMismatchError) as refused:
        cc.run_experiment(other, finished, device="cpu")
    assert "encode.views: 'flip' in the folder, 'none' asked for" in str(refused.value)
    assert "train.epochs: 2 in the folder, 3 asked for" in str(refused.value)
    free = with_changes(experiment, ["encode.batch_size=2", "claim=another"])
    assert cc.run_experiment(free, finished, device="cpu", until="encode").claim == "another"


def test_a_foreign_folder_a_damaged_record_and_a_busy_one_are_refused(
    experiment: cc.Experiment, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunMismatchError, match=r"holds 'thesis\.tex' and no experiment\.json"):
        cc.run_experiment(experiment, tmp_path / "mine")
    with pytest.raises(RunMismatchError, match="is a file"):
        cc.run_experiment(experiment, tmp_path / "mine" / "thesis.tex")
    (tmp_path / "hurt").mkdir()
    (tmp_path / "hurt" / "experiment.json").write_text('{"version": 1')
    with pytest.raises(ManifestError, match=r"experiment\.json is damaged"):
        cc.run_experiment(experiment, tmp_path / "hurt")
    from ci2p_cache.cache.lock import locked

    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy" / ".lock", what="run"):
        with pytest.raises(LockedError):
            cc.run_experiment(experiment, tmp_path / "busy")


def test_ranks_without_a_cache_are_told_to_encode_first(
    experiment: cc.Experiment, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="has no cache to train from yet") as refused:
        cc.run_experiment(experiment, tmp_path / "out", ranks=Ranks(rank=0, world_size=2))
    assert "--until encode" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_train_from_a_cache_that_was_encoded_before_and_rank_0_reports(
    image_folder: Path, tmp_path: Path
) -> None:
    words = ("run", REPO / "pipelines" / "flowers.py:vitds_tiny", image_folder, "--device", "cpu",
             "--set", "encode.size=64", "--set", "encode.val_fraction=0.3",
             "--set", "train.epochs=1", "--set", "train.batch_size=8",
             "--out", tmp_path / "out")  # fmt: skip
    experiment = with_changes(
        cc.load_experiment(f"{REPO}/pipelines/flowers.py:vitds_tiny"),
        ["encode.size=64", "encode.val_fraction=0.3", "train.epochs=1", "train.batch_size=8",
         f"source={image_folder}"],
    )  # fmt: skip
    cc.run_experiment(experiment, tmp_path / "out", device="cpu", until="encode")
    ranks = launch(2, "ci2p_cache", *words)
    shown, _ = ranks.communicate(timeout=300)
    assert ranks.returncode == 0, shown
    assert shown.count("flowers_vitds_tiny: top-1") == 1
    assert (tmp_path / "out" / "report.html").exists()


def test_the_command_asks_for_images_and_shows_a_plan(
    run: Callable[..., Ran], recipes: Path, image_folder: Path, tmp_path: Path
) -> None:
    missing = run("run", f"{recipes}:good")
    assert missing.code == 2
    assert "does not say where its images are" in missing.err
    out = tmp_path / "out"
    plan = run(
        "run", f"{recipes}:also", image_folder, "--out", out, "--set", "encode.size=64",
        "--dry-run",
    )  # fmt: skip
    assert plan.code == 0, plan.err
    assert "encode.size" in plan.out
    assert "nothing was written" in plan.out
    assert not out.exists()
    with pytest.raises(UsageError, match="`until` is 'verify'"):
        cc.run_experiment(EXPERIMENT, out, until="verify")  # type: ignore[arg-type]  # the point


def test_a_folder_of_before_format_2_is_one_of_the_same_recipe(tmp_path: Path) -> None:
    record = EXPERIMENT.to_dict()
    del record["encode"]["fold"]
    record["encode"]["level"] = 1
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    assert read_experiment(tmp_path) == EXPERIMENT
