"""Bar R1: SIGKILL at random times in `encode`; going on gives the same bytes.

Each kill hits a process of its own. Half of the runs begin on an empty folder, half on what the
kill before left there; after each kill the command is repeated to the end on a copy, and held
against an undisturbed run.

With --growth the command takes new images into a complete cache, whose originals are gone: after
each kill the cache is intact besides, either the old one or the larger one. With --add-views its
images get more crops.

python tests/long/kills.py [--count KILLS] [--growth | --add-views]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.encode_bench import EncodeBench, GrowthBench, MoreViewsBench
from tests.support.warm import WarmParent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of kills")
    grows = parser.add_mutually_exclusive_group()
    grows.add_argument("--growth", action="store_true", help="of a cache that takes in images")
    grows.add_argument("--add-views", action="store_true", help="of a cache that gets more views")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    started = time.monotonic()
    recovered = kills = too_late = most_lost = 0
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "aside"
        with WarmParent(Path(folder)) as warm:
            bench = EncodeBench(Path(folder) / "plain", images=16, shard_samples=2)
            if arguments.growth or arguments.add_views:
                kind = GrowthBench if arguments.growth else MoreViewsBench
                bench = kind(Path(folder) / "grown", warm, images=8, shard_samples=3)
            bench.undisturbed(warm)
            spots: dict[str, int] = {}
            bench.fresh()
            while kills < arguments.count:
                was, before = bench.folder_of_commits(), bench.commits()
                ended = warm.run(*bench.arguments, kill_after=rng.uniform(0, bench.seconds))
                if ended.code != -9:
                    too_late += 1
                    bench.fresh()
                    continue
                kills += 1
                broken = list(bench.broken())
                committed = bench.commits()
                spot = _spot(bench.out, committed, bench.num_shards)
                spots[spot] = spots.get(spot, 0) + 1
                # Shards whose file is in place without the record: the work that is done again.
                place = bench.folder_of_commits()
                shards = len(list(place.glob("latents.zarr/train/latents/c.*")))
                lost = shards - len(committed)
                most_lost = max(most_lost, lost)
                if place != was:
                    # A growth has begun or ended; `broken` holds the cache itself.
                    before = set()
                problems = [] if before <= committed else [f"lost {sorted(before - committed)}"]
                problems += broken
                if lost > 1:
                    problems.append(f"{lost} shards have no record")
                if aside.exists():
                    shutil.rmtree(aside)
                if bench.out.exists():
                    shutil.copytree(bench.out, aside)
                problems += bench.repeated(warm)
                recovered += not problems
                for problem in problems[:3]:
                    print(f"  kill {kills} ({spot}): {problem}", flush=True)
                bench.fresh()
                if kills % 2 and aside.exists():
                    shutil.rmtree(bench.out, ignore_errors=True)
                    shutil.copytree(aside, bench.out)
    print("killed where: " + ", ".join(f"{name} {n}" for name, n in sorted(spots.items())))
    print(
        f"{recovered}/{kills} (at most {most_lost} shard encoded again per kill; "
        f"{too_late} came after the end and do not count; {time.monotonic() - started:.0f} s)"
    )
    return int(recovered < kills)


def _spot(out: Path, committed: set[str], num_shards: int) -> str:
    if not (out / "cache.json").exists():
        return "before the manifest"
    if len(committed) < num_shards:
        return "between shards" if committed else "in the first shard"
    return "finalising"


if __name__ == "__main__":
    sys.exit(main())
