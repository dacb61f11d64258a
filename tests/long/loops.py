"""The programs of docs/loops.md, as printed, in the loops of other libraries.

::

    docs/loops.md -> programs -> an environment with lightning, transformers and accelerate
        -> each program whole, and killed and run again; some with spawned workers, some on two
           processes -> rows, views and losses of each step -> held against the cache

Under watch, each latent that reaches a model is looked up, bit for bit, among those that `Split`
reads, and each batch of labels is compared with the cache's.

python tests/long/loops.py [--env FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

EPOCHS, BATCH, VIEWS = 5, 8, 3
"""Epochs and batch size of every program, and views in its cache."""
PER_CLASS = {"shards": 16, "uneven": 17}
"""Training pictures of each of five classes in a cache; the second has no whole batches."""
VAL_ROWS = 40
KILLED = 25
"""The step in which a program is killed: half of its third epoch is done."""
PROGRAMS = ("DataLoader", "Lightning", "Trainer", "Accelerate", "timm")
"""The last words of the headings in docs/loops.md."""
VALIDATING = ("Lightning", "Trainer", "timm")
PACKAGES = ("lightning", "transformers", "accelerate")
"""What the programs need beside our own dependencies, of which timm is one."""

MAKE_CACHES = """
import json, sys
import ci2p_cache as cc
from pathlib import Path
from ci2p_cache.pictures.drawn import write_pictures
from tests.benchmarks.measure import machine
print("; ".join(f"{name} {value}" for name, value in machine(sys.argv[2:]).items()))
for name, per_class in json.loads(sys.argv[1]).items():
    list(write_pictures(Path(name + "-images/train"), per_class=per_class))
    list(write_pictures(Path(name + "-images/val"), per_class=8, seed=1))
    options = cc.EncodeOptions(encoder="bundled", size=64, views="crops:3")
    print(name, cc.encode(name + "-images", name, options).splits)
"""


KEYS = ("rows", "views", "losses")
Step = dict[str, Any]
"""These of a training step, and whether it is one or a batch of validation."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, help="an environment that has the packages already")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--watch", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        program, killed, start = arguments.watch
        return watch(program, int(killed), start)
    with tempfile.TemporaryDirectory(prefix="loops-") as temporary:
        folder = Path(temporary)
        if arguments.env is None:
            subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        trial = Trial(folder, (arguments.env or folder / "env").absolute())
        if arguments.env is None:
            trial.call("python", "-m", "pip", "install", "--quiet", "-e", str(ROOT), *PACKAGES)
        versions = ("ci2p-cache", "torch", *PACKAGES, "timm")
        trial.call("python", "-c", MAKE_CACHES, json.dumps(PER_CLASS), *versions)
        for name in arguments.only:
            trial.try_out(name)
    print("\n".join(f"FAILED: {each}" for each in trial.failed) or "all passed")
    return int(bool(trial.failed))


