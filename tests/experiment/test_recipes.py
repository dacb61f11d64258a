"""The recipes of pipelines/: each can be made, says what it costs, and stands in the table."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ci2p_cache as cc
from ci2p_cache.errors import RunMismatchError, UsageError
from ci2p_cache.experiment.spec import list_recipes
from ci2p_cache.models.registry import model_config
from tests.support.commands import REPO, Ran
from tests.support.pictures import write_image_folder

PIPELINES = REPO / "pipelines"
FILES = sorted(path for path in PIPELINES.glob("*.py") if list_recipes(path))
RECIPES = [f"{path}:{name}" for path in FILES for name in list_recipes(path)]


def script(name: str) -> ModuleType:
    """A script of pipelines/ as a module."""
    spec = importlib.util.spec_from_file_location(f"pipelines_{name}", PIPELINES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_files_with_recipes_are_these() -> None:
    names = ["animals10", "codec_sweep", "flowers", "imagenet", "smoke"]
    assert [path.stem for path in FILES] == names
    assert len(RECIPES) == 30


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.rpartition("/")[2])
def test_every_recipe_makes_an_experiment(recipe: str) -> None:
    experiment = cc.load_experiment(recipe)
    assert cc.Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment
    assert experiment == cc.load_experiment(recipe)
    assert experiment.claim
    assert model_config(experiment.train.model, num_classes=10).num_classes == 10
    path, _, name = recipe.rpartition(":")
    assert list_recipes(path)[name].endswith(".")


def test_no_two_recipes_share_a_folder() -> None:
    names = [cc.load_experiment(recipe).name for recipe in RECIPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_head_of_a_file_says_what_it_costs_and_what_to_expect(path: Path) -> None:
    head = path.read_text("utf-8").split('"""')[1]
    for word in ("Paper:", "Command:", "Hours:", "Hardware:", "Expect:", "Disk:"):
        assert word in head, word
    for name in ("Hours", "Expect"):
        part = head.partition(f"{name}:")[2]
        assert "measured" in part or path.stem == "smoke"
    assert f"pipelines/{path.name}:" in head


def test_every_file_stands_in_the_table_of_the_readme() -> None:
    text = (PIPELINES / "README.md").read_text("utf-8")
    for path in FILES:
        assert f"| `{path.name}" in text
    for name in script("study").PLANS:
        assert f"| {name} |" in text


