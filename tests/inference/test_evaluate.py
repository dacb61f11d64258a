"""`evaluate`: the numbers that training recorded, image by image, or a refusal that says why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.inference.scoring import (
    calibration_bins,
    confusion_triples,
    expected_calibration_error,
)
from ci2p_cache.runs.statistics import wilson_interval
from tests.support.caches import data_digests
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.trained import (
    evaluation_of,
    folder_of,
    make_run,
    rewrite_json,
    seal_checkpoint,
)
from tests.support.warm import WarmParent

pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, `shards` and `runs/run`; evaluations may be written there, nothing else."""
    return make_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    left_out = shutil.ignore_patterns("evaluations")
    return shutil.copytree(made / "runs" / "run", tmp_path / "run", ignore=left_out)


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_numbers_are_those_that_training_recorded(made: Path, checkpoint: str) -> None:
    run = made / "runs" / "run"
    result = cc.evaluate(run, checkpoint=checkpoint)
    with (run / "summary.csv").open() as file:
        names = file.readline().strip().split(",")
        rows = [dict(zip(names, line.strip().split(","), strict=True)) for line in file]
    row = next(row for row in rows if int(row["epoch"]) == result.epoch)
    assert (result.top1, result.top5, result.nll) == tuple(
        float(row[name]) for name in ("val_top1", "val_top5", "val_loss")
    )
    assert (result.recorded_top1, result.recorded_nll) == (result.top1, result.nll)
    assert result.checkpoint == folder_of(run, checkpoint).name
    assert result.is_own_data


def test_images_and_tars_give_the_numbers_of_the_cache(made: Path, tmp_path: Path) -> None:
    run = made / "runs" / "run"
    reference = cc.evaluate(run)
    again = cc.evaluate(run, from_images=True)
    assert again.source == "images"
    assert (again.nll, again.bins) == (reference.nll, reference.bins)
    cc.convert(made / "shards", tmp_path / "tars", format="webdataset")
    assert cc.evaluate(run, cache=tmp_path / "tars").nll == reference.nll


def test_both_files_say_the_same(made: Path) -> None:
    run = made / "runs" / "run"
    result = cc.evaluate(run)
    path = evaluation_of(run)
    read = cc.Evaluation.from_dict(json.loads(path.read_text()))
    assert read == result
    predictions = path.with_name(result.predictions.path)
    assert predictions == path.with_suffix(".parquet")
    assert hashlib.sha256(predictions.read_bytes()).hexdigest() == result.predictions.sha256
    rows = pq.read_table(predictions).to_pylist()
    assert len(rows) == result.samples == 6
    assert [row["row"] for row in rows] == list(range(6))
    labels = cc.open_cache(made / "shards")["val"].labels
    assert [row["label"] for row in rows] == labels.tolist()
    assert {row["key"].split("/")[0] for row in rows} == {"ant", "bee", "cat"}
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(result.nll, rel=1e-6)
    assert np.mean([row["correct"] for row in rows]) == result.top1
    assert all(row["top5"][0] == row["predicted"] and len(row["top5"]) == 3 for row in rows)
    assert [c.samples for c in result.per_class] == [2, 3, 1]
    right = sum(count for label, predicted, count in result.confusion if label == predicted)
    assert right == sum(c.correct for c in result.per_class) == result.top1 * 6
    assert sum(count for _, _, count in result.confusion) == 6
    assert sum(each.samples for each in result.bins) == 6
    assert not [*run.glob(".*"), *path.parent.glob(".*")]


def test_another_split_has_nothing_recorded(made: Path) -> None:
    result = cc.evaluate(made / "runs" / "run", split="train")
    assert (result.samples, result.recorded_top1) == (15, None)
    with pytest.raises(errors.UsageError, match=r"no image in split 'test'.*\['train', 'val'\]"):
        cc.evaluate(made / "runs" / "run", split="test")


def files_of(run: Path) -> set[str]:
    return {path.name for path in (run / "evaluations").iterdir()}


def both(*names: str) -> set[str]:
    return {f"{name}{suffix}" for name in names for suffix in (".json", ".parquet")}


