"""What is validated and saved has BatchNorm statistics of its own weights, in the shortest run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.models.registry import build_model
from ci2p_cache.training.checkpoint import weights_of
from ci2p_cache.training.inputs import model_config_for
from ci2p_cache.training.metrics import opened_statistics
from ci2p_cache.training.ranks import Ranks
from tests.support.caches import make_cache
from tests.support.fresh import fresh_model, statistics_of
from tests.training.test_training import eventful, rows_of

SPEC = cc.TrainSpec(model="vitds_nano", epochs=1, batch_size=20, lr=1e-2)
TRAIN, VAL = 150, 60


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 training and 60 validation latents of three classes, 64 px."""
    counts = {"train": {"ant": 40, "bee": 50, "cat": 60}, "val": {"ant": 20, "bee": 20, "cat": 20}}
    return make_cache(tmp_path_factory.mktemp("norm") / "out", counts)


def changed(**fields: object) -> cc.TrainSpec:
    return dataclasses.replace(SPEC, **fields)  # type: ignore[arg-type]  # any field


def scores(model: nn.Module, split: cc.Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a split's first views."""
    latents = torch.stack([split[row][0][0] for row in split.valid_rows])
    labels = torch.from_numpy(split.labels[split.valid_rows].astype(np.int64))
    with torch.inference_mode():
        logits = model.eval()(latents)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        pytest.param(changed(batch_size=100), marks=pytest.mark.slow),
        changed(epochs=2, batch_size=64, accumulate=4),
        changed(ema=0.9, mixup=0.8, drop_path=0.5),
        pytest.param(changed(order="blocks"), marks=pytest.mark.slow),
        pytest.param(changed(precision="bf16"), marks=pytest.mark.slow),
        changed(model="vit_nano", folds=3, fold=1),
    ],
    ids=["short", "shorter", "parts", "average", "blocks", "bf16", "folds"],
)
def test_the_shown_accuracy_is_that_of_statistics_estimated_for_the_weights(
    cache_dir: Path, tmp_path: Path, spec: cc.TrainSpec
) -> None:
    cache = cc.open_cache(cache_dir)
    summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
    last = Path(summary.last_checkpoint)
    model = fresh_model(cache, spec, weights_of(last))
    exact = spec.precision == "float32"
    rtol, atol = (1e-5, 1e-6) if exact else (0.1, 0.05)
    saved = statistics_of(weights_of(last))
    for name, value in statistics_of(model.state_dict()).items():
        torch.testing.assert_close(saved[name], value, rtol=rtol, atol=atol)
    if not spec.folds:
        loss, top1 = scores(model, cache["val"])
        assert summary.last.val_loss == pytest.approx(loss, rel=1e-4 if exact else 0.05)
        assert summary.last.val_top1 == pytest.approx(top1, abs=1e-9 if exact else 0.05)
    own = load_file(last / "model.safetensors")
    model = fresh_model(cache, spec, own)
    for name, value in statistics_of(model.state_dict()).items():
        torch.testing.assert_close(statistics_of(own)[name], value, rtol=rtol, atol=atol)


def test_a_run_of_few_steps_is_shown_what_it_has_learned(cache_dir: Path, tmp_path: Path) -> None:
    # Eight steps: running averages still hold 0.9**8 = 43 % of the mean 0 and variance 1 of before.
    summary = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert summary.last.val_top1 is not None
    assert summary.last.val_top1 >= 0.9


def test_it_takes_a_bounded_number_of_samples_in_whole_batches(
    cache_dir: Path, tmp_path: Path
) -> None:
    for spec, batches in ((SPEC, 7), (changed(batch_size=100), 2), (changed(batch_size=400), 2)):
        summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
        weights = weights_of(Path(summary.last_checkpoint))
        counts = {int(v) for name, v in weights.items() if name.endswith("num_batches_tracked")}
        assert counts == {batches}


def test_at_its_end_a_run_over_few_images_takes_all_of_them(
    cache_dir: Path, tmp_path: Path
) -> None:
    # 128 samples before the end, eight batches; all whole batches at the end, nine.
    spec = changed(epochs=2, batch_size=16)
    summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
    own = weights_of(Path(summary.last_checkpoint))
    model = fresh_model(cc.open_cache(cache_dir), spec, own, samples=TRAIN)
    for name, value in statistics_of(model.state_dict()).items():
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)
    assert {int(v) for name, v in own.items() if name.endswith("num_batches_tracked")} == {9}
    assert estimate([model], cc.open_cache(cache_dir)["train"], spec)
    earlier = model.state_dict()
    assert {int(v) for name, v in earlier.items() if name.endswith("num_batches_tracked")} == {8}


