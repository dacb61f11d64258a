"""Which signals stop a command so that it can continue, and which it leaves ignored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ci2p_cache as cc
from tests.support.caches import make_cache
from tests.support.commands import REPO
from tests.support.encode_bench import EncodeBench, tree
from tests.support.warm import Child, WarmParent

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("signals") / "c", {"train": {"ant": 9, "bee": 9}})


def training(cache: Path, runs: Path, *, epochs: int = 500) -> list[object]:
    return [
        *("train", cache, "--model", "vit_nano", "--epochs", epochs, "--batch-size", 6),
        *("--out", runs, "--name", "run", "--device", "cpu", "--workers", 1),
    ]


def until(holds: Callable[[], bool], child: Child) -> None:
    """Waits for something that a child does."""
    while not holds():
        assert child.poll() is None, child.told()
        time.sleep(0.002)


def epochs_done(runs: Path) -> int:
    """Lines of numbers in a run's summary."""
    summary = runs / "run" / "summary.csv"
    return len(summary.read_text().splitlines()) - 1 if summary.exists() else 0


def assert_saved(child: Child, runs: Path, number: int) -> None:
    """It ended with the code of that signal, and what it speaks of is on disk."""
    told = child.wait()
    assert child.returncode == 128 + number, told
    assert "all of it is saved" in told
    assert "ci2p-cache train" in told
    last = json.loads((runs / "run" / "checkpoints" / "last.json").read_text())["last"]
    assert (runs / "run" / "checkpoints" / last / "model.safetensors").exists()
    spec = cc.TrainSpec(model="vit_nano", epochs=500, batch_size=6)
    taken = int(last.split("-")[1])
    assert epochs_done(runs) == taken < spec.epochs


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_train_saves_at_the_end_of_its_terminal_at_sigterm_and_at_ctrl_c(
    warm: WarmParent, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    child = warm.start(*training(cache, tmp_path), "--overwrite", "run")
    until(lambda: epochs_done(tmp_path) > 0, child)
    child.send_signal(number)
    assert_saved(child, tmp_path, number)
    # That would remove what was saved.
    assert "--overwrite" not in child.wait()


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_its_parent_ignored_does_nothing_and_sigterm_still_saves(
    warm: WarmParent, cache: Path, tmp_path: Path, ignored: signal.Signals
) -> None:
    # nohup ignores SIGHUP; a shell script has its background jobs ignore SIGINT.
    child = warm.start(*training(cache, tmp_path), ignoring=[ignored])
    until(lambda: epochs_done(tmp_path) > 0, child)
    child.send_signal(ignored)
    seen = epochs_done(tmp_path)
    until(lambda: epochs_done(tmp_path) > seen + 1, child)
    child.send_signal(signal.SIGTERM)
    assert_saved(child, tmp_path, signal.SIGTERM)


def test_encode_ends_at_the_end_of_its_terminal_with_a_command_that_goes_on(
    warm: WarmParent, tmp_path: Path
) -> None:
    made = EncodeBench(tmp_path, images=12, shard_samples=2)
    made.undisturbed(warm)
    shutil.rmtree(made.out)
    child = warm.start(*made.arguments)
    until(lambda: len(made.commits()) > 0, child)
    child.send_signal(signal.SIGHUP)
    told = child.wait()
    assert child.returncode == 129, told
    assert "ci2p-cache encode" in told
    assert not {".staging", ".lock"} & tree(made.out).keys()
    assert warm.run(*made.arguments).code == 0
    assert tree(made.out) == made.whole


@pytest.mark.slow
@pytest.mark.parametrize("start", ["nohup {} &", "{} &"], ids=["nohup", "background"])
def test_a_real_script_starts_it_in_the_background(cache: Path, tmp_path: Path, start: str) -> None:
    words = [str(word) for word in training(cache, tmp_path)]
    words[words.index("vit_nano")] = "vit_tiny"
    command = " ".join([sys.executable, "-W", "ignore", "-m", "ci2p_cache", *words])
    script = f"{start.format(command)} echo $!; wait"
    shell = subprocess.Popen(
        ["sh", "-c", script], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert shell.stdout is not None
    pid = int(next(line for line in shell.stdout if line.strip().isdigit()))
    try:
        end = time.monotonic() + 120
        while epochs_done(tmp_path) < 1:
            assert shell.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        ignored = signal.SIGHUP if start.startswith("nohup") else signal.SIGINT
        os.kill(pid, ignored)
        seen = epochs_done(tmp_path)
        while epochs_done(tmp_path) <= seen + 1:
            assert shell.poll() is None, "it ended at a signal that its parent had it ignore"
            time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
        told, _ = shell.communicate(timeout=60)
    finally:
        shell.kill()
    assert "all of it is saved" in told
