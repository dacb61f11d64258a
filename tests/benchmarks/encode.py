"""Views per second of stage one: the whole of it, g_a alone, and how one would do it naively.

    python -m tests.benchmarks.encode IMAGES [--count 400] [--repeats 3] [--other FOLDER]

IMAGES is a folder of pictures, with or without classes; `count` files spread evenly over it are
copied first, so that they are in the page cache. Every contestant is a process of its own, because
allocator and threads belong to a process: it loads its encoder, warms up, and waits while the
others have their turn. Turns rotate, one contestant at a time, on all cores this process may use.
FOLDER is another clone of this project with an environment of its own in `.venv`: what it has in
`whole` takes its turns too.

Shapes: B views of a batch, H and W pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.encode_work import (
    CONTESTANTS,
    Job,
    pixel_difference,
    serve,
    symbol_difference,
)
from tests.benchmarks.measure import Rates, Report, Table, machine, num_cores, take_turns
from tests.benchmarks.pictures import SUFFIXES

__all__ = ["Settings", "main", "measure_encode"]

BARS = (
    ("whole", "g_a", 0.8, 0.9),
    ("whole bf16", "g_a bf16 compiled", 0.88, 0.95),
    ("whole float32", "naive", 2.0, 2.5),
    ("whole bf16", "naive", 4.0, 5.0),
    ("whole float32", "other", 1.0, 1.1),
    ("whole bf16", "other", 1.3, 1.4),
)
"""Contestant, against which other, at least, aimed at: the project's own bars."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    images: Path
    count: int = 400
    """Views of one turn: the images of a turn are half as many where each has two views."""
    size: int = 256
    """Side of a view in pixels."""
    repeats: int = 3
    profile: bool = False
    symbols: bool = False
    only: tuple[str, ...] = tuple(CONTESTANTS)
    other: Path | None = None
    """Another clone, with its `.venv`, whose whole stage is measured too."""

    @property
    def contestants(self) -> tuple[str, ...]:
        others = [f"other {key}" for key in self.only if key.startswith("whole")]
        return (*self.only, *(others if self.other else ()))


class Contestant:
    """A process that waits for its turns."""

    def __init__(self, job: Job, clone: Path | None = None) -> None:
        environment = dict(os.environ)
        # Each has the threads that its name says; this variable would set them for all.
        environment.pop("OMP_NUM_THREADS", None)
        # As the command has it: where others use the cores too, threads that spin while they wait
        # for each other would make those that use several look ten times as slow.
        environment["GOMP_SPINCOUNT"] = "1000"
        python = sys.executable
        if clone is not None:
            python, environment["PYTHONPATH"] = str(clone / ".venv/bin/python"), str(clone)
        command = [python, "-W", "ignore", "-m", __spec__.name, "--worker"]
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=clone,
        )  # fmt: skip

    def hear(self) -> dict[str, float]:
        """Waits for the next message: that it is warm, or what its turn gave."""
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant ended by itself; what it said is above")
        found: dict[str, float] = json.loads(line)
        return found

    def turn(self) -> dict[str, float]:
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdout.close()


def measure_encode(settings: Settings, folder: Path) -> Report:
    """Lets all contestants have their turns; `folder` is for copies and caches."""
    images = _copied(settings, folder / "images")
    found: dict[str, Contestant] = {}
    turns: dict[str, list[dict[str, float]]] = {key: [] for key in settings.contestants}
    try:
        # One after another, so that none is warm only because the others were loading.
        for key in settings.contestants:
            job = Job(
                key=key.removeprefix("other "), images=str(images),
                out=str(folder / key.replace(" ", "_")), count=settings.count, size=settings.size,
            )  # fmt: skip
            found[key] = Contestant(job, settings.other if key.startswith("other") else None)
            found[key].hear()

        def timed(key: str) -> float:
            turn = found[key].turn()
            turns[key].append(turn)
            return turn["views"] / turn["seconds"]

        rates = take_turns(settings.contestants, timed, settings.repeats)
    finally:
        for contestant in found.values():
            contestant.close()
    tables = [_rate_table(rates, turns), _ratio_table(rates)]
    if settings.profile:
        tables.append(_profile_table(turns))
    tables.append(_pixel_table(images, settings))
    if settings.symbols:
        head = ("of", "against", "symbols that differ", "by at most")
        rows = symbol_difference(images, settings.size)
        tables.append(Table("Symbols at step 1 by how g_a computes", head, rows))
    text = (
        f"{len(list(images.rglob('*.*'))):,} pictures, {settings.count} views of "
        f"{settings.size} px per turn, bundled encoder (bmshj2018-factorized, quality 5), "
        f"{num_cores()} cores"
    )
    described = machine(("ci2p-cache", "torch", "torchvision", "pillow", "compressai", "numpy"))
    values = {key: rate.values for key, rate in rates.items()}
    return Report(described, text, tables, values)


