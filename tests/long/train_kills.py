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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import write_image_folder
from tests.faults.nursery import Ended, Nursery

CLOCK = {"images_per_second", "wait_share", "epoch_seconds"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    good = kills = in_save = too_late = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = folder / "runs"
        with Nursery(folder, runs) as nursery:
            command = _prepare(folder, nursery)
            whole = nursery.run(command)
            assert whole.code == 0, whole.told
            wanted = _numbers(runs / "run")
            while kills < arguments.count:
                shutil.rmtree(runs)
                saves = nursery.has_shim and kills % 2 == 1
                ended = _kill(nursery, command, rng, whole, saves=saves)
                if ended.code != -9:
                    too_late += 1
                    continue
                kills += 1
                in_save += saves
                resumed = nursery.run(command)
                problems = []
                if resumed.code != 0:
                    problems.append(f"exit {resumed.code}: {resumed.told[-400:]}")
                elif _numbers(runs / "run") != wanted:
                    problems.append("other numbers than the undisturbed run")
                if "damaged" in resumed.told:
                    problems.append(f"a kill damaged a checkpoint: {resumed.told}")
                left = [path.name for path in (runs / "run").rglob(".*")]
                if left:
                    problems.append(f"left {left}")
                good += not problems
                for problem in problems:
                    print(f"  kill {kills}: {problem}", flush=True)
    print(
        f"{good}/{kills} ({in_save} of them inside a save; {too_late} came after the end and do "
        "not count)"
    )
    return int(good < kills)


def _prepare(folder: Path, nursery: Nursery) -> list[str]:
    """Encodes a small cache; returns the training command: 3 epochs of 5 steps, each saved."""
    write_image_folder(folder / "src" / "train", {"ant": 9, "bee": 7, "cat": 8})
    write_image_folder(folder / "src" / "val", {"ant": 3, "bee": 2, "cat": 3}, quality=60)
    cache = folder / "cache"
    encoded = nursery.run(
        [
            *("encode", str(folder / "src"), "--out", str(cache), "--encoder", "bundled"),
            *("--size", "64", "--shard-samples", "8", "--devices", "cpu:1"),
        ]
    )
    assert encoded.code == 0, encoded.told
    return [
        *("train", str(cache), "--model", "vitds_tiny", "--epochs", "3", "--batch-size", "5"),
        *("--save-every", "1", "--runs", str(folder / "runs"), "--name", "run"),
        *("--device", "cpu", "--workers", "1"),
    ]


def _kill(
    nursery: Nursery, command: list[str], rng: random.Random, whole: Ended, *, saves: bool
) -> Ended:
    if not saves:
        return nursery.run(command, kill_after=rng.uniform(0.1, 1.0) * whole.seconds)
    at = rng.randint(1, whole.calls)
    return nursery.run(command, at=at, kind=rng.choice(["before", "after"]))


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