@pytest.mark.slow
def test_smoke_runs_the_whole_path_and_then_has_nothing_to_do(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    command = ("run", PIPELINES / "smoke.py:smoke", "--out", tmp_path / "out", "--device", "cpu",
               "--set", "generate=8", "--set", "train.epochs=1")  # fmt: skip
    first = run(*command)
    assert first.code == 0, first.err
    assert "smoke: top-1" in first.out
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    again = json.loads(run(*command, "--json").out)
    assert again["encoded"]["encoded_now"] == 0
    assert again["trained"]["trained_epochs"] == 0
    assert again["scores"]["samples"] == again["encoded"]["splits"]["val"]
    assert set(again["seconds"]) == {"encode", "train", "evaluate"}
    other = run(*command[:-1], "train.epochs=2")
    assert other.code == 4
    assert "train.epochs: 1 in the folder, 2 asked for" in other.err
    own = run("run", PIPELINES / "smoke.py:smoke", tmp_path)
    assert own.code == 2
    assert "draws its own pictures" in own.err


def test_every_configuration_of_the_study_can_be_made() -> None:
    study = script("study")
    settings = study.StudySettings(size=64, epochs=1, batch_size=8, lr=1e-3, folds=2, seed=0)
    asked = study.Asked(
        source=Path("a"), out=Path("b"), results=Path("c"), settings=settings, names=(), jobs=1,
        device="cpu", words=(),
    )  # fmt: skip
    assert study.REFERENCE in study.PLANS
    for plan in study.PLANS.values():
        spec = asked.spec(plan, 1)
        assert (spec.folds, spec.fold, spec.epochs) == (2, 1, 1)
        assert model_config(spec.model, num_classes=5).num_classes == 5
        assert asked.encode_options(plan).val_fraction == 0


def test_the_tables_of_the_study_are_what_its_results_give() -> None:
    study = script("study")
    records = sorted((PIPELINES / "results").glob("*.json"))
    assert records
    for record in records:
        found = study.read_study(record)
        assert found is not None
        table = record.with_suffix(".csv").read_bytes()
        assert table == study.study_csv(found)
        page = (PIPELINES / "README.md").read_text("utf-8")
        for row in csv.DictReader(io.StringIO(table.decode())):
            command = row.pop("command")
            assert f"| {' | '.join(row.values())} |\n" in page
            assert command.endswith(f"--only {row['configuration']}")


@pytest.mark.slow
def test_a_study_validates_each_image_once_and_names_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = script("study")
    write_image_folder(tmp_path / "img", {"ant": 7, "bee": 6})
    words = [str(tmp_path / "img"), "--out", str(tmp_path / "out"), "--device", "cpu", "--size",
             "64", "--epochs", "1", "--batch-size", "4", "--folds", "2", "--results",
             str(tmp_path / "found")]  # fmt: skip
    names = ["a-int8", "b-crops4", "c-online", "e-encoder"]
    study.main([*words, *(word for name in names for word in ("--only", name))])
    found = study.read_study(tmp_path / "found.json")
    assert found is not None
    known = {each.name: each for each in found.configurations}
    assert [each.name for each in found.configurations] == names
    assert {each.samples for each in found.configurations} == {13}
    cached, online = known["a-int8"], known["c-online"]
    # The encoder in the loop gives the same losses to the last bit, so the same images are right.
    assert cached.bits == online.bits
    assert online.gmac > cached.gmac
    assert study.paired_difference(cached.is_right(), online.is_right()) == (0, 0, 0)
    with (tmp_path / "found.csv").open(newline="") as file:
        assert [row["configuration"] for row in csv.DictReader(file)] == names
    capsys.readouterr()
    study.main([*words, "--table"])
    assert "not run yet" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        study.main([*words, "--epochs", "2", "--table"])
    assert refused.value.code == 4


def test_bits_of_a_study_survive_and_pairs_are_compared_image_by_image(tmp_path: Path) -> None:
    made = script("study")
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(101) < 0.9, rng.random(101) < 0.5
    keys = [f"{number:03d}" for number in range(101)]
    settings = made.StudySettings(size=64, epochs=1, batch_size=8, lr=1e-3, folds=2, seed=0)

    def configuration(name: str, bits: np.ndarray) -> Any:
        return made.Configuration(
            name=name, what="", model="vit", bits=np.packbits(bits).tobytes().hex(), samples=101,
            correct=int(bits.sum()), seconds_per_epoch=1.0, bytes_per_view=None, gmac=1.0,
            device="cpu", command="",
        )  # fmt: skip

    study = made.with_configuration(None, settings, keys, configuration("b", ours))
    study = made.with_configuration(study, settings, keys, configuration("a", theirs))
    (tmp_path / "study.json").write_text(json.dumps(study.to_dict()))
    again = made.read_study(tmp_path / "study.json")
    assert again == study
    assert [each.name for each in study.configurations] == ["a", "b"]
    found = study.configurations[1]
    assert np.array_equal(found.is_right(), ours)
    gap = made.paired_difference(ours, theirs)
    value, low, high = gap
    assert value == pytest.approx(ours.mean() - theirs.mean())
    assert 0 < low < value < high < 1
    assert made.paired_difference(ours, theirs) == gap
    assert made.paired_difference(ours, ours) == (0, 0, 0)
    # Of 101 images with 61 more right than wrong the normal interval is close.
    half = 1.96 * float(np.std(ours.astype(float) - theirs.astype(float))) / 101**0.5
    assert low == pytest.approx(value - half, abs=0.02)
    with pytest.raises(RunMismatchError, match="epochs: 1 in the study, 2 asked for"):
        made.read_study(tmp_path / "study.json", dataclasses.replace(settings, epochs=2))
    with pytest.raises(RunMismatchError, match="other images"):
        made.with_configuration(study, settings, keys[:-1], configuration("c", ours))
    with pytest.raises(UsageError, match="do not add up"):
        made.Study(
            settings=settings,
            keys=tuple(keys),
            configurations=(dataclasses.replace(found, correct=3),),
        )
    with pytest.raises(UsageError, match="images"):
        made.paired_difference(ours, theirs[:-1])


@pytest.mark.slow
def test_the_other_systems_have_the_parameters_and_macs_of_their_papers() -> None:
    systems = script("systems")
    for system in systems.SYSTEMS:
        if system.title == "CvT-21" and not find_spec("transformers"):
            continue
        found = cc.complexity(system.model, size=system.size, num_classes=system.num_classes)
        assert found.parameters / 1e6 == pytest.approx(system.millions, rel=0.01)
        if system.gmacs is not None:
            # Papers count attention's products or leave them out; CeiT's figure is between.
            counts = (found.macs, found.macs - found.attention_macs)
            assert min(abs(each / 1e9 - system.gmacs) for each in counts) < 0.03 * system.gmacs