def test_every_split_and_checkpoint_has_files_of_its_own(copy: Path) -> None:
    best, last = folder_of(copy, "best").name, folder_of(copy).name
    val = cc.evaluate(copy)
    kept = data_digests(copy / "evaluations")
    train = cc.evaluate(copy, split="train")
    cc.evaluate(copy, from_images=True)
    cc.evaluate(copy, checkpoint="best")
    names = {f"val-{last}", f"train-{last}", f"val-{last}-images", f"val-{best}"}
    assert files_of(copy) == both(*names)
    assert data_digests(copy / "evaluations").items() >= kept.items()
    read = json.loads(evaluation_of(copy).read_text())
    assert cc.Evaluation.from_dict(read) == val != train
    # The same again replaces its own two files.
    assert cc.evaluate(copy) == val
    assert files_of(copy) == both(*names)


def test_another_cache_does_not_replace_what_the_runs_own_gave(
    made: Path, copy: Path, tmp_path: Path
) -> None:
    """The same names and labels with other pixels, as corrupted versions of a data set have."""
    own = cc.evaluate(copy)
    kept = data_digests(copy / "evaluations")
    for name, quality in (("fog", 20), ("snow", 10)):
        for split in ("train", "val"):
            counts = {each.name: len(list(each.iterdir())) for each in
                      (made / "src" / split).iterdir()}  # fmt: skip
            write_image_folder(tmp_path / name / split, counts, quality=quality)
        options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=4)
        cc.encode(tmp_path / name, tmp_path / f"{name}-shards", options)
        result = cc.evaluate(copy, cache=tmp_path / f"{name}-shards")
        assert (result.is_own_data, result.recorded_nll) == (False, None)
        assert result.nll != own.nll
    assert data_digests(copy / "evaluations").items() > kept.items()
    assert len(files_of(copy)) == 6
    # Its own cache stays its own where it has moved to, and in another format.
    cc.convert(made / "shards", tmp_path / "tars", format="webdataset")
    assert cc.evaluate(copy, cache=tmp_path / "tars").is_own_data
    assert len(files_of(copy)) == 6


class TestElsewhere:
    def test_the_run_is_only_read(
        self, run: Callable[..., Ran], copy: Path, tmp_path: Path
    ) -> None:
        before = data_digests(copy)
        out = tmp_path / "deep" / "er"
        ran = run("evaluate", copy, "--split", "train", "--out", out)
        assert ran.code == 0, ran.err
        path = out / evaluation_of(copy, "train").name
        assert f"written: {path}, {path.with_suffix('.parquet')}" in ran.out.replace("\n", "")
        assert cc.Evaluation.from_dict(json.loads(path.read_text())).split == "train"
        assert sorted(each.name for each in out.iterdir()) == [
            path.name,
            path.with_suffix(".parquet").name,
        ]
        assert data_digests(copy) == before

    def test_what_is_there_is_not_replaced(self, copy: Path, tmp_path: Path) -> None:
        cc.evaluate(copy, out=tmp_path / "out")
        before = data_digests(tmp_path / "out")
        with pytest.raises(errors.RefusedError, match=r"val-epoch.*\.json is there already"):
            cc.evaluate(copy, out=tmp_path / "out")
        assert data_digests(tmp_path / "out") == before
        assert cc.evaluate(copy, out=tmp_path / "out", split="train").samples == 15

    def test_a_place_that_is_no_folder_of_the_users_is_refused_before_the_work(
        self, made: Path, copy: Path, tmp_path: Path
    ) -> None:
        def works(done: int, total: int) -> None:
            pytest.fail("it evaluated first")

        (tmp_path / "file").touch()
        for out, error, match in (
            (tmp_path / "file", errors.ResourceError, "file is no folder"),
            (tmp_path / "file" / "out", errors.ResourceError, "file is no folder"),
            (tmp_path / "a.json", errors.UsageError, "wanted a folder"),
            (made / "shards" / "out", errors.UsageError, "is in the cache"),
            ("s3://bucket/out", errors.UsageError, "is a URL"),
        ):
            with pytest.raises(error, match=match):
                cc.evaluate(copy, out=out, on_progress=works)
        (copy / "evaluations").symlink_to(tmp_path)
        with pytest.raises(errors.ManifestError, match="evaluations is a link"):
            cc.evaluate(copy, on_progress=works)

    def test_a_run_that_cannot_be_written_says_so_before_the_work(
        self, warm: WarmParent, copy: Path, tmp_path: Path
    ) -> None:
        if os.getuid():
            pytest.skip("without root the run's own folder is writable")
        copy.chmod(0o555)
        os.chown(copy, 12345, 12345)
        ended = warm.run("evaluate", copy, unprivileged=True)
        assert ended.code == 6
        assert "not writable" in ended.err
        (tmp_path / "out").mkdir()
        ended = warm.run("evaluate", copy, "--out", tmp_path / "out", unprivileged=True)
        assert ended.code == 0, ended.err