def _copied(settings: Settings, folder: Path) -> Path:
    """Copies files spread evenly over the source into a folder of one class."""
    paths = sorted(p for p in settings.images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit("the folder holds no image")
    own = folder / "pictures"
    own.mkdir(parents=True)
    # Fewer files than views: each is copied as often as it takes.
    for number in range(settings.count):
        path = paths[number * len(paths) // settings.count]
        shutil.copyfile(path, own / f"{number:06d}{path.suffix.lower()}")
    return folder


def _rate_table(rates: dict[str, Rates], turns: dict[str, list[dict[str, float]]]) -> Table:
    head = ("contestant", "views/s", "smallest", "largest", "core ms per view", "what it is")
    table = Table(
        "Views per second",
        head,
        notes=["core ms per view: processor time of all threads and processes of the contestant, "
               "median; where other jobs share the cores it says more than the clock."],
    )  # fmt: skip
    for key, rate in rates.items():
        spent = statistics.median(1000 * turn["processor"] / turn["views"] for turn in turns[key])
        text = CONTESTANTS.get(key, "the same, in the other clone")
        table.rows.append([key, *rate.cells("{:,.1f}"), f"{spent:.1f}", text])
    return table


def _ratio_table(rates: dict[str, Rates]) -> Table:
    table = Table("Ratios, taken within a repeat", ("of", "to", "median", "smallest", "largest",
                                                    "bar", "aim", "held"))  # fmt: skip
    for key, rate in rates.items():
        for start, other, bar, aim in BARS:
            if not key.startswith(start):
                continue
            if other == "g_a":
                # The same arithmetic: whole float32 none -> g_a float32.
                other = f"g_a {key.split()[1]}"
            elif other == "other":
                other = f"other {key}"
            if other not in rates:
                continue
            ratio = rate.over(rates[other])
            held = "yes" if ratio.median >= bar else "NO"
            row = [key, other, *ratio.cells("{:.2f}"), f">= {bar:g}", f"{aim:g}", held]
            table.rows.append(row)
    return table


def _profile_table(turns: dict[str, list[dict[str, float]]]) -> Table:
    parts = ("g_a", "decoding", "reading", "packing", "committing", "other")
    table = Table(
        "Where processor time goes: core ms per view (share of all of it), medians",
        ("contestant", *parts, "g_a waiting"),
        notes=["g_a: with stacking, /255 and rounding. decoding: decode, resize and views, in "
               "processes of their own. reading: files, sha256 and hand-over. packing: zstd, "
               "crc32c, channel sums. other: the main thread and whatever else Python does.",
               "g_a waiting: share of the wall time in which a replica had no batch."],
    )  # fmt: skip
    for key, own in turns.items():
        if "whole" not in key:
            continue
        cells = []
        for part in parts:
            spent = statistics.median(1000 * turn[part] / turn["views"] for turn in own)
            share = statistics.median(turn[part] / turn["processor"] for turn in own)
            cells.append(f"{spent:.2f} ({share:.1%})")
        waiting = statistics.median(turn["waiting"] for turn in own)
        table.rows.append([key, *cells, f"{waiting:.1%}"])
    return table


def _pixel_table(images: Path, settings: Settings) -> Table:
    found = pixel_difference(images, settings.size)
    return Table(
        "Decode and resize: torchvision (ours) against Pillow, in levels of 0-255",
        ("pictures", "largest difference", "mean difference", "values that differ"),
        [[f"{found['images']:.0f}", f"{found['largest']:.0f}", f"{found['mean']:.4f}",
          f"{found['share']:.2%}"]],
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=Settings.count, help="views per turn")
    parser.add_argument("--size", type=int, default=Settings.size)
    parser.add_argument("--repeats", type=int, default=Settings.repeats)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="some contestants, by name")
    parser.add_argument("--profile", action="store_true", help="where stage one's time goes")
    parser.add_argument("--symbols", action="store_true", help="what bf16 and compiling change")
    parser.add_argument("--other", type=Path, help="another clone, with its `.venv`")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.worker is not None:
        serve(Job(**json.loads(asked.worker)))
        return 0
    if asked.images is None:
        parser.error("IMAGES is missing")
    only = tuple(key.strip() for key in asked.only.split(","))
    unknown = set(only) - set(CONTESTANTS)
    if unknown:
        parser.error(f"unknown contestants {sorted(unknown)}; there are {list(CONTESTANTS)}")
    settings = Settings(
        images=asked.images, count=asked.count, size=asked.size, repeats=asked.repeats,
        profile=asked.profile, symbols=asked.symbols, only=only,
        other=asked.other and asked.other.absolute(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = measure_encode(settings, Path(folder))
    report.publish(markdown=asked.markdown, path=asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
