"""Bar R9 with several ranks: SIGKILL to one of them, or to torchrun; all end, none is left.

Each time one victim, a random rank or torchrun itself, is killed at a random time of a run. Within
60 s no process of the run may be left, and rank 0 may have told of it once at most. Then the same
command is repeated to the end: `summary.csv` and the weights and moments must be equal to the last
bit to those of an undisturbed run (CPU, gloo, one thread per rank).

python tests/long/rank_kills.py [--count KILLS] [--ranks RANKS]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ci2p_cache as cc
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import launch, numbers, processes_with, rank_of

LIMIT_SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="number of kills")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the random times and victims")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    good = kills = too_late = 0
    victims: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = _prepare(folder)
        started = time.monotonic()
        code, told = _end(launch(arguments.ranks, *command))
        whole_seconds = time.monotonic() - started
        assert code == 0, told
        wanted = numbers(folder / "runs" / "run")
        while kills < arguments.count:
            shutil.rmtree(folder / "runs")
            victim = rng.choice([*map(str, range(arguments.ranks)), "torchrun"])
            ranks = launch(arguments.ranks, *command)
            hit = _kill(ranks, victim, rng.uniform(0.1, 1.0) * whole_seconds, folder)
            killed = time.monotonic()
            problems = _left_after(ranks, folder)
            seconds = time.monotonic() - killed
            code, told = _end(ranks)
            if not hit:
                too_late += 1
                continue
            kills += 1
            victims[victim] += 1
            slowest = max(slowest, seconds)
            if told.count("error: another rank") > 1:
                problems.append(f"told more than once: {told}")
            code, told = _end(launch(arguments.ranks, *command))
            if code != 0:
                problems.append(f"the resumed run ended with {code}: {told[-2000:]}")
            elif numbers(folder / "runs" / "run") != wanted:
                problems.append("other numbers than the undisturbed run")
            if "damaged" in told:
                problems.append(f"a kill damaged a checkpoint: {told}")
            left = [str(path) for path in (folder / "runs" / "run").rglob(".*")]
            if left:
                problems.append(f"left {left}")
            good += not problems
            for problem in problems:
                print(f"  kill {kills} (of {victim}): {problem}", flush=True)
    kinds = ", ".join(f"{count} of {victim}" for victim, count in sorted(victims.items()))
    print(
        f"{good}/{kills} ({kinds}; all processes gone after {slowest:.1f} s at most; {too_late} "
        "came after the end and do not count)"
    )
    return int(good < kills)


def _prepare(folder: Path) -> list[object]:
    """Encodes a small cache; returns the training command: 3 epochs of 5 steps, each saved."""
    write_image_folder(folder / "src" / "train", {"ant": 9, "bee": 7, "cat": 9})
    write_image_folder(folder / "src" / "val", {"ant": 3, "bee": 2, "cat": 4}, quality=60)
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=8)
    cc.encode(folder / "src", folder / "cache", options)
    return [
        *("ci2p_cache", "train", folder / "cache", "--model", "vitds_tiny", "--epochs", 3),
        *("--batch-size", 6, "--save-every", 1, "--runs", folder / "runs", "--name", "run"),
        *("--device", "cpu", "--workers", 1),
    ]


def _kill(ranks: subprocess.Popen[str], victim: str, after: float, folder: Path) -> bool:
    """Kills a rank or torchrun after some seconds; returns whether it was there to be killed."""
    time.sleep(after)
    pids = [ranks.pid]
    if victim != "torchrun":
        pids = [pid for pid in processes_with(folder / "runs") if rank_of(pid) == victim]
    if ranks.poll() is not None or not pids:
        return False
    os.kill(pids[0], signal.SIGKILL)
    return True


def _left_after(ranks: subprocess.Popen[str], folder: Path) -> list[str]:
    """Waits until no process of the run is there; returns what was wrong."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if ranks.poll() is not None and not processes_with(folder / "runs"):
            return []
        time.sleep(0.1)
    left = processes_with(folder / "runs")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"{len(left)} processes were left after {LIMIT_SECONDS} s"]


def _end(ranks: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for torchrun; returns its exit code and what it and the ranks have told."""
    told, _ = ranks.communicate(timeout=600)
    return ranks.returncode, told


if __name__ == "__main__":
    sys.exit(main())