def test_a_cache_of_other_settings_or_classes_is_refused(made: Path, tmp_path: Path) -> None:
    run = made / "runs" / "run"
    before = data_digests(run)
    options = cc.EncodeOptions(encoder="bundled", size=64, views="none", step=2.0)
    cc.encode(made / "src", tmp_path / "other", options)
    with pytest.raises(errors.FingerprintMismatchError) as caught:
        cc.evaluate(run, cache=tmp_path / "other")
    assert "views.kind: 'flip' in the run, 'none' in the cache" in str(caught.value)
    assert "latent.step: 1.0 in the run, 2.0 in the cache" in str(caught.value)
    write_image_folder(tmp_path / "src", {"ant": 4, "dog": 4})
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.5)
    cc.encode(tmp_path / "src", tmp_path / "dogs", options)
    with pytest.raises(errors.FingerprintMismatchError, match="only in the run: bee, cat; only in"):
        cc.evaluate(run, cache=tmp_path / "dogs")
    assert data_digests(run) == before


def test_other_images_of_the_same_kind_may_be_evaluated(made: Path, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "src" / "test", {"ant": 2, "bee": 2, "cat": 2}, quality=80)
    write_image_folder(tmp_path / "src" / "train", {"ant": 1, "bee": 1, "cat": 1})
    cc.encode(tmp_path / "src", tmp_path / "new", cc.EncodeOptions(encoder="bundled", size=64))
    result = cc.evaluate(made / "runs" / "run", cache=tmp_path / "new", split="test")
    assert (result.is_own_data, result.samples, result.recorded_top1) == (False, 6, None)


def test_a_cache_that_has_moved_is_asked_for(made: Path, copy: Path) -> None:
    text = (copy / "args.yaml").read_text()
    (copy / "args.yaml").write_text(text.replace(str(made / "shards"), "/nowhere/shards"))
    with pytest.raises(errors.NotACacheError, match="/nowhere/shards") as caught:
        cc.evaluate(copy)
    assert "--cache" in str(caught.value.hint)
    assert cc.evaluate(copy, cache=made / "shards").samples == 6


