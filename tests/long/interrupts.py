"""Bar R11: Ctrl-C at random times in the real command; the command it prints continues.

Each run is a new `python -m ci2p_cache encode`, interrupted anywhere between its start and its
end, its imports included. It must end within 5 s with exit 130 and print the command that goes
on; that command, pasted, must end with the bytes of an undisturbed run.

python tests/long/interrupts.py [--count INTERRUPTS]
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.encode_bench import EncodeBench, tree

REPO = Path(__file__).resolve().parents[2]
MAX_SECONDS = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="number of interrupts")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    good = done = too_late = outside = 0
    slowest = 0.0
    stages: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = EncodeBench(Path(folder), images=100, shard_samples=4)
        command = ["ci2p-cache", *bench.arguments]
        started = time.monotonic()
        code, told = _finish(_start(command))
        seconds = time.monotonic() - started
        assert code == 0, told
        bench.whole = tree(bench.out)
        while done < arguments.count:
            shutil.rmtree(bench.out, ignore_errors=True)
            process = _start(command)
            after = rng.uniform(0, seconds)
            time.sleep(after)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            code, told = _finish(process)
            lived = time.monotonic() - sent
            if code == 0:
                too_late += 1
                continue
            done += 1
            slowest = max(slowest, lived)
            committed = len(bench.commits())
            stage = f"{committed} shards" if committed else "start"
            stages[stage] = stages.get(stage, 0) + 1
            problems = []
            # Python itself starting or ending: no code of ours runs, a shell reports 130 as well.
            ours = code != -signal.SIGINT
            outside += not ours
            if not ours and bench.out.exists() and tree(bench.out) != bench.whole:
                problems.append("died by the signal with the work half done")
            if ours and code != 130:
                problems.append(f"exit {code}, wanted 130: {told[-300:]}")
            if lived > MAX_SECONDS:
                problems.append(f"ended after {lived:.1f} s")
            pasted = _printed_command(told)
            if ours and pasted is None:
                problems.append(f"no command printed: {told[-300:]!r}")
            left = [name for name in (".staging", ".lock") if (bench.out / name).exists()]
            if left:
                problems.append(f"left {left}")
            again, text = _finish(_start(pasted or command))
            if again != 0 or tree(bench.out) != bench.whole:
                problems.append(f"the pasted command ended with {again}: {text[-300:]}")
            good += not problems
            for problem in problems:
                print(f"  interrupt {done} after {after:.2f} s ({stage}): {problem}", flush=True)
    print("interrupted after: " + ", ".join(f"{name} {n}" for name, n in sorted(stages.items())))
    print(
        f"{good}/{done} (the slowest ended {slowest:.2f} s after Ctrl-C; {outside} met Python "
        f"starting or ending; {too_late} came after the end and do not count)"
    )
    return int(good < done)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ci2p_cache", *command[1:]],
        cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=300)
    return process.returncode, told


def _printed_command(told: str) -> list[str] | None:
    """Returns the command that an interrupted run printed, as a shell would read it."""
    for line in reversed(told.splitlines()):
        at = line.find("ci2p-cache encode ")
        if at >= 0:
            return shlex.split(line[at:])
    return None


if __name__ == "__main__":
    sys.exit(main())
