"""Bar R4: two encoders started on one output: the loser exits 4 in 2 s, and no row is lost.

Times are counted from the start of the command in a warm process (`ci2p_cache` imported), where
the promise can be kept; what a cold start adds is measured once and printed.

python tests/long/locks.py [--count STARTS]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.encode_bench import EncodeBench, tree
from tests.support.warm import Ended, WarmParent

MAX_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="number of double starts")
    parser.add_argument("--seed", type=int, default=0, help="of the random delays")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    good = starts = too_late = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        first.mkdir()
        second.mkdir()
        bench = EncodeBench(first, images=40, shard_samples=2)
        with (
            WarmParent(first) as one,
            WarmParent(second) as two,
            ThreadPoolExecutor(2) as pool,
        ):
            bench.undisturbed(one)
            two.run("--version")
            while starts < arguments.count:
                shutil.rmtree(bench.out)
                # From the very same moment up to the middle of the other's work.
                delay = rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, bench.seconds / 2)])
                ours = pool.submit(one.run, *bench.arguments)
                time.sleep(delay)
                theirs = pool.submit(two.run, *bench.arguments)
                ends = [ours.result(), theirs.result()]
                if [ended.code for ended in ends] == [0, 0] and ends[0].seconds < delay:
                    too_late += 1
                    continue
                starts += 1
                problems = list(_problems(ends, bench))
                losers = [ended for ended in ends if ended.code == 4]
                slowest = max([slowest, *(ended.seconds for ended in losers)])
                good += not problems
                for problem in problems:
                    print(f"  start {starts}, {delay:.3f} s apart: {problem}", flush=True)
            cold = _cold_loser(one, pool, bench)
    print(f"cold start: the loser's whole process, imports and all, took {cold:.1f} s")
    print(
        f"{good}/{starts} (the slowest loser ended after {slowest:.2f} s; "
        f"{too_late} came after the other's end and do not count)"
    )
    return int(good < starts)


def _problems(ends: list[Ended], bench: EncodeBench) -> list[str]:
    codes = sorted(ended.code for ended in ends)
    problems = []
    if codes != [0, 4]:
        told = " | ".join(ended.told.strip()[-200:] for ended in ends)
        problems.append(f"exits {codes}, wanted 0 and 4: {told}")
    for ended in ends:
        if ended.code == 4 and ended.seconds > MAX_SECONDS:
            problems.append(f"the loser took {ended.seconds:.2f} s")
        if ended.code == 4 and "process" not in ended.told:
            problems.append(f"the loser does not name the holder: {ended.told}")
    if tree(bench.out) != bench.whole:
        problems.append("the cache is not that of an undisturbed run")
    return problems


def _cold_loser(one: WarmParent, pool: ThreadPoolExecutor, bench: EncodeBench) -> float:
    """Seconds from starting `python -m ci2p_cache encode` to its exit 4."""
    from ci2p_cache.cache.lock import locked

    started = time.monotonic()
    with locked(bench.out / ".lock", what="encode"):
        ended = subprocess.run(
            [sys.executable, "-m", "ci2p_cache", *bench.arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            check=False,
        )
    assert ended.returncode == 4, ended.stderr
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