def test_a_checkpoint_inside_an_epoch_has_its_own_statistics_and_goes_on_to_the_same_bits(
    cache_dir: Path, tmp_path: Path
) -> None:
    def stop(_: cc.Batch) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    cache = cc.open_cache(cache_dir)
    with eventful(cache_dir, SPEC) as loader:
        whole = cc.train(
            cache_dir, spec=SPEC, runs_dir=tmp_path, name="whole", loader=loader, device="cpu",
            save_every_steps=3,
        )  # fmt: skip
    with eventful(cache_dir, SPEC, {(0, 1): stop}) as loader:
        with pytest.raises(errors.InterruptedRunError):
            cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name="stopped", loader=loader)
        folder = tmp_path / "stopped" / "checkpoints"
        last = folder / json.loads((folder / "last.json").read_text())["last"]
        assert last.name == "epoch-0000-step-000002"
        saved = weights_of(last)
        wanted = statistics_of(fresh_model(cache, SPEC, saved).state_dict())
        torch.testing.assert_close(statistics_of(saved), wanted, rtol=1e-5, atol=1e-6)
        ended = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name="stopped", loader=loader)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    ours, theirs = (
        (Path(run.last_checkpoint) / "model.safetensors").read_bytes() for run in (ended, whole)
    )
    assert ours == theirs


class Twice(nn.Module):
    """Calls one BatchNorm twice and drops half of what comes in; notes how far a pass gets."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.first = nn.BatchNorm2d(4, momentum=0.3)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Conv2d(4, 3, 1)
        self.ends = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.drop(x))
        x = self.first(self.untracked(x) * 3 + 2)
        self.ends += 1
        return self.head(x).mean((2, 3))


@pytest.fixture
def train_split(cache_dir: Path) -> cc.Split:
    return cc.open_cache(cache_dir)["train"]


def estimate(models: list[nn.Module], split: cc.Split, spec: cc.TrainSpec = SPEC) -> bool:
    """Estimates once; says whether there was anything to."""
    with opened_statistics(
        models, split, spec, device=torch.device("cpu"), reads="latents", threads=1, ranks=Ranks()
    ) as statistics:
        for _ in range(2):
            if statistics is not None:
                statistics.estimate()
        return statistics is not None


def test_nothing_else_of_a_model_or_of_torch_changes(train_split: cc.Split) -> None:
    model, other = Twice().train(), Twice().eval()
    other.load_state_dict(model.state_dict())
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert estimate([model, other], train_split)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in other.modules())
    assert model.first.momentum == 0.3
    assert not model.first._forward_hooks
    after = model.state_dict()
    changes = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changes == {
        "first.running_mean", "first.running_var", "first.num_batches_tracked",
    }  # fmt: skip
    assert all(torch.equal(value, after[name]) for name, value in other.state_dict().items())
    # The second call's statistics count, those of what comes out of the first: mean 2, deviation 3.
    torch.testing.assert_close(model.first.running_mean, torch.full((4,), 2.0))
    # One pass to the end shows where the last BatchNorm is, the others end there.
    assert (model.ends, other.ends) == (1, 0)


def test_a_model_without_batch_norm_is_left_alone(train_split: cc.Split, cache_dir: Path) -> None:
    for model in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)),
        build_model(model_config_for(cc.open_cache(cache_dir), changed(model="vit_nano16"))),
    ):
        assert not estimate([model], train_split)


def test_a_batch_that_gives_no_finite_statistics_is_left_out(train_split: cc.Split) -> None:
    class Overflows(nn.Module):
        """Makes every third of seven batches infinite, and drops half of what comes in."""

        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.norm = nn.BatchNorm2d(4)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.clone())
            scale = float("inf") if len(self.seen) % 7 == 3 else 1.0
            return self.norm(self.drop(x) * scale)

    model = Overflows()
    assert estimate([model], train_split)
    good = [x for number, x in enumerate(model.seen[:7], start=1) if number != 3]
    mean = torch.stack([x.mean((0, 2, 3)) for x in good]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    assert model.norm.num_batches_tracked == 6
