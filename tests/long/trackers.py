"""`train --track wandb` with the real package, in its offline mode, read back from what it wrote.

In an environment of its own, which sees this one's packages and has the extra `track`. An
undisturbed run; one that Ctrl-C stops, and that continues; runs that SIGKILL ends, and that
continue, again and again. All of a run's parts must be of one W&B run, with no step twice and every
value that of `steps.csv` and `summary.csv`. After Ctrl-C nothing may be missing; after a kill only
what was handed over before it, as wandb writes every 15 seconds. Without a login, a run that is not
offline must be refused before its first step.

python tests/long/trackers.py [--count KILLS] [--env FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.caches import make_cache

REPO = Path(__file__).resolve().parents[2]

OPTIONS = ("--model", "vitds_tiny", "--epochs", "3", "--batch-size", "4", "--save-every", "5",
           "--device", "cpu", "--workers", "1", "--track", "wandb,csv")  # fmt: skip
STEPS, EPOCHS = 24, 3
"""Steps of an epoch, and epochs."""
TAGS = {"epoch": "epoch", "train/loss": "train_loss", "train/lr": "lr", "val/top1": "val_top1",
        "val/loss": "val_loss", "train/loss_step": "loss", "train/lr_step": "lr"}  # fmt: skip
"""What is compared, and the columns that have it; those of `steps.csv` end in _step."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--env", type=Path, help="make the environment here, or use the one there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trackers-") as name:
        folder = Path(name)
        if not arguments.inside:
            python = environment(arguments.env or folder / "env")
            words = ("--inside", "--count", str(arguments.count), "--seed", str(arguments.seed))
            return subprocess.run([python, __file__, *words], check=False).returncode
        counts = {"train": {"ant": 36, "bee": 28, "cat": 32}, "val": {"ant": 4, "bee": 4, "cat": 4}}
        make_cache(folder / "cache", counts)
        trial = Trial(folder)
        problems = [
            *trial.undisturbed(),
            *trial.interrupted(),
            *trial.killed(arguments.count, random.Random(arguments.seed)),
            *trial.not_logged_in(),
        ]
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "all passed")
    return int(bool(problems))


