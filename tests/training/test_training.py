"""Stage two: the same command gives the same numbers whatever interrupts it, or is refused."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.lock import locked
from ci2p_cache.models.ci2p_vit import ModelConfig
from ci2p_cache.models.registry import build_model
from ci2p_cache.record import json_bytes, sealed_bytes
from ci2p_cache.report.charts import draw_curves
from ci2p_cache.report.html import write_report
from ci2p_cache.runs.files import EpochRecord, read_summary, summary_csv
from ci2p_cache.training.metrics import validate
from ci2p_cache.training.optim import lr_at
from ci2p_cache.training.records import TrainObserver, TrainPlan
from tests.support.caches import make_cache
from tests.support.seals import digest, reseal
from tests.support.tiers import thinned
from tests.support.warm import Child, WarmParent

SPEC = cc.TrainSpec(model="vitds_nano", epochs=3, batch_size=5)
TIMES = {"images_per_second", "wait_share", "epoch_seconds"}


class Notes(TrainObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.epochs: list[EpochRecord] = []
        self.plans: list[TrainPlan] = []

    def planned(self, plan: TrainPlan) -> None:
        assert not self.epochs
        self.plans.append(plan)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation latents (4, 4, 4) of three classes, int8."""
    counts = {"train": {"ant": 9, "bee": 7, "cat": 8}, "val": {"ant": 3, "bee": 2, "cat": 3}}
    return make_cache(tmp_path_factory.mktemp("training") / "out", counts)


