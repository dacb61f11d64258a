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
        found = re.findall(r"^## .*?(\w+)\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        self.programs = dict(found)
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
        whole = self.run(name)
        self.check(name, whole)
        if name == "DataLoader":
            for start in ("spawn", "forkserver"):
                found = self.run(name, start=start)
                self.expect(f"{name}, {start}: {len(found)} steps as with fork", found == whole)
            return
        before = self.run(name, killed=KILLED)
        self.expect(f"{name}: the same {KILLED} steps until killed", before == whole[:KILLED])
        done = KILLED // (len(whole) // EPOCHS)
        rest = self.run(name, again=True)
        self.check(f"{name}, run again", rest, epochs=EPOCHS - done)
        compare(rest, whole[-len(rest) :])
        if name == "Accelerate":
            self.check(f"{name}, two processes", self.run(name, processes=2))
            steps = self.run(name, processes=2, cache="uneven")
            self.check(f"{name}, two processes, uneven", steps, rows=5 * PER_CLASS["uneven"])

    def run(
        self, name: str, *, cache: str = "shards", killed: int = 0, again: bool = False,
        start: str = "fork", processes: int = 1,
    ) -> list[Step]:  # fmt: skip
        """Runs a program under watch; returns its training steps, over all processes."""
        is_killed = again or killed > 0
        folder = self.folder / f"{name}-{cache}-{start}-{processes}-{is_killed}"
        if not again:
            folder.mkdir()
            (folder / "shards").symlink_to(self.folder / cache)
            (folder / "program.py").write_text(self.programs[name], "utf-8")
        command = ["python"]
        if processes > 1:
            command = ["accelerate", "launch", "--cpu", "--num_processes", str(processes)]
        watched = (str(Path(__file__)), "--watch", "program.py", str(killed), start)
        self.call(*command, *watched, folder=folder, wanted=9 if killed else 0)
        ranks = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted(folder.glob("seen-*.jsonl"))
        ]
        assert len(ranks) == processes
        if name != "DataLoader" and name != "Accelerate" and not killed:
            self.check_validation(name, ranks[0])
        steps = [[line for line in lines if line["trains"]] for lines in ranks]
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
        epochs: int = EPOCHS,
    ) -> None:  # fmt: skip
        """Checks rows, views and losses of each epoch."""
        length = len(steps) // epochs
        parts = [steps[at : at + length] for at in range(0, len(steps), length)]
        seen = [[row for step in part for row in step["rows"]] for part in parts]
        counts = [Counter(each) for each in seen]
        surplus = length * len(steps[0]["rows"]) - rows
        often = f", {surplus} rows twice" if surplus else ""
        self.expect(
            f"{what}: {epochs} epochs of {rows} rows, each row in each epoch{often}",
            len(parts) == epochs
            and all(count.keys() == set(range(rows)) for count in counts)
            and all(len(each) == rows + surplus and max(count.values()) <= 2 - (not surplus)
                    for each, count in zip(seen, counts, strict=True)),
        )  # fmt: skip
        views = [[view for step in part for view in step["views"]] for part in parts]
        pairs = [dict(zip(*each, strict=True)) for each in zip(seen, views, strict=True)]
        changed = all(a != b for a, b in pairwise(seen)) and all(a != b for a, b in pairwise(pairs))
        all_views = all(set(each) == set(range(VIEWS)) for each in views)
        self.expect(f"{what}: another order and other views in each epoch", changed and all_views)
        losses = [sum(sum(s["losses"]) for s in p) / sum(len(s["losses"]) for s in p) for p in parts]
        self.expect(f"{what}: loss {losses[0]:.3f} to {losses[-1]:.3f}", losses[0] > losses[-1])

    def check_validation(self, name: str, lines: list[Step]) -> None:
        """Checks that each validation after a training step takes every row of `val` once."""
        first = next(at for at, line in enumerate(lines) if line["trains"])
        counts = Counter(row for line in lines[first:] if not line["trains"] for row in line["rows"])
        times = set(counts.values())
        self.expect(
            f"{name}: {counts[0]} validations of {VAL_ROWS} rows, each row once",
            counts.keys() == set(range(VAL_ROWS)) and len(times) == 1,
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
    from timm.data import Mixup
    from torch import Tensor

    import ci2p_cache as cc

    multiprocessing.set_start_method(start)
    known, labels_of = {}, {}
    for name, split in cc.open_cache("shards").items():
        latents, labels = split[split.valid_rows]
        for row, (views, label) in enumerate(zip(latents, labels.tolist(), strict=True)):
            labels_of[name, row] = label
            for view, latent in enumerate(views):
                known[latent.numpy().tobytes()] = (name, row, view)
    seen: list[tuple[str, int, int]] = []
    steps = 0
    file = Path(f"seen-{os.environ.get('RANK', '0')}.jsonl").open("w")

    def write(trains: bool, losses: list[float]) -> None:
        assert {name for name, _, _ in seen} == {"train" if trains else "val"}
        rows, views = [row for _, row, _ in seen], [view for _, _, view in seen]
        line = {"trains": trains, "rows": rows, "views": views, "losses": losses}
        print(json.dumps(line), file=file, flush=True)

    def look(latents: Tensor) -> None:
        assert latents.dtype == torch.float32
        seen[:] = [known[latent.numpy().tobytes()] for latent in latents]

    def check(labels: Tensor) -> None:
        assert labels.dtype == torch.int64
        assert labels.tolist() == [labels_of[name, row] for name, row, _ in seen]

    def around(owner: Any, name: str, before: Callable[..., None]) -> None:
        wrapped = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            before(*given, **more)
            return wrapped(*given, **more)

        setattr(owner, name, call)

    mixed = False

    def before_mixup(_: Mixup, latents: Tensor, labels: Tensor) -> None:
        nonlocal mixed
        mixed = True
        look(latents)
        check(labels)

    def before_forward(model: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal mixed
        if not mixed:
            look(inputs[0])
        mixed = False
        if not model.training:
            write(False, [])

    def before_backward(loss: Tensor, *_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        write(True, [loss.item()])
        if steps == killed:
            os._exit(9)

    def read_singly(*_: Any) -> None:
        raise AssertionError("DataLoader reads items one by one")

    create_model = cc.create_model

    def watched_model(*given: Any, **more: Any) -> torch.nn.Module:
        model = create_model(*given, **more)
        model.register_forward_pre_hook(before_forward)
        return model

    cc.create_model = watched_model
    around(cc.SplitDataset, "__getitem__", read_singly)
    around(torch.nn.functional, "cross_entropy", lambda _, labels: check(labels))
    around(Mixup, "__call__", before_mixup)
    around(Tensor, "backward", before_backward)
    runpy.run_path(str(program), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
