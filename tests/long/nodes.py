"""torchrun over two machines made of namespaces: the numbers of one; one lost, a cable pulled.

Two machines on a bridge (tests/support/machines.py), one rank on each, on one folder. Undisturbed
they must give the numbers of two ranks on one machine, to the last bit. Then, at a random time of a
run, one machine is lost, or its cable is pulled: all ranks must end with a message, and the same
command, once the network is mended, must end with the same numbers.

A lost machine is noticed at once. A pulled cable is noticed within a minute by a rank that waits
for data, and by one that has sent some when TCP gives up: after `net.ipv4.tcp_retries2`
repetitions, 15 by default, which take a quarter of an hour. `--retries` sets it in the machines.

python tests/long/nodes.py [--count LOSSES] [--retries REPETITIONS]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ci2p_cache as cc
from tests.support.commands import REPO
from tests.support.machines import Machine, machines, run_apart
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import launch, numbers

LIMIT_SECONDS = 1900
_REASONS = ("cannot be reached", "connection to the C10d store has failed")
"""What a rank says, and what its torchrun says where it is the first to notice."""
_ports = itertools.count(29500)
"""A run that has just been lost may still keep its own."""


def main() -> int:
    run_apart(["sysctl"])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4, help="losses, every other one a cable")
    parser.add_argument("--retries", type=int, default=5, help="net.ipv4.tcp_retries2")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = _prepare(folder)
        nodes = machines(folder, 2)
        alone = launch(2, *command, "--out", folder / "alone")
        printed, _ = alone.communicate(timeout=LIMIT_SECONDS)
        assert alone.returncode == 0, printed
        wanted = numbers(folder / "alone" / "run")
        for node in nodes:
            _set_retries(node, arguments.retries)
        command += ["--out", str(folder / "runs")]
        codes, texts = _end(_start(nodes, command))
        whole = codes == [0, 0] and numbers(folder / "runs" / "run") == wanted
        print(f"undisturbed on two machines: {'same' if whole else f'other: {texts}'} numbers")
        good = 0
        for number in range(arguments.count):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            at = rng.uniform(0, 2)
            problems = list(_trial(folder, nodes, command, at, is_cut=number % 2 == 0))
            _set_retries(nodes[1], arguments.retries)
            if not problems and numbers(folder / "runs" / "run") != wanted:
                problems = ["the resumed run has other numbers"]
            good += not problems
            for problem in problems:
                print(f"  {number + 1}: {problem}", flush=True)
    print(f"{good}/{arguments.count} losses")
    return int(good < arguments.count or not whole)


def _prepare(folder: Path) -> list[str]:
    """Encodes a small cache; returns the training command."""
    write_image_folder(folder / "src", {"ant": 12, "bee": 12, "cat": 12})
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=8, devices="cpu:1")
    cc.encode(folder / "src", folder / "cache", options)
    words = ("ci2p_cache", "train", folder / "cache", "--model", "vitds_tiny", "--epochs", 8)
    more = ("--batch-size", 8, "--save-every", 1, "--device", "cpu", "--workers", 1)
    return [*map(str, (*words, *more, "--name", "run"))]


def _set_retries(node: Machine, retries: int) -> None:
    node.run("sysctl", "-qw", f"net.ipv4.tcp_retries2={retries}")


def _start(nodes: list[Machine], command: list[str]) -> list[subprocess.Popen[str]]:
    """Starts torchrun on each machine, one rank each."""
    words = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-id=run", "--rdzv-backend=c10d", f"--rdzv-endpoint=node1:{next(_ports)}", "-m"),
    )
    os.chdir(REPO)
    return [
        subprocess.Popen(
            node.command(*words, *command), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        for node in nodes
    ]  # fmt: skip


def _end(runs: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    texts = [run.communicate(timeout=LIMIT_SECONDS)[0] for run in runs]
    return [run.returncode for run in runs], texts


def _trial(
    folder: Path, nodes: list[Machine], command: list[str], at: float, *, is_cut: bool
) -> Iterator[str]:
    """Loses a machine or its network, `at` seconds after the first checkpoint; then resumes."""
    runs = _start(nodes, command)
    while not list((folder / "runs" / "run" / "checkpoints").glob("epoch*")):
        if any(run.poll() is not None for run in runs):
            yield f"it ended before it was disturbed: {_end(runs)[1]}"
            return
        time.sleep(0.05)
    time.sleep(at)
    if is_cut:
        nodes[1].cut()
    else:
        nodes[1].lose()
    lost = time.monotonic()
    ended: dict[str, float] = {}
    while len(ended) < 2 and time.monotonic() < lost + LIMIT_SECONDS:
        for node, run in zip(nodes, runs, strict=True):
            if run.poll() is not None:
                ended.setdefault(node.name, time.monotonic() - lost)
        time.sleep(0.1)
    if is_cut:
        nodes[1].mend()
    if len(ended) < 2:
        for run in runs:
            run.kill()
        yield f"after {LIMIT_SECONDS} s only {ended} had ended"
        return
    what = "cable pulled" if is_cut else "machine lost"
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(ended.items()))
    print(f"  {what} {at:.1f} s after the first checkpoint; ended after: {times}", flush=True)
    codes, texts = _end(runs)
    if 0 in codes:
        yield f"exits {codes}, so it had ended before: {texts}"
    for node, text in zip(nodes if is_cut else nodes[:1], texts, strict=False):
        if not any(why in text for why in _REASONS):
            yield f"{node.name} does not say why it ended: {text[-2000:]}"
    if not is_cut:
        # It comes back.
        nodes[1] = Machine(nodes[1].name, nodes[1].address)
    codes, texts = _end(_start(nodes, command))
    if codes != [0, 0]:
        yield f"the resumed run ended with {codes}: {texts[0][-2000:]}"
    if texts[0].count("continuing after") != 1:
        yield f"it did not continue: {texts[0][-2000:]}"


if __name__ == "__main__":
    sys.exit(main())
