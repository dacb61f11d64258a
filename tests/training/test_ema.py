"""Averaged weights: what they are, that they are what is validated, saved, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.models.ci2p_vit import ModelConfig
from ci2p_cache.models.registry import build_model
from ci2p_cache.specs import ViewSpec
from ci2p_cache.training.checkpoint import weights_of
from ci2p_cache.training.optim import WeightAverage, decay_at
from tests.support.caches import make_cache
from tests.support.rank_jobs import do, job, numbers
from tests.training.test_training import copy_run, replace_file, rows_of

SPEC = cc.TrainSpec(
    model="vitds_nano", epochs=2, lr=1e-2, batch_size=5, accumulate=2, mixup=0.8, cutmix=1.0,
    latent_flip=0.3, ema=0.9, layer_decay=0.8,
)  # fmt: skip
"""Everything that is off by default."""


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 14 training and 6 validation images of three classes, 64 px."""
    root = tmp_path_factory.mktemp("ema")
    counts = {"train": {"ant": 5, "bee": 4, "cat": 5}, "val": {"ant": 2, "bee": 2, "cat": 2}}
    make_cache(root / "cache", counts, views=ViewSpec(kind="none"))
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """An uninterrupted run of two epochs of three steps; read only."""
    return Path(do(job("finished", SPEC), folder)["summary"]["path"])


def last_of(run: Path) -> Path:
    folder = run / "checkpoints"
    return folder / str(json.loads((folder / "last.json").read_text())["last"])


def test_the_decay_rises_to_its_value() -> None:
    assert [decay_at(step, 0.999) for step in (0, 1, 90)] == [0.1, 2 / 11, 91 / 100]
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(90, 0.5) == 0.5


def test_an_average_is_that_of_the_formula_and_a_bad_step_leaves_it() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    average = WeightAverage(model, 0.9)
    average.follow(model)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(4):
        model(torch.randn(5, 2, 4, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        is_finite = step != 2
        average.update(step, torch.tensor(is_finite))
        for name, value in model.state_dict().items():
            if is_finite and value.is_floating_point():
                decay = decay_at(step, 0.9)
                wanted[name] = decay * wanted[name] + (1 - decay) * value
    wanted["1.num_batches_tracked"] = torch.tensor(4)
    torch.testing.assert_close(average.tensors(), wanted)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_the_recorded_accuracy_is_that_of_the_averages(folder: Path, finished: Path) -> None:
    record = json.loads((finished / "model.json").read_text())
    model = build_model(ModelConfig.from_dict(record["model"])).eval()
    val = cc.open_cache(folder / "cache")["val"]
    latents = torch.stack([val[row][0][0] for row in range(6)])
    labels = torch.from_numpy(val.labels.astype(np.int64))
    found = {}
    for name, tensors in (
        ("ema", weights_of(last_of(finished))),
        ("model", load_file(last_of(finished) / "model.safetensors")),
    ):
        model.load_state_dict(tensors)
        with torch.inference_mode():
            found[name] = torch.nn.functional.cross_entropy(model(latents), labels).item()
    row = rows_of(finished)[-1]
    assert float(row["val_loss"]) == pytest.approx(found["ema"], rel=1e-5)
    assert float(row["val_loss"]) != pytest.approx(found["model"], rel=1e-3)


def test_the_weights_of_a_checkpoint_are_held_against_their_digest(
    finished: Path, tmp_path: Path
) -> None:
    last = last_of(finished)
    listed = {entry["path"] for entry in json.loads((last / "digests.json").read_text())["files"]}
    assert listed == {path.name for path in last.iterdir()} - {"digests.json"}
    assert "ema.safetensors" in listed
    for name in ("digests.json", "ema.safetensors"):
        (tmp_path / name).write_bytes((last / name).read_bytes())
    assert weights_of(tmp_path).keys() == load_file(last / "model.safetensors").keys()
    content = bytearray((last / "ema.safetensors").read_bytes())
    content[-9] ^= 1
    (tmp_path / "ema.safetensors").write_bytes(content)
    for damaged in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.CheckpointError, match="is not a whole checkpoint"):
            weights_of(damaged)


def test_stopped_anywhere_a_run_with_everything_on_goes_on_to_the_same_bits(
    folder: Path, finished: Path
) -> None:
    for place, done in (
        ("epoch 0 step 1 rank 0", "0 of 2 epochs and 2 steps"),
        ("epoch 1 step 0 rank 0", "1 of 2 epochs and 1 steps"),
    ):
        seen = do(job("stopped", SPEC, events={place: "stop"}), folder)
        assert done in seen["error"]["text"]
    went_on = do(job("stopped", SPEC), folder)
    assert [(each["epochs_done"], each["steps_done"]) for each in went_on["plans"]] == [(1, 1)]
    assert numbers(folder / "runs" / "stopped") == numbers(finished)
    assert set(numbers(finished)[1]) == {
        "model.safetensors", "optimizer.safetensors", "ema.safetensors",
    }  # fmt: skip


def test_a_checkpoint_without_the_averages_of_its_run_is_not_whole(
    folder: Path, finished: Path
) -> None:
    run = copy_run(finished, folder / "runs" / "robbed")
    last = last_of(run)
    digests = json.loads((last / "digests.json").read_text())
    digests["files"] = [each for each in digests["files"] if each["path"] != "ema.safetensors"]
    replace_file(last / "digests.json", json.dumps(digests).encode())
    notices = do(job("robbed", SPEC), folder)["notices"]
    assert "damaged checkpoint passed over" in notices[0]
    assert "lists other files than this run saves" in notices[0]
    assert numbers(run) == numbers(finished)