class TestDamaged:
    def test_a_truncated_model_file(self, copy: Path) -> None:
        path = copy / "model.json"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(errors.ManifestError, match=r"model\.json is damaged: not JSON"):
            cc.evaluate(copy)

    def test_a_model_file_that_contradicts_itself(self, copy: Path) -> None:
        rewrite_json(copy / "model.json", classes=["ant", "bee"])
        with pytest.raises(errors.ManifestError, match=r"model.json.*3 outputs, 2 class names"):
            cc.load_classifier(copy)
        rewrite_json(copy / "model.json", version=9)
        with pytest.raises(errors.ManifestError, match=r"model.json has `version` 9"):
            cc.load_classifier(copy)

    def test_a_checkpoint_of_another_shape(self, copy: Path) -> None:
        folder = folder_of(copy)
        tensors = load_file(folder / "model.safetensors")
        tensors["head.weight"] = torch.zeros(7, tensors["head.weight"].shape[1])
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(errors.CheckpointError, match=r"model.safetensors is not what was"):
            cc.evaluate(copy)
        seal_checkpoint(folder)
        with pytest.raises(errors.CheckpointError, match=r"(?s)model.safetensors does not.*head"):
            cc.evaluate(copy)

    def test_a_checkpoint_of_another_run(self, copy: Path) -> None:
        folder = folder_of(copy)
        rewrite_json(folder / "state.json", run="0" * 64)
        with pytest.raises(errors.CheckpointError, match=r"state.json is not what was written"):
            cc.evaluate(copy)
        seal_checkpoint(folder)
        with pytest.raises(errors.CheckpointError, match=f"{folder.name} is a checkpoint of ano"):
            cc.evaluate(copy)

    def test_pointers_that_lead_nowhere(self, copy: Path) -> None:
        pointer = copy / "checkpoints" / "last.json"
        name = folder_of(copy).name
        pointer.write_text('{"last": "../../elsewhere"}')
        with pytest.raises(errors.CheckpointError, match=r"last\.json is damaged"):
            cc.evaluate(copy)
        pointer.write_text("[")
        with pytest.raises(errors.CheckpointError, match=r"last\.json is damaged"):
            cc.evaluate(copy)
        assert cc.evaluate(copy, checkpoint=name).checkpoint == name
        with pytest.raises(errors.UsageError, match="wanted best, last or a checkpoint folder"):
            cc.evaluate(copy, checkpoint="newest")
        pointer.unlink()
        with pytest.raises(errors.InputDataError, match="has no checkpoint yet"):
            cc.evaluate(copy)

    def test_no_run_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(errors.InputDataError, match="no run folder"):
            cc.evaluate(tmp_path)


def test_the_command_prints_and_exits_as_documented(
    run: Callable[..., Ran], made: Path, tmp_path: Path
) -> None:
    folder = made / "runs" / "run"
    ran = run("evaluate", folder, "--device", "cpu")
    assert ran.code == 0, ran.err
    flat = " ".join(ran.out.split())
    assert "of 6 images of val" in flat
    assert "recorded in training the same" in flat
    assert "confusions, the most frequent first" in flat
    ran = run("evaluate", folder_of(folder), "--json")
    assert json.loads(ran.out)["checkpoint"] == folder_of(folder).name
    ran = run("evaluate", tmp_path)
    assert (ran.code, "no run folder" in ran.err) == (3, True)


def test_calibration_of_a_case_done_by_hand() -> None:
    confidence = np.array([0.9, 0.95, 0.62, 1.0, 1 / 15])
    correct = np.array([True, False, True, True, False])
    bins = calibration_bins(confidence, correct)
    assert [each.samples for each in bins if each.samples] == [1, 1, 1, 2]
    assert (bins[0].samples, bins[0].accuracy) == (1, 0.0)
    assert bins[14].confidence == pytest.approx(0.975)
    # |0 - 1/15| + |1 - 0.62| + |1 - 0.9| + 2 |0.5 - 0.975|, over 5.
    wanted = (1 / 15 + 0.38 + 0.1 + 0.95) / 5
    assert expected_calibration_error(bins) == pytest.approx(wanted)


def test_the_interval_of_a_share_has_a_width_also_where_none_or_all_are_right() -> None:
    # By hand: (p + z2 / 2n +- z sqrt(p (1 - p) / n + z2 / 4n2)) / (1 + z2 / n), z2 = 3.8415.
    assert wilson_interval(75, 100) == pytest.approx((0.65696, 0.82455), abs=1e-5)
    low, high = wilson_interval(0, 14)
    assert (low, round(high, 4)) == (0, 0.2153)
    low, high = wilson_interval(5, 5)
    assert (round(low, 4), high) == (0.5655, 1)


def test_confusions_are_counted_in_order() -> None:
    labels, predicted = np.array([2, 0, 2, 1, 2]), np.array([1, 0, 1, 1, 2])
    assert confusion_triples(labels, predicted) == ((0, 0, 1), (1, 1, 1), (2, 1, 2), (2, 2, 1))
