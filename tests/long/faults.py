"""Bar R2: every call of a small encode that changes the disk fails in turn; all must recover.

python tests/long/faults.py [--count POINTS] [--growth | --add-views]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.encode_bench import KINDS, EncodeBench, GrowthBench, MoreViewsBench, spread
from tests.support.warm import WarmParent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="only that many points, evenly spread")
    grows = parser.add_mutually_exclusive_group()
    grows.add_argument("--growth", action="store_true", help="of a cache that takes in images")
    grows.add_argument("--add-views", action="store_true", help="of a cache that gets more views")
    arguments = parser.parse_args()
    started = time.monotonic()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        with WarmParent(Path(folder)) as warm:
            if not warm.has_shim:
                print("no C compiler `cc` here, so no shim")
                return 1
            bench = EncodeBench(Path(folder) / "plain")
            if arguments.growth or arguments.add_views:
                grown = GrowthBench if arguments.growth else MoreViewsBench
                bench = grown(Path(folder) / "grown", warm)
            bench.undisturbed(warm)
            points = spread(bench.calls, arguments.count)
            for kind in KINDS:
                recovered = 0
                bench.tidied_later = 0
                for at in points:
                    problems = list(bench.fault(warm, at, kind))
                    recovered += not problems
                    for problem in problems[:3]:
                        print(f"  {kind} at call {at}: {problem}", flush=True)
                failures += len(points) - recovered
                print(
                    f"{kind}: recovered {recovered}/{len(points)}"
                    f" (exit 0 because only tidying up failed: {bench.tidied_later})",
                    flush=True,
                )
    total = len(points) * len(KINDS)
    print(
        f"recovered {total - failures}/{total} ({len(points)} of {bench.calls} calls x "
        f"{', '.join(KINDS)}; {time.monotonic() - started:.0f} s)"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
