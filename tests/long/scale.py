"""Bar R12: a source of ImageNet's size: what plan, resume, verify and a start of training take.

The source is N hard links to a few tiny JPEGs in 1,000 classes. Then every shard but the last few
is committed: the first one, or as many as `--real` gives time for, by a real encode at 32 px, when
memory and open files are sampled and must stay flat; all others by copying the latents of the first
under records and index parts of their own. Then come the command that continues, finalising, verify
and training's first batches. Each step runs in a process of its own, forked from one that has only
imported; the page cache is warm.

python tests/long/scale.py [--rows N] [--real MINUTES]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

import ci2p_cache as cc
import ci2p_cache.loader.batches  # so that it is not counted where it is first used
from ci2p_cache.cache.commit import CommitRecord, read_commit
from ci2p_cache.cache.index import INDEX_SCHEMA, read_index
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.paths import index_path, shard_path
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.verify import verify
from ci2p_cache.encoding import finalise as finalising
from ci2p_cache.encoding import lane
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.planning import build_plan
from ci2p_cache.errors import InterruptedRunError
from ci2p_cache.images.locate import open_source
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.specs import LatentSpec
from tests.support.pictures import picture

IMAGENET = 1_281_167
OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=32, views="none", val_fraction=0, batch_size=64, devices="cpu"
)
NUM_CLASSES, NUM_PICTURES, LEFT_SHARDS = 1_000, 48, 3
MIB = 2**20

RESUME_SECONDS, VERIFY_SECONDS = 10.0, 5.0
MAX_GROWN_BYTES = 2**30
FLAT_SHARE = 0.05
SAMPLE_SECONDS = 2.0


@dataclass
class Ran:
    """What a step gave, and what its process took."""

    value: Any
    grown_bytes: int
    """Peak memory above that of the process that had only imported."""
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, resident bytes, open files) every two seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=IMAGENET, help="images")
    parser.add_argument(
        "--real", type=float, metavar="MINUTES", help="encode for real for so long, 60 for all"
    )
    arguments = parser.parse_args()
    verdict = Verdict()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        measure(verdict, arguments.rows, source, out, minutes=arguments.real)
    print("every bar holds" if not verdict.failed else f"{verdict.failed} bars fail")
    return int(verdict.failed > 0)


class Verdict:
    """Prints measurements and counts the bars that fail."""

    def __init__(self) -> None:
        self.failed = 0

    def say(self, what: str, text: str, *, good: bool = True) -> None:
        self.failed += not good
        print(f"{what:<28} {text}{'' if good else '   <-- FAILS'}", flush=True)

    def took(self, what: str, ran: Ran, seconds: float, bar: float | None = None) -> None:
        text = f"{seconds:8.2f} s, {ran.grown_bytes / MIB:6.0f} MiB"
        good = ran.grown_bytes < MAX_GROWN_BYTES and (bar is None or seconds < bar)
        self.say(what, text + (f" (bar {bar:.0f} s)" if bar else ""), good=good)


def measure(verdict: Verdict, rows: int, source: Path, out: Path, *, minutes: float | None) -> None:
    started = time.monotonic()
    make_source(source, rows)
    verdict.say("source", f"{rows} files made in {time.monotonic() - started:.0f} s")

    ran = in_child(plan_source, source)
    verdict.took("plan", ran, ran.value["seconds"])
    verdict.say("plan.parquet", f"{ran.value['bytes'] / MIB:.1f} MiB, {ran.value['sha256']}")
    unique = ran.value["keys"]
    verdict.say("distinct keys", f"{unique}/{rows}", good=unique == rows)
    num_shards = ran.value["shards"]
    left = min(LEFT_SHARDS, num_shards - 1)

    if minutes is None:
        in_child(encode_until, source, out, 1, 1.0)
    else:
        ran = in_child(encode_until, source, out, num_shards - left, minutes, sampled=True)
        tell_flat(verdict, ran, ran.value)
    encoded = len(commit_times(out))
    in_child(copy_shards, out, num_shards - left)
    before = commit_times(out)
    verdict.say(
        "committed",
        f"{len(before)}/{num_shards} shards, {encoded} of them encoded, {len(before) - encoded} "
        "copied",
        good=num_shards - left <= len(before) < num_shards,
    )

    ran = in_child(resume, source, out)
    first, summary = ran.value["first"], ran.value["summary"]
    verdict.took("resume: to the first batch", Ran(None, first["grown_bytes"]), first["seconds"],
                 RESUME_SECONDS)  # fmt: skip
    verdict.took("resume: finalise", ran, ran.value["finalise_seconds"])
    again = {name for name, when in commit_times(out).items() if before.get(name, when) != when}
    verdict.say("committed shards encoded again", str(len(again)), good=not again)
    verdict.say("images", f"{summary['images']}/{rows}", good=summary["images"] == rows)
    last = (num_shards - len(before)) * 1024
    verdict.say("of them encoded on resuming", str(summary["encoded_now"]),
                good=summary["encoded_now"] <= last)  # fmt: skip

    ran = in_child(resume, source, out)
    verdict.took("complete: nothing to do", ran, ran.value["seconds"], RESUME_SECONDS)
    ran = in_child(quick_verify, out)
    verdict.took("verify --quick", ran, ran.value["seconds"], VERIFY_SECONDS)
    verdict.say("findings", str(ran.value["findings"]), good=ran.value["findings"] == 0)
    ran = in_child(first_batch, out)
    verdict.took("open_cache", ran, ran.value["open"])
    verdict.took("first batch of an epoch", ran, ran.value["batch"])
    verdict.say("next 200 batches of 128", f"{ran.value['rest']:8.2f} s, "
                f"{ran.value['files']} files open")  # fmt: skip


def make_source(root: Path, rows: int) -> None:
    """Links to a few tiny pictures; ext4 allows 65,000 links to one file."""
    root.mkdir()
    pictures = []
    for number in range(max(NUM_PICTURES, -(-rows // 60_000))):
        path = root.parent / f"picture-{number}.jpg"
        picture(number, width=48 + number % 5, height=36 + number % 3).save(path, quality=80)
        pictures.append(os.fspath(path))
    per_class = -(-rows // NUM_CLASSES)
    for label in range(NUM_CLASSES):
        folder = root / f"n{label:08d}"
        folder.mkdir()
        for number in range(label * per_class, min(rows, (label + 1) * per_class)):
            name = f"{folder}/n{label:08d}_{number % per_class}.JPEG"
            os.link(pictures[number * 7919 % len(pictures)], name)


def plan_source(source: Path) -> dict[str, Any]:
    """Does what `encode` does before its first shard."""
    started = time.monotonic()
    latent = LatentSpec(dtype="int8", step=1.0, channels=192, height=2, width=2)
    plan = build_plan(open_source(source), OPTIONS.layout_spec(), OPTIONS.view_spec(), latent)
    content = plan.to_bytes()
    seconds = time.monotonic() - started
    keys: set[str] = set()
    for split, number in plan.shard_numbers():
        keys |= {sample.key for sample in plan.shard(split, number).samples}
    return {
        "seconds": seconds,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "keys": len(keys),
        "shards": plan.num_shards,
    }


class Interrupt(cc.EncodeObserver):
    """Ends a run, as Ctrl-C would, once so many shards are committed, or after so many minutes."""

    def __init__(self, out: Path, shards: int, rows: int, minutes: float) -> None:
        self.out = out
        self.shards = shards
        self.rows = rows
        self.end = time.monotonic() + 60 * minutes

    def progress(self, progress: Any) -> None:
        late = time.monotonic() > self.end
        # Listing the folder at every call would itself be seen.
        if late or progress.done > self.rows:
            committed = len(commit_times(self.out))
            if committed >= self.shards or (late and committed):
                raise InterruptedRunError("enough", signal_number=signal.SIGINT)


def encode_until(
    source: Path, out: Path, shards: int, minutes: float, options: cc.EncodeOptions = OPTIONS
) -> float:
    started = time.monotonic()
    observer = Interrupt(out, shards, shards * options.shard_samples, minutes)
    with contextlib.suppress(InterruptedRunError):
        cc.encode(source, out, options, observer=observer)
    return time.monotonic() - started


def copy_shards(out: Path, shards: int) -> None:
    """Commits every missing shard below `shards` with the latents of the first."""
    manifest = read_manifest(out)
    plan = read_plan(out, manifest)
    first = read_commit(out, "train", 0)
    assert first is not None
    latents = (out / shard_path("train", 0)).read_bytes()
    index = read_index(out, "train", 0)
    with StagingArea(out, name="copies") as staging:
        for number in range(shards):
            if read_commit(out, "train", number) is not None:
                continue
            shard = plan.shard("train", number)
            names = {
                "row": [sample.row for sample in shard.samples],
                "key": [sample.key for sample in shard.samples],
                "label": [sample.label for sample in shard.samples],
                "class": [manifest.classes[sample.label] for sample in shard.samples],
                "path": [sample.path.decode() for sample in shard.samples],
                "path_bytes": [sample.path for sample in shard.samples],
            }
            table = index
            for place, column in enumerate(INDEX_SCHEMA):
                if column.name in names:
                    values = pa.array(names[column.name], column.type)
                    table = table.set_column(place, column, values)
            staging.commit(
                CommitRecord(
                    split="train",
                    shard=number,
                    first_row=shard.first_row,
                    rows=len(shard.samples),
                    valid_rows=first.valid_rows,
                    plan_sha256=shard.sha256,
                    fingerprint=first.fingerprint,
                    index_crc32c=first.index_crc32c,
                    files=(
                        staging.put(shard_path("train", number), latents),
                        staging.put(index_path("train", number), parquet_bytes(table)),
                    ),
                    numerics=first.numerics,
                )
            )


def commit_times(out: Path) -> dict[str, int]:
    """The commit records that are there, with when each was written."""
    folder = out / "commits"
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_mtime_ns for entry in entries}


def resume(source: Path, out: Path) -> dict[str, Any]:
    """Runs `encode` to the end; notes when it encodes its first batch, and the time to finalise."""
    first: dict[str, Any] = {}
    finalise_seconds = 0.0
    base = peak_bytes()

    def encode_views(*args: Any) -> Any:
        if not first:
            first["seconds"] = time.monotonic() - started
            first["grown_bytes"] = peak_bytes() - base
        return lane.encode_views(*args)

    def finalise(*args: Any) -> Any:
        nonlocal finalise_seconds
        began = time.monotonic()
        found = finalising.finalise(*args)
        finalise_seconds = time.monotonic() - began
        return found

    with (
        mock.patch("ci2p_cache.encoding.shard.encode_views", encode_views),
        mock.patch("ci2p_cache.encoding.whole.finalise", finalise),
    ):
        started = time.monotonic()
        summary = cc.encode(source, out, OPTIONS)
    return {
        "first": first,
        "seconds": time.monotonic() - started,
        "finalise_seconds": finalise_seconds,
        "summary": summary.to_dict(),
    }


def quick_verify(out: Path) -> dict[str, Any]:
    started = time.monotonic()
    findings = verify(out, quick=True)
    return {"seconds": time.monotonic() - started, "findings": len(findings)}


def first_batch(out: Path) -> dict[str, Any]:
    """Opens the cache and reads in random order, which touches every shard."""
    times = [time.monotonic()]
    split = cc.open_cache(out)["train"]
    times.append(time.monotonic())
    with cc.LatentLoader(split, batch_size=128) as loader:
        batches = iter(loader)
        next(batches)
        times.append(time.monotonic())
        for _, _ in zip(range(min(200, len(loader) - 1)), batches, strict=False):
            pass
        times.append(time.monotonic())
        files = open_files(os.getpid())
        del batches
    spent = np.diff(times).tolist()
    return {"open": spent[0], "batch": spent[1], "rest": spent[2], "files": files}


def tell_flat(verdict: Verdict, ran: Ran, seconds: float) -> None:
    """Holds the last third of the samples against the first, for memory and open files."""
    verdict.say("real encode", f"{seconds:.0f} s, {len(ran.samples)} samples")
    third = len(ran.samples) // 3
    for name, place, unit in (("resident MiB", 1, MIB), ("open files", 2, 1)):
        values = [sample[place] / unit for sample in ran.samples]
        early, late = max(values[:third], default=0), max(values[-third:], default=0)
        verdict.say(
            f"{name}, real encode",
            f"first third at most {early:.0f}, last third at most {late:.0f}",
            good=third > 0 and late <= early * (1 + FLAT_SHARE),
        )


def in_child(step: Callable[..., Any], *args: Any, sampled: bool = False) -> Ran:
    """Runs a step in a forked child and waits; a step that fails ends the script."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            base = peak_bytes()
            value = step(*args)
            with os.fdopen(writer, "w") as pipe:
                json.dump({"value": value, "grown_bytes": peak_bytes() - base}, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    samples: list[tuple[float, int, int]] = []
    ended = threading.Event()
    sampler = threading.Thread(target=sample, args=(pid, samples, ended), daemon=True)
    if sampled:
        sampler.start()
    try:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        ended.set()
        if sampled:
            sampler.join()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        sys.exit(f"{step.__name__} ended with {code}")
    return Ran(samples=samples, **json.loads(text))


def sample(pid: int, samples: list[tuple[float, int, int]], ended: threading.Event) -> None:
    """Notes memory and open files of a process and all below it."""
    started = time.monotonic()
    while not ended.wait(SAMPLE_SECONDS):
        # A decoder process may end between being listed and being looked at.
        with contextlib.suppress(OSError, StopIteration):
            pids = [pid, *descendants(pid)]
            resident = sum(status_bytes(each, "VmRSS") for each in pids)
            samples.append((time.monotonic() - started, resident, sum(map(open_files, pids))))


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def peak_bytes() -> int:
    return status_bytes(os.getpid(), "VmHWM")


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    sys.exit(main())