@pytest.fixture(scope="module")
def finished(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three epochs of five steps; read only."""
    return Path(
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path_factory.mktemp("runs"), device="cpu").path
    )


def changed(**fields: object) -> cc.TrainSpec:
    return dataclasses.replace(SPEC, **fields)  # type: ignore[arg-type]  # any field


def copy_run(run: Path, target: Path) -> Path:
    """A copy whose files share the disk with the original: replace them, never write into them."""
    return shutil.copytree(run, target, copy_function=os.link)


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def rows_of(run: Path) -> list[dict[str, str]]:
    """summary.csv without what depends on the clock."""
    with (run / "summary.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(run: Path, reference: Path) -> None:
    """Same rows, and the last weights and moments equal to the last bit."""
    assert rows_of(run) == rows_of(reference)
    name = json.loads((reference / "checkpoints" / "last.json").read_text())["last"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (path / "checkpoints" / name / file for path in (run, reference))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_same_command_gives_the_same_bits_in_the_same_folder_name(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    notes = Notes()
    summary = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[notes])
    assert Path(summary.path).name == finished.name
    assert finished.name.startswith("vitds_nano-")
    assert_same_run(Path(summary.path), finished)
    assert [record.epoch for record in notes.epochs] == [1, 2, 3]
    assert torch.equal(state, torch.random.get_rng_state())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_loss_goes_down_and_every_image_counts_once(cache_dir: Path, tmp_path: Path) -> None:
    summary = cc.train(cache_dir, spec=changed(lr=1e-2, epochs=6), runs_dir=tmp_path, device="cpu")
    rows = rows_of(Path(summary.path))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert {row["images"] for row in rows} == {"24"}
    assert {row["skipped_steps"] for row in rows} == {"0"}


def test_one_epoch_equals_a_plain_loop_written_out(cache_dir: Path, tmp_path: Path) -> None:
    spec = changed(
        epochs=1, drop_path=0.0, lr=1e-3, min_lr=1e-3, warmup_epochs=0, clip_grad_norm=0, seed=4
    )
    summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")

    torch.manual_seed(4)
    model = cc.create_model(
        "vitds_nano", num_classes=3, latent_channels=4, latent_size=4, drop_path_rate=0.0
    )
    vectors = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)
    total = 0.0
    with cc.LatentLoader(cc.open_cache(cache_dir)["train"], batch_size=5, seed=4) as loader:
        for batch in loader:
            latents = batch.latents.contiguous(memory_format=torch.channels_last)
            loss = torch.nn.functional.cross_entropy(
                model(latents), batch.labels, label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.labels)
    assert summary.last.train_loss == total / 24
    saved = load_file(Path(summary.last_checkpoint) / "model.safetensors")
    for name, value in model.named_parameters():
        assert torch.equal(saved[name], value), name


def test_model_json_and_the_best_weights_give_the_recorded_accuracy(
    cache_dir: Path, finished: Path
) -> None:
    record = json.loads((finished / "model.json").read_text())
    model = build_model(ModelConfig.from_dict(record["model"]))
    best = json.loads((finished / "checkpoints" / "last.json").read_text())["best"]
    model.load_state_dict(load_file(finished / "checkpoints" / best / "model.safetensors"))
    val = cc.open_cache(cache_dir)["val"]
    with torch.inference_mode():
        logits = model.eval()(torch.stack([val[row][0][0] for row in range(8)]))
    labels = torch.from_numpy(val.labels.astype(np.int64))
    top1 = (logits.argmax(1) == labels).double().mean().item()
    rows = rows_of(finished)
    top1s = [float(row["val_top1"]) for row in rows]
    assert top1 == max(top1s)
    row = rows[top1s.index(max(top1s))]
    assert best == f"epoch-{int(row['epoch']):04d}-step-000000"
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-5)
    assert {row["val_top5"] for row in rows} == {"1.0"}
    assert record["classes"] == ["ant", "bee", "cat"]
    assert len(record["offset"]) == record["fingerprint"]["latent"]["channels"] == 4


def start(warm: WarmParent, cache_dir: Path, runs: Path) -> Child:
    return warm.start(
        *("train", cache_dir, "--model", "vitds_nano", "--epochs", 3, "--batch-size", 5),
        *("--out", runs, "--device", "cpu", "--save-every", 1),
    )


def until(holds: Callable[[], bool], process: Child) -> None:
    """Waits for something that a process does."""
    while not holds():
        assert process.poll() is None, process.told()
        time.sleep(0.002)


@pytest.mark.parametrize("attempt", thinned(range(2)))
def test_killed_at_a_random_moment_and_resumed_gives_the_same_bits(
    warm: WarmParent, cache_dir: Path, finished: Path, tmp_path: Path, attempt: int
) -> None:
    process = start(warm, cache_dir, tmp_path)
    first_save = tmp_path / finished.name / "checkpoints" / "last.json"
    if attempt:
        until(lambda: "epoch 1/3" in process.told(), process)
    else:
        until(first_save.exists, process)
    time.sleep(random.uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    notes = Notes()
    summary = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[notes])
    assert_same_run(Path(summary.path), finished)
    assert not [notice for notice in notes.notices if "damaged" in notice]
    left = {path.name for path in Path(summary.path).iterdir()}
    assert left == {
        *("args.yaml", "model.json", "encoder.safetensors", "summary.csv"),
        *("tensorboard", "checkpoints"),
    }
    assert not list((Path(summary.path) / "checkpoints").glob(".*"))


def test_sigterm_ends_resumably_with_its_exit_code(
    warm: WarmParent, cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    process = start(warm, cache_dir, tmp_path)
    until(lambda: "epoch 1/3" in process.told(), process)
    process.send_signal(signal.SIGTERM)
    told = process.wait()
    assert process.returncode == 143
    assert "all of it is saved" in told
    summary = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert_same_run(Path(summary.path), finished)


def test_stopped_again_and_again_by_ctrl_c_it_still_gives_the_same_bits(
    takes_ctrl_c: None, cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    class OnceInside(TrainObserver):
        """The first Ctrl-C comes in the loop, however fast or slow the machine is."""

        def epoch(self, record: EpochRecord) -> None:
            if not stopped:
                os.kill(os.getpid(), signal.SIGINT)

    stopped: list[BaseException] = []
    for attempt in range(60):
        # Longer and longer: on a busy machine half a second is not enough for a single step.
        seconds = random.uniform(0.02, 0.2) * 1.1**attempt
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        observer = OnceInside()
        try:
            if stopped:
                timer.start()
            try:
                cc.train(
                    cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[observer]
                )
            finally:
                timer.cancel()
                if stopped:
                    timer.join()
            break
        except (errors.InterruptedRunError, KeyboardInterrupt) as error:
            # Before or after the loop Ctrl-C is Python's own.
            stopped.append(error)
    by_us = [error for error in stopped if isinstance(error, errors.InterruptedRunError)]
    assert by_us
    assert {error.exit_code for error in by_us} == {130}
    assert_same_run(tmp_path / finished.name, finished)


def test_a_second_ctrl_c_ends_at_once_and_loses_nothing_that_was_saved(
    takes_ctrl_c: None, cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    class Impatient(TrainObserver):
        def epoch(self, record: EpochRecord) -> None:
            noting = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            # Two signals of one number that come at once are one.
            while signal.getsignal(signal.SIGINT) == noting:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[Impatient()])
    assert len(rows_of(tmp_path / finished.name)) == 1
    cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert_same_run(tmp_path / finished.name, finished)


def test_a_write_that_fails_leaves_no_half_checkpoint_and_the_run_goes_on_later(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(TrainObserver):
        def epoch(self, record: EpochRecord) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))

    try:
        with pytest.raises(errors.ResourceError, match=r"optimizer|model") as caught:
            cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[Filling()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 6
    run = tmp_path / finished.name
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "last.json", "epoch-0001-step-000000",
    }  # fmt: skip
    assert not (run / ".staging").exists()
    cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert_same_run(run, finished)


def test_outside_the_main_thread_it_trains_the_same(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_run(tmp_path / finished.name, finished)


def test_a_finished_run_returns_at_once_and_changes_nothing(
    cache_dir: Path, finished: Path
) -> None:
    before, notes = files_below(finished), Notes()
    summary = cc.train(
        cache_dir, spec=SPEC, runs_dir=finished.parent, device="cpu", observers=[notes]
    )
    assert summary.trained_epochs == 0
    assert summary.last.epoch == 3
    name = finished.name
    assert f"To train it again, add --name {name} --overwrite {name}" in notes.notices[0]
    assert files_below(finished) == before


def board_of(run: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]  # no stubs
        event_accumulator,
    )

    return event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_holds_every_epoch_once_after_a_restart(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / finished.name
    copy_run(finished, run)
    shutil.rmtree(run / "checkpoints" / "epoch-0003-step-000000")
    cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert [path.is_file() for path in (run / "tensorboard").iterdir()] == [True] * 2
    board = board_of(run)
    for tag, column in (("train/loss", "train_loss"), ("val/top1", "val_top1"), ("epoch", "epoch")):
        told = [(event.step, event.value) for event in board.Scalars(tag)]
        values = [float(row[column]) for row in rows_of(run)]
        assert told == list(zip((5, 10, 15), np.array(values, np.float32).tolist(), strict=True))
    rates = [(event.step, event.value) for event in board.Scalars("train/lr_step")]
    wanted = [lr_at(step, spec=SPEC, steps_per_epoch=5) for step in range(15)]
    assert rates == list(enumerate(np.array(wanted, np.float32).tolist()))
    # The last batch of an epoch has four images, the others five.
    losses = np.array([event.value for event in board.Scalars("train/loss_step")]).reshape(3, 5)
    means = [float(row["train_loss"]) for row in rows_of(run)]
    np.testing.assert_allclose(np.average(losses, 1, [5, 5, 5, 5, 4]), means, rtol=1e-6)


def test_tensorboard_holds_every_step_once_after_a_failure_and_the_settings(
    cache_dir: Path, tmp_path: Path
) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]  # none

    def fail(_: cc.Batch) -> None:
        raise errors.ShardError("damaged")

    spec, run = changed(batch_size=2, epochs=1), tmp_path / "run"
    with (
        eventful(cache_dir, spec, {(0, 10): fail}) as loader,
        pytest.raises(errors.ShardError, match="damaged"),
    ):
        cc.train(
            cache_dir, spec=spec, runs_dir=tmp_path, name="run", loader=loader, save_every_steps=8
        )
    before = [(event.step, event.value) for event in board_of(run).Scalars("train/loss_step")]
    assert [step for step, _ in before] == list(range(10))
    notes = Notes()
    with eventful(cache_dir, spec) as loader:
        cc.train(
            cache_dir, spec=spec, runs_dir=tmp_path, name="run", loader=loader, observers=[notes]
        )
    assert [(plan.epochs_done, plan.steps_done) for plan in notes.plans] == [(0, 8)]
    board = board_of(run)
    after = [(event.step, event.value) for event in board.Scalars("train/loss_step")]
    assert [step for step, _ in after] == list(range(12))
    assert after[:10] == before
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["model"].string_value == "vitds_nano"
    assert told["batch_size"].number_value == 2
    assert told["weight_decay"].number_value == 0.05


def test_the_plan_says_what_is_trained_and_a_finished_run_has_none(
    cache_dir: Path, tmp_path: Path
) -> None:
    spec, notes = changed(epochs=1, accumulate=2), Notes()
    for _ in range(2):
        cc.train(
            cache_dir, spec=spec, runs_dir=tmp_path, name="run", device="cpu", observers=[notes]
        )
    model = cc.create_model("vitds_nano", num_classes=3, latent_channels=4, latent_size=4)
    (plan,) = notes.plans
    assert plan == TrainPlan(
        path=str(tmp_path / "run"), spec=spec,
        parameters=sum(each.numel() for each in model.parameters()), train_images=24, val_images=8,
        classes=3, views=2, device="cpu", steps=5, epochs_done=0, steps_done=0, last=None,
        initial=None,
    )  # fmt: skip


def test_other_settings_get_another_folder_and_a_named_one_refuses_them(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "mine"
    copy_run(finished, run)
    before = files_below(run)
    with pytest.raises(errors.RunMismatchError, match=r"spec\.lr: 0\.001 in the folder, 0\.002"):
        cc.train(cache_dir, spec=changed(lr=2e-3), runs_dir=tmp_path, name="mine")
    assert files_below(run) == before
    summary = cc.train(cache_dir, spec=changed(epochs=1, lr=2e-3), runs_dir=tmp_path)
    assert Path(summary.path).name not in (finished.name, "mine")


def test_another_data_set_of_the_same_encoder_is_another_run(
    finished: Path, tmp_path: Path
) -> None:
    make_cache(tmp_path / "out", {"train": {"ant": 7, "bee": 8, "cat": 9}, "val": {"ant": 8}})
    with pytest.raises(errors.RunMismatchError, match="data_sha256"):
        cc.train(tmp_path / "out", spec=SPEC, runs_dir=finished.parent, name=finished.name)


def test_a_folder_that_is_no_run_is_never_touched(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    for name in ("photos", "file"):
        for overwrite in (False, True):
            with pytest.raises(errors.RunMismatchError, match="no run folder"):
                cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name=name, overwrite=overwrite)
    assert files_below(tmp_path) == {"photos/cat.jpg": b"dear", "file": b"dear"}
    for name in ("../photos", "", ".", "a/b", "-x"):
        with pytest.raises(errors.UsageError, match="`name`"):
            cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name=name)


def test_overwrite_trains_again_with_other_settings(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    copy_run(finished, tmp_path / "mine")
    summary = cc.train(
        cache_dir, spec=changed(epochs=1), runs_dir=tmp_path, name="mine", overwrite=True
    )
    assert summary.trained_epochs == 1
    assert len(rows_of(tmp_path / "mine")) == 1
    args = yaml.safe_load((tmp_path / "mine" / "args.yaml").read_text())
    assert args["settings"]["spec"]["epochs"] == 1
    assert list((tmp_path / "mine" / "checkpoints").glob("epoch-0003*")) == []


def test_damaged_args_are_refused_and_kept(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for text in ("version: 1\n", "[" * 2000, "settings: 3", "\x00", "- a\n- b\n"):
        (tmp_path / "mine" / "args.yaml").write_text(text)
        with pytest.raises(errors.RunMismatchError, match=r"args\.yaml is damaged"):
            cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name="mine", overwrite=True)
        assert files_below(tmp_path) == {"mine/args.yaml": text.encode()}


def test_two_trainers_of_one_run_do_not_meet(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    copy_run(finished, tmp_path / "mine")
    with (
        locked(tmp_path / "mine" / ".lock", what="train"),
        pytest.raises(errors.LockedError, match=f"process {os.getpid()}"),
    ):
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, name="mine")


def test_a_change_of_threads_is_told(cache_dir: Path, finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path / finished.name)
    args = yaml.safe_load((finished / "args.yaml").read_text())
    args["numerics"]["cpu_threads"] = "64"
    replace_file(tmp_path / finished.name / "args.yaml", yaml.safe_dump(args).encode())
    notes = Notes()
    cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", observers=[notes])
    assert "cpu_threads 64 -> 1" in notes.notices[0]


class EventfulLoader(cc.LatentLoader):
    """Lets something happen to the batches at some places (epoch, step) of the order."""

    events: dict[tuple[int, int], Callable[[cc.Batch], object]]

    def __iter__(self) -> Iterator[cc.Batch]:
        for batch in super().__iter__():
            event = self.events.get((self.epoch, self.step - 1))
            if event is not None:
                event(batch)
            yield batch


def eventful(
    cache_dir: Path,
    spec: cc.TrainSpec,
    events: dict[tuple[int, int], Callable[[cc.Batch], object]] | None = None,
) -> EventfulLoader:
    split = cc.open_cache(cache_dir)["train"]
    loader = EventfulLoader(split, batch_size=spec.batch_size, seed=spec.seed)
    loader.events = events or {}
    return loader


def poison(batch: cc.Batch) -> None:
    """Makes latents NaN, as a broken encoder might."""
    batch.latents.fill_(float("nan"))


def test_a_batch_of_nan_leaves_weights_and_statistics_as_they_were(
    cache_dir: Path, tmp_path: Path
) -> None:
    spec, notes = changed(epochs=1), Notes()
    with eventful(cache_dir, spec, {(0, 4): poison}) as loader:
        summary = cc.train(
            cache_dir, spec=spec, runs_dir=tmp_path, loader=loader, save_every_steps=4,
            observers=[notes], device="cpu",
        )  # fmt: skip
        loader.set_epoch(0)
        rows = [batch.rows.tolist() for batch in loader][4]
    assert summary.last.skipped_steps == 1
    assert summary.last.images == 20
    assert np.isfinite(summary.last.train_loss)
    assert len(notes.notices) == 1
    assert "step 4 of epoch 1 was skipped" in notes.notices[0]
    assert f"rows {rows}" in notes.notices[0]
    after = Path(summary.last_checkpoint)
    before = after.parent / "epoch-0000-step-000004"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (before / file).read_bytes() == (after / file).read_bytes()


def test_ten_bad_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(
    cache_dir: Path, tmp_path: Path
) -> None:
    spec = changed(batch_size=2)
    bad: dict[tuple[int, int], Callable[[cc.Batch], object]] = {
        (1, step): poison for step in range(2, 12)
    }
    with (
        eventful(cache_dir, spec, bad) as loader,
        pytest.raises(
            errors.TrainingDivergedError, match=r"10 steps in a row.* step 11 of epoch 2"
        ),
    ):
        cc.train(cache_dir, spec=spec, runs_dir=tmp_path, name="bad", loader=loader)
    assert len(rows_of(tmp_path / "bad")) == 1
    pointer = json.loads((tmp_path / "bad" / "checkpoints" / "last.json").read_text())
    assert pointer["last"] == "epoch-0001-step-000000"


def test_stopped_between_training_and_validation_an_epoch_is_validated_later(
    cache_dir: Path, tmp_path: Path
) -> None:
    spec = changed(epochs=1)
    with eventful(cache_dir, spec) as loader:
        whole = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, name="whole", loader=loader)

    def stop(_: cc.Batch) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with eventful(cache_dir, spec, {(0, 4): stop}) as loader:
        with pytest.raises(errors.InterruptedRunError, match="0 of 1 epochs and 5 steps") as caught:
            cc.train(cache_dir, spec=spec, runs_dir=tmp_path, name="stopped", loader=loader)
        assert caught.value.exit_code == 143
        cc.train(cache_dir, spec=spec, runs_dir=tmp_path, name="stopped", loader=loader)
    assert_same_run(tmp_path / "stopped", Path(whole.path))


def test_validation_can_be_stopped_and_leaves_the_model_in_its_mode(cache_dir: Path) -> None:
    model = cc.create_model("vitds_nano", num_classes=3, latent_channels=4)
    with cc.LatentLoader(cc.open_cache(cache_dir)["val"], batch_size=3, shuffle=False) as loader:
        stopped = validate(model, loader, precision="float32", should_stop=lambda: True)
        assert stopped is None
        assert model.training
        whole = validate(model, loader, precision="float32", should_stop=lambda: False)
    assert whole is not None
    assert whole.top5 == 1.0


def test_a_loader_of_another_seed_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    with (
        eventful(cache_dir, changed(seed=1)) as loader,
        pytest.raises(errors.UsageError, match="the given loader has"),
    ):
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, loader=loader)


def test_bf16_parts_and_position_embedding_train_too(cache_dir: Path, tmp_path: Path) -> None:
    spec = changed(
        epochs=1, precision="bf16", accumulate=3, pos_embed=True, optimizer="adam",
        decay_norm_and_bias=True,
    )  # fmt: skip
    summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
    assert summary.last.skipped_steps == 0
    assert np.isfinite(summary.last.train_loss)


def test_without_validation_the_lowest_loss_is_best_and_the_curves_are_drawn(
    tmp_path: Path,
) -> None:
    make_cache(tmp_path / "out", {"train": {"ant": 6, "bee": 5}})
    summary = cc.train(tmp_path / "out", spec=changed(epochs=2), runs_dir=tmp_path / "runs")
    rows = rows_of(Path(summary.path))
    assert [(row["val_loss"], row["val_top1"], row["val_top5"]) for row in rows] == [
        ("", "", "")
    ] * 2
    assert summary.best.train_loss == min(float(row["train_loss"]) for row in rows)
    assert draw_curves(summary.path).stat().st_size > 10_000


def test_the_curves_are_a_picture_of_1000_by_600(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = draw_curves(finished, tmp_path / "curves.png")
    with Image.open(picture) as image:
        assert (image.size, image.format) == ((1000, 600), "PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with pytest.raises(errors.InputDataError, match="no run folder"):
        draw_curves(tmp_path)
    (tmp_path / "summary.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(errors.InputDataError, match="is damaged"):
        draw_curves(tmp_path)
    (tmp_path / "summary.csv").write_bytes(summary_csv(()))
    with pytest.raises(errors.InputDataError, match="no epoch yet"):
        draw_curves(tmp_path)


def test_a_half_encoded_or_unfit_cache_makes_no_run_folder(cache_dir: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(cache_dir, half)
    manifest = json.loads((half / "cache.json").read_text())
    (half / "cache.json").write_bytes(sealed_bytes(manifest | {"state": "encoding"}))
    runs = tmp_path / "runs"
    with pytest.raises(errors.IncompleteCacheError):
        cc.train(half, spec=SPEC, runs_dir=runs)
    with pytest.raises(errors.NotACacheError):
        cc.train(tmp_path, spec=SPEC, runs_dir=runs)
    with pytest.raises(errors.UnknownModelError, match="vitds_tiny"):
        cc.train(cache_dir, spec=changed(model="vitds_tin"), runs_dir=runs)
    for device in ("tpu", "mps", "cuda:99"):
        with pytest.raises(errors.UsageError, match="`device`"):
            cc.train(cache_dir, spec=SPEC, runs_dir=runs, device=device)
    with pytest.raises(errors.UsageError, match="`save_every_steps`"):
        cc.train(cache_dir, spec=SPEC, runs_dir=runs, save_every_steps=0)
    assert not runs.exists()


def test_a_cache_without_images_labels_or_room_for_batch_norm_is_refused(
    cache_dir: Path, tmp_path: Path
) -> None:
    odd = shutil.copytree(cache_dir, tmp_path / "odd")
    zarr.open_array(odd / "latents.zarr" / "val" / "labels", mode="r+")[2] = -1
    reseal(odd)
    with pytest.raises(errors.InputDataError, match=r"1 of 8 images of split 'val'.*no label"):
        cc.train(odd, spec=SPEC, runs_dir=tmp_path)
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(odd / "latents.zarr" / "train" / "valid", mode="r+")[:] = False
    reseal(odd)
    with pytest.raises(errors.InputDataError, match="holds no image to train from"):
        cc.train(odd, spec=SPEC, runs_dir=tmp_path)

    make_cache(tmp_path / "out", {"train": {"ant": 3, "bee": 3}}, side=2)
    with pytest.raises(errors.UsageError, match="`batch_size` 5 leaves 6 images"):
        cc.train(tmp_path / "out", spec=SPEC, runs_dir=tmp_path)


def test_a_corrupt_shard_ends_the_run_by_name(cache_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_dir, tmp_path / "bad")
    shard = tmp_path / "bad" / "latents.zarr" / "train" / "latents" / "c.1.0.0.0.0"
    content = bytearray(shard.read_bytes())
    for place in range(0, len(content), 50):
        content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(errors.ShardError, match="split 'train' shard 1"):
        cc.train(tmp_path / "bad", spec=SPEC, runs_dir=tmp_path / "runs", device="cpu")


def test_the_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    spec = cc.TrainSpec(epochs=10, lr=1e-2, min_lr=1e-4, warmup_epochs=2)
    rates = [lr_at(step, spec=spec, steps_per_epoch=7) for step in range(70)]
    assert rates[0] == pytest.approx(1e-2 / 14)
    assert rates[13] == rates[14] == 1e-2
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[:14] == sorted(rates[:14])
    assert rates[14:] == sorted(rates[14:], reverse=True)


def test_a_spec_survives_its_record_and_refuses_what_cannot_be() -> None:
    spec = cc.TrainSpec(lr=1, weight_decay=None, betas=(0.5, 0.9))
    assert cc.TrainSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.to_dict()["lr"] == 1.0
    for fields, message in (
        ({"epochs": 0}, "`epochs` is 0"),
        ({"epochs": True}, "`epochs` is True"),
        ({"seed": 10**400}, "`seed`"),
        ({"clip_grad_norm": 10**400}, "`clip_grad_norm`"),
        ({"accumulate": 65}, "at most 64"),
        ({"lr": float("nan")}, "`lr`"),
        ({"min_lr": 1.0}, "`min_lr`"),
        ({"warmup_epochs": 100}, "less than `epochs` 100"),
        ({"optimizer": "sgd"}, "adamw, adam"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adam takes none"),
        ({"betas": (0.9, 1.0)}, "`betas`"),
        ({"betas": (0.9,)}, "`betas`"),
        ({"eps": 0}, "`eps`"),
        ({"clip_grad_norm": -1}, "wanted a number, 0 <= value"),
        ({"label_smoothing": 1}, "`label_smoothing`"),
        ({"mixup": -1}, "`mixup` is -1; wanted a number"),
        ({"cutmix": float("inf")}, "`cutmix`"),
        (
            {"mixup": 1, "mix_probability": 0},
            "`mix_probability` is 0; wanted a number, 0 < value <= 1",
        ),
        ({"mix_probability": 0.5}, "nothing is mixed"),
        ({"latent_flip": 2}, "`latent_flip`"),
        ({"ema": 1}, "`ema` is 1; wanted a number, 0 <= value < 1"),
        ({"layer_decay": 0}, "`layer_decay`"),
        ({"version": 5}, "`version` is 5"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            cc.TrainSpec(**fields)


def test_a_run_begun_before_the_spec_had_its_newer_fields_goes_on_and_takes_none_of_them(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    run = copy_run(finished, tmp_path / finished.name)
    args = yaml.safe_load((run / "args.yaml").read_text())
    spec = args["settings"]["spec"]
    newer = ("mixup", "cutmix", "mix_probability", "latent_flip", "ema", "layer_decay", "folds",
             "fold", "init_from", "freeze", "train_encoder", "fresh_views")  # fmt: skip
    args["settings"]["spec"] = {k: v for k, v in spec.items() if k not in newer} | {"version": 1}
    replace_file(run / "args.yaml", yaml.safe_dump(args).encode())
    shutil.rmtree(run / "checkpoints" / "epoch-0003-step-000000")
    summary = cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert summary.trained_epochs == 1
    assert_same_run(run, finished)
    with pytest.raises(errors.RunMismatchError, match=r"spec\.ema: 0\.0 in the folder, 0\.9"):
        cc.train(cache_dir, spec=changed(ema=0.9), runs_dir=tmp_path, name=run.name)
    args["settings"]["spec"]["ema"] = 0.0
    replace_file(run / "args.yaml", yaml.safe_dump(args).encode())
    with pytest.raises(errors.RunMismatchError, match=r"damaged or of another version"):
        cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu")


def with_old_names(run: Path) -> Path:
    """Gives the columns of a run the names that earlier versions wrote."""
    old = {"train_loss": "loss", "val_top1": "top1", "val_top5": "top5"}
    header, rest = (run / "summary.csv").read_text().split("\n", 1)
    header = ",".join(old.get(name, name) for name in header.split(","))
    replace_file(run / "summary.csv", f"{header}\n{rest}".encode())
    for folder in (run / "checkpoints").glob("epoch-*"):
        state = json.loads((folder / "state.json").read_text())
        state["history"] = [
            {old.get(name, name): value for name, value in epoch.items()}
            for epoch in state["history"]
        ]
        content = json_bytes(state)
        replace_file(folder / "state.json", content)
        listing = json.loads((folder / "digests.json").read_text())
        for entry in listing["files"]:
            if entry["path"] == "state.json":
                entry |= {"bytes": len(content), "sha256": digest(content)}
        replace_file(folder / "digests.json", json_bytes(listing))
    return run


def test_a_run_with_the_old_names_of_columns_is_read_evaluated_reported_and_goes_on(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    run = with_old_names(copy_run(finished, tmp_path / finished.name))
    assert (run / "summary.csv").read_text().startswith("epoch,loss,train_top1,val_loss,top1,top5,")
    assert read_summary(run) == read_summary(finished)
    result = cc.evaluate(run, cache=cache_dir, device="cpu")
    assert (result.recorded_top1, result.recorded_nll) == (result.top1, result.nll)
    names = write_report([run, finished], tmp_path / "report.html").runs
    assert names == (run.name, run.name)
    shutil.rmtree(run / "checkpoints" / "epoch-0003-step-000000")
    assert cc.train(cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu").trained_epochs == 1
    assert_same_run(run, finished)


def test_a_resident_split_gives_the_same_bits(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    notes = Notes()
    summary = cc.train(
        cache_dir, spec=SPEC, runs_dir=tmp_path, device="cpu", resident="yes", observers=[notes]
    )
    assert any("they are kept there" in notice for notice in notes.notices)
    assert_same_run(Path(summary.path), finished)


@pytest.mark.slow
def test_a_compiled_model_trains_to_nearly_the_same_numbers_and_goes_on_uncompiled(
    takes_ctrl_c: None, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of torch.compile but the C++ compiler, with which this takes minutes.
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)

    class StopAfterOne(TrainObserver):
        def epoch(self, record: EpochRecord) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    spec = cc.TrainSpec(model="ci2p+timm:test_vit", epochs=2, batch_size=6)
    plain = cc.train(cache_dir, spec=spec, runs_dir=tmp_path / "plain", device="cpu")
    with pytest.raises(errors.InterruptedRunError):
        cc.train(
            cache_dir, spec=spec, runs_dir=tmp_path / "compiled", device="cpu",
            compile_model=True, observers=[StopAfterOne()],
        )  # fmt: skip
    notes = Notes()
    summary = cc.train(
        cache_dir, spec=spec, runs_dir=tmp_path / "compiled", device="cpu", observers=[notes]
    )
    assert any("compiled" in notice for notice in notes.notices)
    wanted, got = (
        [float(row["train_loss"]) for row in rows_of(Path(run.path))] for run in (plain, summary)
    )
    np.testing.assert_allclose(got[:1], wanted[:1], rtol=1e-3)
    np.testing.assert_allclose(got, wanted, rtol=0.05)
