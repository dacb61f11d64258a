"""A plan of ten million images: building, writing, resuming and slicing it, on this machine.

The source only names its images; nothing is read or encoded. Built and read again in processes of
their own, one core each.

python tests/long/plan_scale.py [--rows N] [--machines N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ci2p_cache as cc
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoding.plan import build_plan, read_plan
from ci2p_cache.images.source import ImageRef

ROWS, NUM_CLASSES, MIB = 10_000_000, 21_841, 2**20


class NamedImages:
    """A source that has as many images as one likes, all of them names."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.classes = tuple(f"n{number:08d}" for number in range(NUM_CLASSES))
        self.class_titles = self.classes
        self.notices: tuple[str, ...] = ()

    def location(self) -> str:
        return "names"

    def scan(self) -> Iterator[ImageRef]:
        for number in range(self._count):
            label = number % NUM_CLASSES
            key = f"{self.classes[label]}/{number:09d}.JPEG"
            yield ImageRef(key, "train", label, key.encode())

    def file_of(self, path: bytes) -> None:
        """None has a file."""

    def read(self, path: bytes) -> bytes:
        raise AssertionError(f"{path!r} is only a name")


def build(rows: int, folder: Path) -> dict[str, Any]:
    """Plans, and begins a cache with the plan."""
    encoder = cc.load_encoder("bundled")
    images = NamedImages(rows)
    latent = cc.LatentSpec(dtype="int8", channels=encoder.num_channels, height=16, width=16)
    fingerprint = cc.Fingerprint(
        image=cc.ImageSpec(decoder="none"), views=cc.ViewSpec.parse("flip"), encoder=encoder.spec,
        latent=latent,
    )  # fmt: skip
    layout = cc.LayoutSpec(val_fraction=0.0)
    started = time.monotonic()
    plan = build_plan(images, layout, fingerprint.views, latent)
    built = time.monotonic() - started
    started = time.monotonic()
    with StagingArea(folder) as staging:
        manifest = Manifest(
            software="plan_scale", state="encoding", fingerprint=fingerprint, layout=layout,
            source="names", classes=images.classes, class_titles=images.class_titles,
            splits=plan.splits, plan=staging.put(PLAN, plan.to_bytes()),
            encoder=staging.put(ENCODER, encoder.to_bytes()),
            offset=tuple(encoder.medians.tolist()),
        )  # fmt: skip
        staging.put_sealed(MANIFEST, manifest.to_dict())
    written = time.monotonic() - started
    return {
        "built": built, "written": written, "shards": plan.num_shards,
        "bytes": (folder / PLAN).stat().st_size,
    }  # fmt: skip


def resume(folder: Path, machines: int) -> dict[str, Any]:
    """Reads the plan as a resumed run does, and takes one machine's shards of it."""
    started = time.monotonic()
    plan = read_plan(folder, read_manifest(folder))
    read = time.monotonic() - started
    started = time.monotonic()
    digests = {plan.shard_sha256(*place) for place in plan.shard_numbers()}
    scanned = time.monotonic() - started
    started = time.monotonic()
    numbers = list(plan.shard_numbers())
    mine = numbers[: len(numbers) // machines]
    samples = sum(len(plan.shard(*place).samples) for place in mine)
    sliced = time.monotonic() - started
    assert len(digests) == plan.num_shards, "every shard has samples of its own"
    return {
        "read": read, "scanned": scanned, "sliced": sliced, "samples": samples, "mine": len(mine),
    }  # fmt: skip


def in_process(work: Any, *arguments: Any) -> tuple[dict[str, Any], int]:
    """Runs a step in a process of its own; gives its result and peak memory in bytes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    found, peak = ours.recv()
    process.join()
    return found, peak


def _send(pipe: Any, work: Any, arguments: tuple[Any, ...]) -> None:
    found = work(*arguments)
    pipe.send((found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--machines", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        first, first_peak = in_process(build, given.rows, folder)
        second, second_peak = in_process(resume, folder, given.machines)
    if given.json:
        print(json.dumps({**first, **second, "peaks": [first_peak, second_peak]}))
        return 0
    print(f"{given.rows:,} images in {first['shards']:,} shards")
    print(f"listed and ranked in {first['built']:.0f} s, peak {first_peak / MIB:,.0f} MiB")
    print(f"written in {first['written']:.1f} s, plan.parquet has {first['bytes'] / MIB:,.0f} MiB")
    print(
        f"resumed: read in {second['read']:.1f} s, all shards' digests in {second['scanned']:.1f} "
        f"s, peak {second_peak / MIB:,.0f} MiB"
    )
    print(
        f"one of {given.machines} machines: its {second['mine']:,} shards, {second['samples']:,} "
        f"samples, in {second['sliced']:.1f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
