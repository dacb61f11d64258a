"""Checkpoints: whole or not there; a damaged one is passed over by name, never read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.runs.files import EpochRecord
from tests.support.caches import make_cache
from tests.support.tiers import thinned
from tests.training.test_training import Notes, copy_run, replace_file, rows_of

SPEC = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=6)
NEWEST, OLDER = "epoch-0002-step-000000", "epoch-0001-step-000002"


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 4 validation images; an epoch has three steps, the last of four images."""
    counts = {"train": {"ant": 7, "bee": 9}, "val": {"ant": 2, "bee": 2}}
    return make_cache(tmp_path_factory.mktemp("checkpoint") / "out", counts)


@pytest.fixture(scope="module")
def finished(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with checkpoints after each step; read only."""
    runs = tmp_path_factory.mktemp("runs")
    summary = cc.train(
        cache_dir, spec=SPEC, runs_dir=runs, name="run", device="cpu", save_every_steps=1
    )
    return Path(summary.path)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return copy_run(finished, tmp_path / "run")


def go_on(cache_dir: Path, run: Path) -> Notes:
    notes = Notes()
    cc.train(
        cache_dir, spec=SPEC, runs_dir=run.parent, name=run.name, device="cpu", observers=[notes]
    )
    return notes


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, to the last bit."""
    names = ("model.safetensors", "optimizer.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_the_last_the_one_before_and_the_best_are_kept(finished: Path) -> None:
    folder = finished / "checkpoints"
    pointer = json.loads((folder / "last.json").read_text())
    assert pointer["last"] == NEWEST
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"last.json", NEWEST, OLDER, pointer["best"]} | (
        {"epoch-0001-step-000000"} if pointer["best"] == NEWEST else set()
    )
    assert {path.name for path in (folder / NEWEST).iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "digests.json",
    }  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    replace_file(path, bytes(content))


def lengthen(path: Path) -> None:
    replace_file(path, path.read_bytes() + b" ")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped weights": lambda folder: flip(folder / "model.safetensors"),
    "flipped moments": lambda folder: flip(folder / "optimizer.safetensors"),
    "flipped state": lambda folder: flip(folder / "state.json"),
    "flipped digests": lambda folder: flip(folder / "digests.json"),
    "longer state": lambda folder: lengthen(folder / "state.json"),
    "truncated moments": lambda folder: replace_file(folder / "optimizer.safetensors", b"ab"),
    "missing state": lambda folder: (folder / "state.json").unlink(),
    "empty folder": empty,
    "missing folder": shutil.rmtree,
    "a file instead": become_a_file,
    "list as digests": lambda folder: replace_file(folder / "digests.json", b"[]"),
    "files no list": lambda folder: replace_file(folder / "digests.json", b'{"files": 3}'),
    "leaving the folder": lambda folder: replace_file(
        folder / "digests.json",
        b'{"version": 1, "files": [{"path": "../x", "bytes": 1, "sha256": ""}]}',
    ),
}


@pytest.mark.parametrize("damage", thinned(DAMAGES))
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_naming_both(
    cache_dir: Path, finished: Path, run: Path, damage: str
) -> None:
    DAMAGES[damage](run / "checkpoints" / NEWEST)
    notes = go_on(cache_dir, run)
    assert "damaged checkpoint passed over" in notes.notices[0]
    assert NEWEST in notes.notices[0]
    assert f"continues from {OLDER}" in notes.notices[0]
    assert rows_of(run) == rows_of(finished)
    assert same_files(run / "checkpoints" / NEWEST, finished / "checkpoints" / NEWEST)


def test_no_whole_checkpoint_is_an_error_that_changes_nothing(cache_dir: Path, run: Path) -> None:
    folders = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    for folder in folders:
        flip(folder / "model.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint in .* is whole") as caught:
        go_on(cache_dir, run)
    assert caught.value.exit_code == 5
    for folder in folders:
        assert folder.name in str(caught.value)
        assert folder.is_dir()
    assert len(rows_of(run)) == 2