class Trial:
    """The programs in one environment, and what failed.

    Args:
        folder: Where caches and runs go.
        environment: A virtual environment with the packages.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        self.folder = folder
        self.environment = environment
        self.failed: list[str] = []
        text = (ROOT / "docs" / "loops.md").read_text("utf-8")
        section = r"^## .*?(\w+)\n.*?^```python\n(.*?)^```"
        self.programs = dict(re.findall(section, text, re.DOTALL | re.MULTILINE))
        assert tuple(self.programs) == PROGRAMS

    def call(self, *command: str, folder: Path | None = None, wanted: int = 0) -> None:
        """Runs a program of the environment; its output is shown where it is the result."""
        bin_folder = self.environment / "bin"
        done = subprocess.run(
            [str(bin_folder / command[0]), *command[1:]],
            cwd=folder or self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "ACCELERATE_USE_CPU": "1",
                "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != wanted:
            raise SystemExit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(command)}")
        if folder is None:
            print(done.stdout, end="", flush=True)

    def try_out(self, name: str) -> None:
        """Runs a program in the ways that it has, and checks what it did."""
        whole = self.run(name, "whole")
        self.check(name, whole)
        if name == "DataLoader":
            for start in ("spawn", "forkserver"):
                found = self.run(name, start, start=start)
                self.expect(f"{name}, {start}: {len(found)} steps as with fork", found == whole)
            return
        before = self.run(name, "killed", killed=KILLED)
        self.expect(f"{name}: the same {KILLED} steps until killed", before == whole[:KILLED])
        rest = self.run(name, "killed")
        done = KILLED // (len(whole) // EPOCHS)
        self.check(f"{name}, run again", rest, epochs=EPOCHS - done)
        compare(rest, whole[-len(rest) :])
        if name == "Accelerate":
            self.check(f"{name}, two processes", self.run(name, "two", processes=2))
            steps = self.run(name, "two, uneven", processes=2, cache="uneven")
            rows = 5 * PER_CLASS["uneven"]
            # 11 batches; a twelfth, and what the last one lacks, come from the epoch's beginning.
            self.check(f"{name}, two processes, uneven", steps, rows=rows, twice=12 * BATCH - rows)

    def run(
        self, name: str, case: str, *, cache: str = "shards", killed: int = 0,
        start: str = "fork", processes: int = 1,
    ) -> list[Step]:  # fmt: skip
        """Runs a program, once more where it was killed; returns the steps of all processes."""
        folder = self.folder / f"{name}, {case}"
        if not folder.exists():
            folder.mkdir()
            (folder / "shards").symlink_to(self.folder / cache)
            (folder / "program.py").write_text(self.programs[name], "utf-8")
        command = ["python"]
        if processes > 1:
            command = ["python", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        watched = (str(Path(__file__)), "--watch", "program.py", str(killed), start)
        self.call(*command, *watched, folder=folder, wanted=9 if killed else 0)
        ranks = [
            [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            for file in sorted(folder.glob("seen-*.jsonl"))
        ]
        assert len(ranks) == processes
        steps = [[line for line in lines if line["trains"]] for lines in ranks]
        if name in VALIDATING and not killed:
            self.check_validation(f"{name}, {case}", ranks[0])
        return [
            {key: [each for rank in together for each in rank[key]] for key in KEYS}
            for together in zip(*steps, strict=True)
        ]

    def expect(self, what: str, holds: bool) -> None:
        """Prints a line, and keeps it where it does not hold."""
        print(f"  {'ok' if holds else 'FAILED'}  {what}", flush=True)
        if not holds:
            self.failed.append(what)

    def check(
        self, what: str, steps: list[Step], *, rows: int = 5 * PER_CLASS["shards"],
        twice: int = 0, epochs: int = EPOCHS,
    ) -> None:  # fmt: skip
        """Checks rows, views and losses of each epoch, in which some rows may come twice."""
        length = len(steps) // epochs
        parts = [steps[at : at + length] for at in range(0, len(steps), length)]
        seen = [[row for step in part for row in step["rows"]] for part in parts]
        counts = [Counter(Counter(each).values()) for each in seen]
        wanted = Counter({1: rows - twice, 2: twice})
        often = f"{twice} of them twice" if twice else "each once"
        self.expect(
            f"{what}: {epochs} epochs of {rows} rows, {often}",
            len(parts) == epochs
            and all(set(each) == set(range(rows)) for each in seen)
            and all(count == wanted for count in counts),
        )
        views = [[view for step in part for view in step["views"]] for part in parts]
        pairs = [dict(zip(*each, strict=True)) for each in zip(seen, views, strict=True)]
        changed = all(a != b for a, b in pairwise(seen)) and all(a != b for a, b in pairwise(pairs))
        all_views = all(set(each) == set(range(VIEWS)) for each in views)
        self.expect(f"{what}: another order and other views in each epoch", changed and all_views)
        losses = [statistics.fmean(x for step in part for x in step["losses"]) for part in parts]
        if epochs == EPOCHS:
            self.expect(f"{what}: loss {losses[0]:.3f} to {losses[-1]:.3f}", losses[-1] < losses[0])

    def check_validation(self, what: str, lines: list[Step]) -> None:
        """Checks that each validation after a training step takes every row of `val` once."""
        first = next(at for at, line in enumerate(lines) if line["trains"])
        trains = [line["trains"] for line in lines[first:]]
        times = sum(was and not now for was, now in pairwise(trains))
        counts = Counter(
            row for line in lines[first:] if not line["trains"] for row in line["rows"]
        )
        self.expect(
            f"{what}: {times} validations of {VAL_ROWS} rows, each once",
            counts == dict.fromkeys(range(VAL_ROWS), times),
        )


def compare(found: list[Step], wanted: list[Step]) -> None:
    """Prints what a resumed run has in common with the same steps of an uninterrupted one."""
    same = {
        key: "the same" if [s[key] for s in found] == [s[key] for s in wanted] else "others"
        for key in KEYS
    }
    print("      than without the kill:", ", ".join(f"{k} {v}" for k, v in same.items()))


def watch(program: Path, killed: int, start: str) -> int:
    """Runs a program, and writes what its model takes, a line for each step or validation batch."""
    import multiprocessing

    import torch
    from timm.data.mixup import Mixup

    import ci2p_cache as cc

    multiprocessing.set_start_method(start)
    watched = Watch(Path(f"seen-{os.environ.get('RANK', '0')}.jsonl"), killed)
    create_model = cc.create_model

    def watched_model(*given: Any, **more: Any) -> torch.nn.Module:
        model = create_model(*given, **more)
        model.register_forward_pre_hook(watched.forward)
        return model

    cc.create_model = watched_model
    before(cc.SplitDataset, "__getitem__", watched.read_singly)
    before(torch.nn.functional, "cross_entropy", watched.cross_entropy)
    before(Mixup, "__call__", watched.mixup)
    before(torch.Tensor, "backward", watched.backward)
    runpy.run_path(str(program), run_name="__main__")
    return 0


def before(owner: Any, name: str, watcher: Callable[..., None]) -> None:
    """Has a function call `watcher` first, with its own arguments."""
    wrapped = getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        watcher(*given, **more)
        return wrapped(*given, **more)

    setattr(owner, name, call)


class Watch:
    """What passes through a loop, held against the cache.

    Args:
        path: Takes a line for each step and each batch of validation.
        killed: The step that the process does not survive; 0 for none.
    """

    def __init__(self, path: Path, killed: int) -> None:
        import ci2p_cache as cc

        self.known: dict[bytes, tuple[str, int, int]] = {}
        self.labels: dict[tuple[str, int], int] = {}
        for name, split in cc.open_cache("shards").items():
            latents, labels = split[:]
            for row, (views, label) in enumerate(zip(latents, labels.tolist(), strict=True)):
                self.labels[name, row] = label
                for view, latent in enumerate(views):
                    self.known[latent.numpy().tobytes()] = (name, row, view)
        self.batch: list[tuple[str, int, int]] = []
        self.is_mixed = False
        self.left = killed
        self.path = path
        path.unlink(missing_ok=True)

    def look(self, latents: Any) -> None:
        assert str(latents.dtype) == "torch.float32"
        self.batch = [self.known[latent.numpy().tobytes()] for latent in latents]

    def cross_entropy(self, _: Any, labels: Any) -> None:
        assert str(labels.dtype) == "torch.int64"
        assert labels.tolist() == [self.labels[name, row] for name, row, _ in self.batch]

    def mixup(self, _: Any, latents: Any, labels: Any) -> None:
        self.look(latents)
        self.cross_entropy(None, labels)
        self.is_mixed = True

    def forward(self, model: Any, inputs: tuple[Any]) -> None:
        if not self.is_mixed:
            self.look(inputs[0])
        self.is_mixed = False
        if not model.training:
            self.write([])

    def backward(self, loss: Any, *_: Any, **__: Any) -> None:
        self.write([loss.item()])
        self.left -= 1
        if self.left == 0:
            os._exit(9)

    def write(self, losses: list[float]) -> None:
        """Writes which rows and views the model had; losses are empty in validation."""
        (split,) = {name for name, _, _ in self.batch}
        assert split == ("train" if losses else "val")
        rows, views = zip(*((row, view) for _, row, view in self.batch), strict=True)
        line = {"trains": bool(losses), "rows": rows, "views": views, "losses": losses}
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)

    def read_singly(self, *_: Any) -> None:
        raise AssertionError("DataLoader reads item by item")


if __name__ == "__main__":
    sys.exit(main())
