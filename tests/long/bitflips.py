"""R6: one fault at a time in any file of a cache; `verify` must name it, reading must not be.

    python tests/long/bitflips.py                1,000 random bit flips, then every file cut in
                                                 half, emptied, deleted, swapped with a sibling
    python tests/long/bitflips.py --trials 40    what the suite runs
    python tests/long/bitflips.py --format both  the same on a cache with tars

Prints one line per fault that was missed, then "named N/N, silent 0"; exits 1 if any was missed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ci2p_cache as cc
from tests.support.pictures import write_image_folder

Epoch = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Counts:
    """What came out: faults tried, faults that `verify` named, and what it or a reader missed."""

    faults: int = 0
    named: int = 0
    raised: int = 0
    silent: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def all_found(self) -> bool:
        return self.faults == self.named and not self.silent and not self.missed

    def __str__(self) -> str:
        return (
            f"named {self.named}/{self.faults}, silent {self.silent} "
            f"(reading raised {self.raised} times, else gave the right values)"
        )


def read_all(root: Path) -> dict[str, Epoch]:
    """Reads every view of every split as training does."""
    cache = cc.open_cache(root)
    found: dict[str, Epoch] = {}
    for name, split in cache.items():
        found[name] = []
        for view in range(split.num_views):
            with cc.LatentLoader(
                split, batch_size=8, shuffle=False, views=view, threads=1
            ) as loader:
                found[name] += [
                    (batch.latents.numpy(), batch.labels.numpy(), batch.rows.numpy())
                    for batch in loader
                ]
    return found


def same(one: dict[str, Epoch], other: dict[str, Epoch]) -> bool:
    return one.keys() == other.keys() and all(
        len(one[name]) == len(other[name])
        and all(
            np.array_equal(a, b)
            for batch, wanted in zip(one[name], other[name], strict=True)
            for a, b in zip(batch, wanted, strict=True)
        )
        for name in one
    )


def names_all(root: Path, damaged: set[str]) -> bool:
    """Whether `verify` names every damaged file: in its findings, or where it cannot even start."""
    try:
        named = {finding.path for finding in cc.verify(root)}
    except cc.CacheError as error:
        return damaged == {"cache.json"} and "cache.json" in str(error)
    return damaged <= named


def judge(root: Path, damaged: set[str], wanted: dict[str, Epoch], counts: Counts) -> None:
    counts.faults += 1
    what = " and ".join(sorted(damaged))
    if names_all(root, damaged):
        counts.named += 1
    else:
        counts.missed.append(f"verify does not name {what}")
    try:
        found = read_all(root)
    except cc.CacheError:
        counts.raised += 1
    except Exception as error:  # an error that is none of ours does not say what to do
        counts.missed.append(f"{type(error).__name__} on reading with a fault in {what}: {error}")
    else:
        if not same(found, wanted):
            counts.silent += 1
            counts.missed.append(f"wrong values are read with a fault in {what}")


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Puts files back as they were."""
    before = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)


def sibling(path: Path, files: list[Path]) -> Path | None:
    """The next other file of the same folder, else the file of that name in the other split."""
    mates = [mate for mate in files if mate.parent == path.parent and mate > path]
    twin = Path(str(path).replace("/train/", "/val/"))
    found = mates[:1] or ([twin] if twin in files and twin != path else [])
    return found[0] if found and found[0].read_bytes() != path.read_bytes() else None


def run(root: Path, trials: int, seed: int = 0) -> Counts:
    """Damages a cache in every way, one after another, and counts what is found."""
    rng, counts = random.Random(seed), Counts()
    wanted = read_all(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix()

    for _ in range(trials):
        path = rng.choice(files)
        with restored(path):
            data = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            judge(root, {name(path)}, wanted, counts)
    for path in files:
        content = path.read_bytes()
        for cut in (content[: len(content) // 2], b""):
            with restored(path):
                path.write_bytes(cut)
                judge(root, {name(path)}, wanted, counts)
        with restored(path):
            path.unlink()
            judge(root, {name(path)}, wanted, counts)
        other = sibling(path, files)
        if other is not None:
            with restored(path, other):
                mine, theirs = path.read_bytes(), other.read_bytes()
                path.write_bytes(theirs)
                other.write_bytes(mine)
                both = {name(path), name(other)}
                judge(root, {"cache.json"} if "cache.json" in both else both, wanted, counts)
    assert not cc.verify(root), "the cache was not put back"
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="random bit flips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("zarr", "webdataset", "both"), default="zarr")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = write_image_folder(Path(folder) / "images", {"ant": 9, "bee": 7, "cat": 5})
        root = Path(folder) / "shards"
        options = cc.EncodeOptions(
            encoder="bundled", size=64, shard_samples=4, val_fraction=0.25, devices="cpu:1",
            format=arguments.format,
        )  # fmt: skip
        cc.encode(source, root, options)
        counts = run(root, arguments.trials, arguments.seed)
    for text in counts.missed:
        print(text)
    print(counts)
    return 0 if counts.all_found else 1


if __name__ == "__main__":
    sys.exit(main())
