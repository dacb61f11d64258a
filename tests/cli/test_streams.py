"""Closed streams, readers that leave, full disks behind the output, terminals that hang up.

None of them ends work or changes what it comes to; only results that a full disk has lost are an
error, after the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ci2p_cache as cc
from tests.support.caches import flip, make_cache
from tests.support.commands import REPO
from tests.support.pictures import write_image_folder
from tests.support.warm import LOST_READER, Child, WarmParent

pytestmark = pytest.mark.usefixtures("nano")

FULL = "/dev/full"
ENCODE = ("--encoder", "bundled", "--size", 32, "--shard-samples", 4, "--device", "cpu:1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("streams") / "c", {"train": {"ant": 9, "bee": 9}})


def training(cache: Path, runs: Path, *, epochs: int = 2) -> list[object]:
    return [
        *("train", cache, "--model", "vit_nano", "--epochs", epochs, "--batch-size", 6),
        *("--out", runs, "--name", "run", "--device", "cpu", "--workers", 1),
    ]


def epochs_saved(runs: Path) -> int:
    """Epochs of the newest checkpoint."""
    last = json.loads((runs / "run" / "checkpoints" / "last.json").read_text())["last"]
    assert (runs / "run" / "checkpoints" / last / "model.safetensors").exists()
    return int(last.split("-")[1])


def epochs_told(runs: Path) -> int:
    """Lines of numbers in the run's summary."""
    summary = runs / "run" / "summary.csv"
    return len(summary.read_text().splitlines()) - 1 if summary.exists() else 0


def until(holds: Callable[[], bool], child: Child) -> None:
    """Waits for something that a child does."""
    while not holds():
        assert child.poll() is None, child.told()
        time.sleep(0.002)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


