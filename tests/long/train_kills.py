"""Bar R9: SIGKILL in `train`, at random times and inside saves; the resumed run is the same run.

Odd kills come at a random time, even ones right before or after a random call that changes the
run folder (a write, fsync or rename of a checkpoint, of summary.csv, ...), which the shim counts.
After each kill the command is repeated to the end: `summary.csv` and the weights and moments must
be equal to the last bit (CPU, one thread).

python tests/long/train_kills.py [--count KILLS]
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.pictures import write_image_folder
from tests.support.warm import Ended, WarmParent

CLOCK = {"images_per_second", "wait_share", "epoch_seconds"}


@dataclass
class Counts:
    """What came of the kills."""

    kills: int = 0
    good: int = 0
    in_save: int = 0
    too_late: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.good}/{self.kills} ({self.in_save} of them inside a save; {self.too_late} came "
            "after the end and do not count)"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, WarmParent(Path(name)) as warm:
        counts = run_kills(warm, Path(name), arguments.count, arguments.seed)
    print("\n".join([*(f"  {problem}" for problem in counts.problems), str(counts)]))
    return int(counts.good < counts.kills)


def run_kills(
    warm: WarmParent,
    folder: Path,
    count: int,
    seed: int,
    *,
    epochs: int = 3,
    batch_size: int = 5,
    model: str = "vitds_tiny",
) -> Counts:
    """Kills a training run `count` times and lets it go on; every second kill is inside a save."""
    rng, counts, runs = random.Random(seed), Counts(), folder / "runs"
    command = [*_prepare(folder, warm), "--epochs", str(epochs), "--batch-size", str(batch_size)]
    command += ["--model", model]
    whole = warm.run(*command, root=runs)
    assert whole.code == 0, whole.told
    wanted = _numbers(runs / "run")
    while counts.kills < count:
        shutil.rmtree(runs)
        saves = warm.has_shim and counts.kills % 2 == 1
        ended = _kill(warm, command, runs, rng, whole, saves=saves)
        if ended.code != -9:
            counts.too_late += 1
            continue
        counts.kills += 1
        counts.in_save += saves
        problems = list(_gone_on(warm, command, runs, wanted))
        counts.good += not problems
        counts.problems += [f"kill {counts.kills}: {problem}" for problem in problems]
    return counts


def _gone_on(
    warm: WarmParent, command: list[str], runs: Path, wanted: tuple[Any, Any]
) -> Iterator[str]:
    """Runs the command again; yields what differs from the undisturbed run."""
    resumed = warm.run(*command)
    if resumed.code != 0:
        yield f"exit {resumed.code}: {resumed.told[-400:]}"
    elif _numbers(runs / "run") != wanted:
        yield "other numbers than the undisturbed run"
    if "damaged" in resumed.told:
        yield f"a kill damaged a checkpoint: {resumed.told}"
    left = [path.name for path in (runs / "run").rglob(".*")]
    if left:
        yield f"left {left}"


def _prepare(folder: Path, warm: WarmParent) -> list[str]:
    """Encodes a small cache; returns the training command, which saves after each step."""
    write_image_folder(folder / "src" / "train", {"ant": 9, "bee": 7, "cat": 8})
    write_image_folder(folder / "src" / "val", {"ant": 3, "bee": 2, "cat": 3}, quality=60)
    cache = folder / "cache"
    encoded = warm.run(
        *("encode", folder / "src", "--out", cache, "--encoder", "bundled"),
        *("--size", "64", "--shard-samples", "8", "--devices", "cpu:1"),
    )
    assert encoded.code == 0, encoded.told
    return [
        *("train", str(cache), "--save-every", "1"),
        *("--runs", str(folder / "runs"), "--name", "run", "--device", "cpu", "--workers", "1"),
    ]


def _kill(
    warm: WarmParent,
    command: list[str],
    runs: Path,
    rng: random.Random,
    whole: Ended,
    *,
    saves: bool,
) -> Ended:
    if not saves:
        return warm.run(*command, kill_after=rng.uniform(0.1, 1.0) * whole.seconds)
    at = rng.randint(1, whole.calls)
    return warm.run(*command, root=runs, at=at, kind=rng.choice(["before", "after"]))


def _numbers(run: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """summary.csv without what depends on the clock, and the weights and moments that are left."""
    with (run / "summary.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]
    newest = max(path.parent.name for path in run.glob("checkpoints/epoch-*/digests.json"))
    tensors = sorted((run / "checkpoints" / newest).glob("*.safetensors"))
    assert len(tensors) == 2
    return rows, {f"{newest}/{path.name}": path.read_bytes() for path in tensors}


if __name__ == "__main__":
    sys.exit(main())
