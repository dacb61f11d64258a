"""What short commands cost, from their start to their end: time, processor time, memory.

    python -m tests.benchmarks.cold IMAGES --other PYTHON [--count 10] [--size 64] [--repeats 5]

IMAGES is a folder of CLASS/...; `count` files of its first two classes are taken. PYTHON is an
interpreter with another version of ci2p-cache; both run the same words, in turn. Processor time is
that of all processes, memory the most that all of them held at a time: PSS, which counts a page
that two share once. Other programs that use the same libraries make it look smaller, so give each
version an environment of its own. To sample it slows a run down: it is taken in runs of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tests.benchmarks.measure import Rates, Report, Table, machine, take_turns
from tests.support.commands import REPO

__all__ = ["main"]

_PR_SET_CHILD_SUBREAPER = 36
_SAMPLE_SECONDS = 0.03

COMMANDS = {
    "encode": "encode images --out shards --encoder bundled --size {size}",
    "inspect": "inspect shards",
    "status": "status shards",
    "train": "train shards --model vitds_tiny --epochs 1 --batch-size 2",
    "--help": "--help",
}
MADE = {"encode": "shards", "train": "runs"}
"""What a command makes anew each time."""


class _Version:
    """One version of ci2p-cache, in a folder of its own."""

    def __init__(self, python: str, folder: Path, images: Path, path: str | None) -> None:
        self._python, self._folder = python, folder
        shutil.copytree(images, folder / "images")
        self._environment = {**os.environ, "PYTHONPATH": path or ""}

    def started(self, name: str, size: int) -> subprocess.Popen[bytes]:
        if name in MADE:
            shutil.rmtree(self._folder / MADE[name], ignore_errors=True)
        words = COMMANDS[name].format(size=size).split()
        return subprocess.Popen(
            [self._python, "-W", "ignore", "-m", "ci2p_cache", *words],
            cwd=self._folder, env=self._environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Waits for a command and for whatever outlives it, which becomes this process's child."""
    code = process.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    if code:
        raise SystemExit(f"{process.args!r} ended with {code}")


def _times(process: subprocess.Popen[bytes], began: float) -> tuple[float, float]:
    """Returns wall time and processor time of a command, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.wait()
    wall = time.perf_counter() - began
    _ended(process)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _peak(process: subprocess.Popen[bytes]) -> float:
    """Returns the most that all processes of a command held at a time, in MiB."""
    most = 0
    while process.poll() is None:
        held = 0
        for folder in Path("/proc").glob("[0-9]*"):
            # It may end meanwhile.
            with contextlib.suppress(OSError):
                if os.getsid(int(folder.name)) == process.pid:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    held += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        most = max(most, held)
        time.sleep(_SAMPLE_SECONDS)
    _ended(process)
    return most / 1024


def _table(versions: dict[str, _Version], size: int, repeats: int) -> Table:
    table = Table(
        "Whole commands; ratios are taken within a repeat",
        ("command", "of", "other", "this", "other / this", "smallest", "largest"),
    )
    for name in COMMANDS:
        walls, processors, peaks = _measured(versions, name, size, repeats)
        for what, form, values in (
            ("wall, s", "{:.2f}", walls),
            ("processor, s", "{:.2f}", processors),
            ("peak PSS, MiB", "{:,.0f}", peaks),
        ):
            medians = [form.format(values[key].median) for key in ("other", "this")]
            ratios = values["other"].over(values["this"]).cells("{:.2f}")
            table.rows.append([name, what, *medians, *ratios])
    return table


def _measured(
    versions: dict[str, _Version], name: str, size: int, repeats: int
) -> tuple[dict[str, Rates], dict[str, Rates], dict[str, Rates]]:
    """Returns wall times, processor times and peaks of a command, by version."""
    spent: dict[str, list[float]] = {key: [] for key in versions}

    def timed(key: str) -> float:
        began = time.perf_counter()
        wall, processor = _times(versions[key].started(name, size), began)
        spent[key].append(processor)
        return wall

    walls = take_turns(list(versions), timed, repeats)
    peaks = take_turns(
        list(versions), lambda key: _peak(versions[key].started(name, size)), repeats
    )
    return walls, {key: Rates(tuple(values)) for key, values in spent.items()}, peaks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.cold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--other", required=True, help="interpreter with the other version")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)
    # Decoders that outlive their command by a moment come to this process, and count.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in islice(sorted(p for p in asked.images.iterdir() if p.is_dir()), 2):
            (folder / "few" / each.name).mkdir(parents=True)
            for path in islice(sorted(each.iterdir()), asked.count // 2):
                shutil.copy(path, folder / "few" / each.name)
        versions = {
            "other": _Version(asked.other, folder / "other", folder / "few", None),
            "this": _Version(sys.executable, folder / "this", folder / "few", str(REPO)),
        }
        for key in versions:
            # The page cache is warm from the first repeat on, and modules are compiled.
            for command in COMMANDS:
                _ended(versions[key].started(command, asked.size))
        table = _table(versions, asked.size, asked.repeats)
    text = f"{asked.count} pictures at {asked.size} px, {asked.repeats} repeats"
    described = machine(("ci2p-cache", "torch", "torchvision", "numpy", "zarr"))
    Report(described, text, [table]).publish(markdown=asked.markdown, path=asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