def environment(folder: Path) -> Path:
    """Returns the interpreter of an environment with the extra `track`; makes it if need be."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
        wanted = extras["optional-dependencies"]["track"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    subprocess.run([python, "-c", "import wandb; print('wandb', wandb.__version__)"], check=True)
    return python


class Trial:
    """Runs from one cache, with what they must have sent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wanted: dict[int, dict[str, float]] = {}

    def start(self, name: str, **more: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        environment |= {"PYTHONPATH": str(REPO), "WANDB_MODE": "offline", **more}
        words = (self._folder / "cache", *OPTIONS, "--out", self._folder / "runs", "--name", name)
        return subprocess.Popen(
            [sys.executable, "-m", "ci2p_cache", "train", *words], env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, name: str) -> None:
        process = self.start(name)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output

    def parts(self, name: str) -> list[Path]:
        """The folders that wandb made for a run, in the order of time."""
        return sorted((self._folder / "runs" / name / "wandb").glob("offline-run-*"))

    def problems(self, name: str, *, killed_at: int = 0) -> list[str]:
        """Holds what was sent of a run against what must have been.

        What came before the place `killed_at` may be missing.
        """
        ids = {part.name.rpartition("-")[2] for part in self.parts(name)}
        ids.add(json.loads((self._folder / "runs" / name / "wandb.json").read_text())["id"])
        sent: dict[int, dict[str, float]] = {}
        found = [f"{name} has the W&B runs {sorted(ids)}"] if len(ids) > 1 else []
        for part in self.parts(name):
            for place, values in history(next(part.glob("*.wandb"))):
                row = sent.setdefault(place, {})
                found += [f"{name}: {tag} twice at {place}" for tag in row.keys() & values.keys()]
                row |= values
        wanted = {(p, tag): v for p, row in self._wanted.items() for tag, v in row.items()}
        got = {(p, tag): v for p, row in sent.items() for tag, v in row.items()}
        absent = wanted.keys() - got.keys()
        found += [f"{name}: sent {each}, which is not in the files" for each in got.keys() - wanted]
        found += [f"{name}: {each} is {got[each]}, wanted {wanted[each]}"
                  for each in got.keys() & wanted.keys() if got[each] != wanted[each]]  # fmt: skip
        found += [f"{name} lacks {each}" for each in absent if each[0] >= killed_at]
        print(f"{name}: {len(self.parts(name))} parts, {len(got)} values, {len(absent)} missing")
        return found

    def undisturbed(self) -> list[str]:
        self.finish("whole")
        run = self._folder / "runs" / "whole"
        for name, ends in (("steps.csv", True), ("summary.csv", False)):
            with (run / name).open(newline="") as file:
                for row in csv.DictReader(file):
                    place = int(row["step"]) if ends else int(row["epoch"]) * STEPS
                    self._wanted.setdefault(place, {}).update(
                        (tag, float(row[column]))
                        for tag, column in TAGS.items()
                        if tag.endswith("_step") == ends
                    )
        assert len(self._wanted) == STEPS * EPOCHS + 1
        return self.problems("whole")

    def interrupted(self) -> list[str]:
        process = self.start("interrupted")
        self._wait_for_step(process, "interrupted", STEPS + 5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=600)
        found = (
            [] if process.returncode == 130 else [f"Ctrl-C: exit {process.returncode}: {output}"]
        )
        self.finish("interrupted")
        if len(self.parts("interrupted")) != 2:
            found.append("the interrupted run has not two parts")
        return found + self.problems("interrupted")

    def killed(self, count: int, rng: random.Random) -> list[str]:
        """Kills one run twice, then the next one, until there were so many kills."""
        found = []
        for number in range(0, count, 2):
            name = f"killed-{number // 2}"
            for _ in range(2):
                process = self.start(name)
                self._wait_for_step(process, name, 0)
                time.sleep(rng.uniform(0, 3))
                process.kill()
                process.communicate()
            killed_at = self.next_place(name)
            self.finish(name)
            found += self.problems(name, killed_at=killed_at)
            shutil.rmtree(self._folder / "runs" / name)
        return found

    def not_logged_in(self) -> list[str]:
        process = self.start("online", WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9",
                             HOME=str(self._folder))  # fmt: skip
        output, _ = process.communicate(timeout=600)
        found = []
        if process.returncode != 6 or "WANDB_MODE=offline" not in output:
            found.append(f"not logged in: exit {process.returncode}: {output}")
        if (self._folder / "runs" / "online" / "steps.csv").exists():
            found.append("not logged in, and steps were taken")
        self.finish("online")
        return found + self.problems("online")

    def next_place(self, name: str) -> int:
        """Where the next value of a run belongs on the x axis; 0 where it has sent none."""
        record = self._folder / "runs" / name / "wandb.json"
        return (json.loads(record.read_text())["next"] + 1) // 2 if record.exists() else 0

    def _wait_for_step(self, process: subprocess.Popen[str], name: str, step: int) -> None:
        """Waits until more than `step` steps were reported, or the process has ended."""
        while process.poll() is None and self.next_place(name) <= step:
            time.sleep(0.02)


def history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields what was logged to a W&B run: the step, and values by tag.

    The file is a log as LevelDB's: blocks of 32 KiB, in each records of checksum (4 bytes), length
    (2), kind (1: whole, 2: first part, 3: middle, 4: last) and content, which is a protobuf message
    `Record`. Before the first record are 7 bytes of wandb's own. A killed run's end may be torn.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if not kind:
            break
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):
            record = Record.FromString(message)
            message = b""
            if record.HasField("history"):
                items = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                yield items["_step"], {tag: items[tag] for tag in TAGS if tag in items}


if __name__ == "__main__":
    sys.exit(main())