def test_a_checkpoint_of_another_run_is_not_taken(
    cache_dir: Path, finished: Path, tmp_path: Path
) -> None:
    other = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=6, seed=1)
    cc.train(cache_dir, spec=other, runs_dir=tmp_path, name="run", device="cpu")
    foreign = tmp_path / "run" / "checkpoints" / NEWEST
    shutil.rmtree(foreign)
    copy_run(finished / "checkpoints" / NEWEST, foreign)
    notes = Notes()
    cc.train(cache_dir, spec=other, runs_dir=tmp_path, name="run", device="cpu", observers=[notes])
    assert "another run" in notes.notices[0]
    assert not same_files(foreign, finished / "checkpoints" / NEWEST)


def test_a_damaged_pointer_is_told_and_written_again(cache_dir: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / NEWEST)
    replace_file(run / "checkpoints" / "last.json", b"\xff\x00")
    notes = go_on(cache_dir, run)
    assert "last.json is damaged" in notes.notices[0]
    pointer = json.loads((run / "checkpoints" / "last.json").read_text())
    assert pointer["last"] == NEWEST


def test_what_a_killed_save_left_is_removed(cache_dir: Path, finished: Path, run: Path) -> None:
    (run / ".staging" / "train").mkdir(parents=True)
    (run / ".staging" / "train" / "args.yaml").write_bytes(b"half")
    replace_file(run / "summary.csv", b"torn")
    go_on(cache_dir, run)
    assert not (run / ".staging").exists()
    assert rows_of(run) == rows_of(finished)


def test_a_trainer_whose_folder_was_taken_over_saves_nothing(
    cache_dir: Path, tmp_path: Path
) -> None:
    class TakesOver(Notes):
        def epoch(self, record: EpochRecord) -> None:
            # What another machine does, where this one was suspended for more than a minute.
            shutil.rmtree(tmp_path / "run" / ".staging")

    with pytest.raises(errors.LockedError, match="another process took over"):
        cc.train(
            cache_dir,
            spec=SPEC,
            runs_dir=tmp_path,
            name="run",
            device="cpu",
            observers=[TakesOver()],
        )
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"last.json", "epoch-0001-step-000000"}


def test_moments_go_back_to_the_memory_order_of_their_parameters() -> None:
    from ci2p_cache.training.optim import (
        load_optimizer_tensors,
        make_optimizer,
        optimizer_tensors,
    )

    def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        x = torch.linspace(-1, 1, 2 * 3 * 6 * 5).view(2, 3, 6, 5)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(0)
    models = [torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (make_optimizer(model, SPEC) for model in models)
    stepped(models[0], first)
    saved = {
        name: t.clone().contiguous() for name, t in optimizer_tensors(models[0], first).items()
    }
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_tensors(models[1], second, saved)
    assert torch.equal(stepped(models[0], first), stepped(models[1], second))
    with pytest.raises(errors.CheckpointError, match="do not fit the model"):
        load_optimizer_tensors(models[1], second, {**saved, "exp_avg/weight": torch.zeros(2)})


def test_weights_that_do_not_fit_the_model_are_an_error(cache_dir: Path, run: Path) -> None:
    import hashlib

    shutil.rmtree(run / "checkpoints" / NEWEST)
    folder = run / "checkpoints" / OLDER
    tensors = load_file(folder / "model.safetensors")
    content = save({**tensors, "head.bias": torch.zeros(7)})
    replace_file(folder / "model.safetensors", content)
    digests = json.loads((folder / "digests.json").read_text())
    for entry in digests["files"]:
        if entry["path"] == "model.safetensors":
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    replace_file(folder / "digests.json", json.dumps(digests).encode())
    with pytest.raises(errors.CheckpointError, match=r"(?s)does not fit the model.*head\.bias"):
        go_on(cache_dir, run)