class TestClosed:
    def test_encode_with_stdout_closed_makes_a_whole_cache(
        self, warm: WarmParent, image_folder: Path, tmp_path: Path
    ) -> None:
        words = ("encode", image_folder, "--out", tmp_path / "out", *ENCODE)
        ended = warm.run(*words, streams={1: None})
        assert (ended.code, ended.out) == (0, ""), ended.err
        assert "Traceback" not in ended.err
        # Nothing that was printed has gone into a file that took the closed stream's number.
        assert warm.run("verify", tmp_path / "out").code == 0

    def test_train_with_all_streams_closed_saves_its_run(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        ended = warm.run(*training(cache, tmp_path), streams={0: None, 1: None, 2: None})
        assert ended.code == 0
        assert epochs_saved(tmp_path) == epochs_told(tmp_path) == 2

    def test_the_result_is_printed_where_only_stderr_is_closed(
        self, warm: WarmParent, cache: Path
    ) -> None:
        ended = warm.run("inspect", cache, "--json", streams={2: None})
        assert ended.code == 0
        assert json.loads(ended.out)["images"] == 18

    def test_an_error_keeps_its_code_and_its_message(
        self, warm: WarmParent, tmp_path: Path
    ) -> None:
        ended = warm.run("inspect", tmp_path / "nowhere", streams={1: None})
        assert ended.code == 4
        assert "error:" in ended.err
        assert warm.run("inspect", tmp_path / "nowhere", streams={2: None}).code == 4

    def test_usage_errors_and_help_do_not_crash_either(self, warm: WarmParent) -> None:
        assert warm.run("--help", streams={1: None}).code == 0
        assert warm.run("inspect", streams={1: None, 2: None}).code == 2

    def test_a_signal_with_stderr_closed_keeps_its_code(self, warm: WarmParent) -> None:
        child = warm.start("complexity", streams={2: None})
        until(lambda: catches(child.pid, signal.SIGTERM), child)
        child.send_signal(signal.SIGTERM)
        child.wait()
        assert child.returncode == 143


class TestReaderThatLeaves:
    def test_a_tree_that_nobody_reads_on_is_no_error(self, warm: WarmParent, cache: Path) -> None:
        ended = warm.run("inspect", cache, "--tree", streams={1: LOST_READER})
        assert (ended.code, ended.err) == (0, "")

    @pytest.mark.parametrize("words", [("--help",), ("encode", "--help"), ("--version",)])
    def test_help(self, warm: WarmParent, words: tuple[str, ...]) -> None:
        ended = warm.run(*words, streams={1: LOST_READER})
        assert (ended.code, ended.err) == (0, "")

    def test_what_a_command_found_stays_its_exit_code(
        self, warm: WarmParent, tmp_path: Path
    ) -> None:
        damaged = make_cache(tmp_path / "c", {"train": {"ant": 9, "bee": 9}})
        flip(next((damaged / "index").glob("*.parquet")))
        ended = warm.run("verify", damaged, streams={1: LOST_READER})
        assert ended.code == 5
        assert "findings in" in ended.err

    def test_train_goes_on_to_its_end_without_any_reader(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        lost = {1: LOST_READER, 2: LOST_READER}
        assert warm.run(*training(cache, tmp_path), streams=lost).code == 0
        assert epochs_saved(tmp_path) == 2

    def test_encode_and_its_notices(self, warm: WarmParent, tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 9, "bee": 9})
        (source / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
        out = tmp_path / "out"
        words = ("encode", source, "--out", out, *ENCODE, "--max-errors", 1)
        assert warm.run(*words, streams={1: LOST_READER, 2: LOST_READER}).code == 0
        assert sum(len(split.valid_rows) for split in cc.open_cache(out).values()) == 18

    def test_a_signal_whose_message_nobody_reads_keeps_its_code(self, warm: WarmParent) -> None:
        child = warm.start("complexity", streams={2: LOST_READER})
        until(lambda: catches(child.pid, signal.SIGHUP), child)
        child.send_signal(signal.SIGHUP)
        child.wait()
        assert child.returncode == 129


class TestFullDisk:
    def test_train_saves_all_of_it_and_then_says_that_its_result_was_lost(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        words = training(cache, tmp_path)
        ended = warm.run(*words, streams={1: FULL})
        assert ended.code == 6
        assert "could not be printed: No space left on device" in " ".join(ended.err.split())
        assert "Traceback" not in ended.err
        assert epochs_saved(tmp_path) == 2
        again = warm.run(*words)
        assert again.code == 0
        assert "after 2 epochs" in again.out

    def test_messages_may_be_lost_without_harm(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        ended = warm.run(*training(cache, tmp_path), streams={2: FULL})
        assert ended.code == 0
        assert "after 2 epochs" in ended.out

    def test_another_error_comes_first(self, warm: WarmParent, tmp_path: Path) -> None:
        ended = warm.run("inspect", tmp_path, streams={1: FULL, 2: FULL})
        assert ended.code == 4

    @pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("--version",)])
    def test_help_that_was_lost_is_said_to_be(
        self, warm: WarmParent, words: tuple[str, ...]
    ) -> None:
        ended = warm.run(*words, streams={1: FULL})
        assert ended.code == 6
        assert "No space left on device" in ended.err

    def test_json_that_was_cut_off_is_no_success(self, warm: WarmParent, cache: Path) -> None:
        assert warm.run("inspect", cache, "--json", streams={1: FULL}).code == 6


class TestTerminalThatHangsUp:
    def test_train_saves_and_ends_with_the_code_of_sighup(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        child = warm.start(*training(cache, tmp_path, epochs=500), columns=80)
        until(lambda: epochs_told(tmp_path) > 0, child)
        child.hang_up()
        child.wait()
        assert child.returncode == 129
        assert epochs_saved(tmp_path) == epochs_told(tmp_path)

    @pytest.mark.slow
    def test_under_nohup_it_trains_to_its_end(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        words = training(cache, tmp_path, epochs=8)
        child = warm.start(*words, columns=80, ignoring=[signal.SIGHUP])
        until(lambda: epochs_told(tmp_path) > 0, child)
        child.hang_up()
        child.wait()
        assert child.returncode == 0
        assert epochs_saved(tmp_path) == 8

    def test_a_hang_up_that_is_told_many_times_is_one(
        self, warm: WarmParent, cache: Path, tmp_path: Path
    ) -> None:
        # The kernel tells the foreground jobs, and their shell tells them again.
        child = warm.start(*training(cache, tmp_path, epochs=500))
        until(lambda: epochs_told(tmp_path) > 0, child)
        while child.poll() is None:
            child.send_signal(signal.SIGHUP)
        child.wait()
        assert child.returncode == 129
        assert epochs_saved(tmp_path) == epochs_told(tmp_path)

    def test_encode_puts_away_its_staging_however_often_it_is_told(
        self, warm: WarmParent, tmp_path: Path
    ) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 30, "bee": 30})
        out = tmp_path / "out"
        words = ("encode", source, "--out", out, *ENCODE)
        child = warm.start(*words)
        until(lambda: any(out.glob("commits/*.json")), child)
        while child.poll() is None:
            child.send_signal(signal.SIGHUP)
        told = child.wait()
        assert child.returncode == 129, told
        assert not {".staging", ".lock"} & {path.name for path in out.iterdir()}
        assert warm.run(*words).code == 0
        assert warm.run("verify", out).code == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=["rank and size", "size", "Kubeflow", "torchrun"],
)
def test_a_world_of_one_is_a_run_of_one(
    warm: WarmParent, cache: Path, tmp_path: Path, variables: dict[str, str | None]
) -> None:
    child = warm.start(*training(cache, tmp_path, epochs=500), environment=variables)
    until(lambda: epochs_told(tmp_path) > 0, child)
    child.send_signal(signal.SIGTERM)
    told = child.wait()
    assert child.returncode == 143
    # The command itself continues it, not torchrun's.
    assert f"ci2p-cache train {cache}" in told
    assert epochs_saved(tmp_path) > 0


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
    ],
)
def test_variables_that_fit_no_run_of_one_are_refused(
    warm: WarmParent, cache: Path, tmp_path: Path, variables: dict[str, str | None]
) -> None:
    ended = warm.run(*training(cache, tmp_path), environment=variables)
    assert ended.code == 2
    assert not (tmp_path / "run").exists()


def test_a_pipe_that_another_program_made_non_blocking_gets_every_line(tmp_path: Path) -> None:
    # Node does that to the standard streams that it shares with what it starts.
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    words = [sys.executable, "-W", "ignore", "-m", "ci2p_cache", "encode", "--help"]
    with subprocess.Popen(words, cwd=REPO, stdout=writer, stderr=subprocess.PIPE) as child:
        os.close(writer)
        assert child.stderr is not None
        found = b""
        slowly = threading.Event()
        while part := os.read(reader, 512):
            found += part
            slowly.wait(0.001)
        assert child.wait() == 0, child.stderr.read()
    os.close(reader)
    assert len(found) > 4096
    assert b"--overwrite" in found


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | head -1"])
def test_a_real_shell_closes_them(cache: Path, closed: str) -> None:
    words = f"{sys.executable} -W ignore -m ci2p_cache inspect {cache} --tree {closed}"
    shell = f"set -o pipefail; {words}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPO, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
