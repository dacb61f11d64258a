"""One folder behind mounts that carry no flock to each other: two encoders, two trainers.

The nearest to machines on an NFS without locks that one machine has: FUSE's bindfs mounts a folder
three times, and the kernel keeps the locks of each mount apart, which is measured first. Then:

- two encoders started on the same folder or range, at random distances: one ends with 0, the other
  with 4, and names host and process of the first;
- an encoder killed: behind the same mount the next one follows at once, behind another it is
  refused until the lock was silent for a minute;
- a lock left by a dead encoder, and two encoders that want it at the same moment;
- an encoder suspended for longer than a minute, whose lock another took over: when it wakes it
  ends with 4 and writes nothing;
- a trainer that works for longer than a minute keeps its lock.

In the end the bytes are those of an undisturbed run. Needs root, bindfs and iproute2.

python tests/long/shared_fs.py [--count STARTS]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.encode_bench import EncodeBench, tree
from tests.support.machines import run_apart
from tests.support.warm import Child, WarmParent

SILENT_SECONDS = 60
MOUNTS = ("a", "b", "c")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="double starts, and races")
    parser.add_argument("--seed", type=int, default=0, help="of the random delays")
    arguments = parser.parse_args()
    # The mounts end with this script.
    run_apart(["bindfs"])
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared = root / "shared"
        shared.mkdir()
        mounts = [stack.enter_context(_mounted(shared, root / name)) for name in MOUNTS]
        _measure(mounts)
        trials = _Trials(stack, root, shared, mounts, random.Random(arguments.seed))
        good = [
            _report(f"{arguments.count} double starts", trials.double_start, arguments.count),
            _report("kills, followed behind the same mount", trials.same_mount, 5),
            _report("races for a dead encoder's lock", trials.race, arguments.count),
            _report("a kill, followed behind another mount", trials.other_mount, 1),
            _report("an encoder suspended for more than a minute", trials.suspended, 1),
            _report("a trainer of more than a minute", trials.trainer, 1),
        ]
    print(f"the slowest loser of a double start ended after {trials.slowest:.2f} s")
    return int(not all(good))


@contextmanager
def _mounted(shared: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["bindfs", shared, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


def _measure(mounts: list[Path]) -> None:
    """Shows that a lock is seen behind its own mount and behind no other."""
    files = [(mount / "probe").open("w") for mount in (*mounts, mounts[0])]
    got = []
    for file in files:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            got.append(True)
        except BlockingIOError:
            got.append(False)
        # All stay open, and so locked.
    assert got == [True, True, True, False], got
    for file in files:
        file.close()
    (mounts[0] / "probe").unlink()
    print("flock: held behind all three mounts at once, and refused twice behind the same one")


def _report(what: str, trial: Callable[[], list[str]], count: int) -> bool:
    good, started = 0, time.monotonic()
    for number in range(count):
        problems = trial()
        good += not problems
        for problem in problems:
            print(f"  {what}, {number + 1}: {problem}", flush=True)
    print(f"{what}: {good}/{count} ({time.monotonic() - started:.0f} s)", flush=True)
    return good == count


class _Trials:
    """Each trial returns what was wrong."""

    def __init__(
        self, stack: ExitStack, root: Path, shared: Path, mounts: list[Path], rng: random.Random
    ) -> None:
        self._bench = EncodeBench(shared, images=40, shard_samples=2)
        self._mounts, self._rng = mounts, rng
        self._warm = [
            stack.enter_context(WarmParent(_made(root / f"warm-{m.name}"))) for m in mounts
        ]
        self._bench.undisturbed(self._warm[0])
        for warm in self._warm[1:]:
            warm.run("--version")
        self.slowest = 0.0

    def _encode(self, at: int, *options: str) -> Child:
        """Starts the encoder behind a mount."""
        out = self._mounts[at] / self._bench.out.name
        arguments = self._bench.arguments
        arguments[arguments.index("--out") + 1] = str(out)
        return self._warm[at].start(*arguments, *options)

    def _fresh(self) -> None:
        self._bench.fresh()
        # What a mount knows of names and ages it keeps for a second.
        time.sleep(1.2)

    def _begun(self, at: int, *options: str) -> Child:
        """Starts an encoder on a fresh folder; it has committed a shard, and not its last."""
        self._fresh()
        child = self._encode(at, *options)
        while not self._bench.commits():
            assert child.poll() is None, child.told()
            time.sleep(0.002)
        return child

    def _whole(self) -> list[str]:
        return [] if tree(self._bench.out) == self._bench.whole else ["it has other bytes"]

    def double_start(self) -> list[str]:
        self._fresh()
        delay = self._rng.choice([0.0, self._rng.uniform(0, self._bench.seconds / 2)])
        options = self._rng.choice([(), ("--shard-range", "1/2")])
        first = self._encode(0, *options)
        time.sleep(delay)
        second = self._encode(1, *options)
        ends = [first.ended(), second.ended()]
        codes = sorted(ended.code for ended in ends)
        if codes != [0, 4]:
            return [
                f"exits {codes}, {delay:.3f} s apart: {ends[0].err[-300:]} {ends[1].err[-300:]}"
            ]
        loser = ends.index(next(ended for ended in ends if ended.code == 4))
        winner = (first, second)[1 - loser]
        problems = []
        self.slowest = max(self.slowest, ends[loser].seconds)
        if f"on host {os.uname().nodename}, process {winner.pid}" not in ends[loser].err:
            problems.append(f"it does not name process {winner.pid}: {ends[loser].err}")
        if options:
            assert self._encode(1).ended().code == 0
        return problems + self._whole()

    def same_mount(self) -> list[str]:
        child = self._begun(0)
        child.send_signal(signal.SIGKILL)
        child.ended()
        ended = self._encode(0).ended()
        return [f"exit {ended.code}: {ended.err}"] if ended.code else self._whole()

    def race(self) -> list[str]:
        child = self._begun(0)
        child.send_signal(signal.SIGKILL)
        child.ended()
        lock = self._bench.out / ".lock"
        os.utime(lock, (time.time() - 2 * SILENT_SECONDS,) * 2)
        time.sleep(1.2)
        both = [self._encode(1)]
        time.sleep(self._rng.choice([0.0, self._rng.uniform(0, 0.1)]))
        both.append(self._encode(2))
        ends = [each.ended() for each in both]
        codes = sorted(ended.code for ended in ends)
        if codes != [0, 4]:
            return [f"exits {codes}: {ends[0].err[-300:]} {ends[1].err[-300:]}"]
        return self._whole()

    def other_mount(self) -> list[str]:
        child = self._begun(0)
        child.send_signal(signal.SIGKILL)
        child.ended()
        killed, refused = time.monotonic(), 0
        while (ended := self._encode(1).ended()).code == 4:
            refused += 1
            if f"process {child.pid}" not in ended.err:
                return [f"it does not name process {child.pid}: {ended.err}"]
            if time.monotonic() > killed + 2 * SILENT_SECONDS:
                return ["it was refused for two minutes"]
            time.sleep(1)
        seconds = time.monotonic() - killed
        print(f"  refused {refused} times, taken over {seconds:.0f} s after the kill")
        early = [] if seconds > SILENT_SECONDS - 1 else [f"taken over after {seconds:.0f} s"]
        return early + ([f"exit {ended.code}: {ended.err}"] if ended.code else self._whole())

    def suspended(self) -> list[str]:
        child = self._begun(0)
        child.send_signal(signal.SIGSTOP)
        time.sleep(SILENT_SECONDS + 2)
        other = self._encode(1).ended()
        whole = self._whole()
        child.send_signal(signal.SIGCONT)
        ended = child.ended()
        if (other.code, ended.code) != (0, 4):
            return [f"exits {other.code} and {ended.code}: {other.err} {ended.err}"]
        if "another process took over" not in ended.err:
            return [f"it says: {ended.err}"]
        return whole + self._whole()

    def trainer(self) -> list[str]:
        def start(at: int) -> Child:
            mount = self._mounts[at]
            return self._warm[at].start(
                *("train", mount / "out", "--model", "vitds_tiny", "--epochs", 100_000),
                *("--batch-size", 16, "--save-every", 1, "--out", mount / "runs"),
                *("--name", "run", "--device", "cpu", "--workers", 1),
            )

        if not (self._bench.out / "cache.json").exists() or self._whole():
            self._fresh()
            assert self._encode(0).ended().code == 0
        run = self._bench.folder / "runs" / "run"
        child, refused = start(0), 0
        while not list(run.glob("checkpoints/epoch*")):
            assert child.poll() is None, child.told()
            time.sleep(0.1)
        end = time.monotonic() + SILENT_SECONDS + 15
        while time.monotonic() < end:
            ended = start(1).ended()
            refused += 1
            if ended.code != 4 or f"process {child.pid}" not in ended.err:
                return [f"the second: exit {ended.code}: {ended.err}"]
            time.sleep(5)
        print(f"  refused {refused} times")
        child.send_signal(signal.SIGSTOP)
        time.sleep(SILENT_SECONDS + 2)
        other = start(1)
        while not re.search(r"continuing after", other.told()):
            if other.poll() is not None:
                return [f"the second: exit {other.returncode}: {other.told()}"]
            time.sleep(0.1)
        time.sleep(2)
        child.send_signal(signal.SIGCONT)
        woken = child.ended()
        other.send_signal(signal.SIGTERM)
        ended = other.ended()
        if (woken.code, ended.code) != (4, 143):
            return [f"exits {woken.code} and {ended.code}: {woken.err[-500:]} {ended.err[-500:]}"]
        return [f"left {path}" for path in run.glob(".*")]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
