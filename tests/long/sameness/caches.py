"""Units on caches: what `encode` and `convert` write, how caches grow, and are taken over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.long.sameness.bench import Bench, Unit
from tests.support.pictures import picture

__all__ = ["BEST", "COMBINATIONS", "ENCODE", "units"]

BEST = ("--checkpoint", "best")
"""Once the default: earlier versions know it too."""

ENCODE = ("--encoder", "bundled", "--size", 64)
"""Options of every encode here: no network, small."""

_SHARDS = ("--shard-samples", 4, "--val-fraction", 0.25)


@dataclass(frozen=True, slots=True)
class _Combination:
    """One cache: a source and the options that matter."""

    source: str
    words: str
    batches: bool = False
    """Whether to compare batches of the loaders too."""


COMBINATIONS = tuple(
    _Combination(*each)
    for each in (
        ("folder", "--dtype int8 --views flip --format zarr --codec zstd", True),
        ("folder", "--dtype int16 --views none --format zarr --codec none", True),
        ("folder", "--dtype float16 --views crops:3 --format webdataset --codec zstd", True),
        ("folder", "--dtype float32 --views flip --format both --codec zstd", True),
        ("one tar", "--dtype int8 --views crops:2 --format both --codec none"),
        ("one tar", "--dtype float32 --views none --format webdataset"),
        ("tar.gz folder", "--dtype int16 --views flip --format webdataset --codec zstd"),
        ("tar.gz folder", "--dtype int8 --views none --format zarr --codec none"),
        ("tar.zst braces", "--dtype float32 --views crops:2 --format zarr --codec none"),
        ("tar glob", "--dtype float16 --views flip --format zarr --codec zstd"),
        ("tgz with json and classes.txt", "--dtype int8 --views flip --format both"),
        ("parquet", "--dtype int8 --views none --format webdataset --codec none"),
        ("parquet", "--dtype float32 --views flip --format zarr --codec none"),
        ("parquet", "--dtype float16 --views crops:2 --format both --codec zstd"),
        ("csv", "--dtype int8 --views flip --format zarr --codec zstd --level 9"),
        ("csv", "--dtype int16 --views crops:4 --format both --codec none"),
        ("parquet list", "--dtype float16 --views none --format both --codec none"),
        ("parts", "--dtype int8 --views crops:2 --format zarr --shard-samples 1024", True),
        ("parts", "--dtype float32 --views none --format zarr --level 3 --seed 9"),
        ("imagenet", "--dtype int8 --views flip --format zarr"),
        ("odd", "--dtype int8 --views flip --format zarr --max-errors 100% --exif apply"),
        ("odd", "--dtype float32 --views crops:2 --format both --max-errors 100% --codec none"),
        ("odd tar", "--dtype int16 --views flip --format webdataset --max-errors 100%"),
        ("odd", "--dtype int8 --views none --max-errors 100% --max-pixels 5000 --exif apply"),
        ("folder", "--dtype int16 --step 0.5 --interpolation bicubic --resize-side 80"),
        ("folder", "--dtype int8 --step 2 --val-fraction 0 --seed 7 --limit 10"),
        ("folder", "--dtype float16 --precision bf16 --batch-size 3 --workers 1 --devices cpu:1"),
        ("few", "--dtype int8 --views crops:2 --shard-samples 1 --val-fraction 0.5"),
        ("flowers", "--dtype int8 --views flip --format zarr --size 96 --resize-side 112"),
        ("flowers", "--dtype float32 --views crops:2 --format both --interpolation bicubic"),
        ("awkward", "--dtype int8 --views none --max-errors 100%"),
    )
)
"""Every value of every option, and the pairs that meet in the code."""


def units() -> list[Unit]:
    """Returns the units of the groups caches, growth and taken over."""
    found = [
        Unit("caches", f"{each.source} {each.words}", _encoding(each)) for each in COMBINATIONS
    ]
    found += [Unit("growth", name, work) for name, work in _GROWTH.items()]
    found += [Unit("taken over", name, work) for name, work in _TAKEN_OVER.items()]
    return found


def _encoding(each: _Combination) -> Callable[[Bench], None]:
    def work(bench: Bench) -> None:
        if each.source not in bench.inputs:
            return
        words = each.words.split()
        given = [word for pair in (_SHARDS[:2], _SHARDS[2:]) if pair[0] not in words
                 for word in pair]  # fmt: skip
        base = ENCODE if "--size" not in words else ENCODE[:2]
        bench.document("encode", "encode", bench.inputs[each.source], "--out", "shards",
                       *base, *given, *words)  # fmt: skip
        bench.files("shards", "shards")
        bench.call("values", "read_cache", path="shards")
        bench.document("verify", "verify", "shards")
        bench.document("inspect", "inspect", "shards")
        if each.batches:
            bench.call("batches", "load_batches", path="shards")
            bench.call("source batches", "source_batches", path="shards")

    return work


def _rescan(bench: Bench) -> None:
    source = bench.copy_input("folder", "images")
    encode = ("encode", "images", "--out", "shards", *ENCODE, *_SHARDS)
    bench.run(*encode)
    for number in range(3):
        picture(500 + number).save(source / "bee" / f"new-{number}.jpg")
        picture(600 + number).save(source / "ant" / f"a-{number}.png")
    bench.document("without --rescan", *encode)
    bench.document("rescan", *encode, "--rescan")
    bench.files("shards", "shards")
    bench.document("again", *encode, "--rescan")
    bench.document("verify", "verify", "shards")
    # A class that is new must not renumber the others.
    (source / "aaa").mkdir()
    picture(700).save(source / "aaa" / "new.jpg")
    bench.document("new class", *encode, "--rescan")
    bench.files("with a new class", "shards")
    bench.call("values", "read_cache", path="shards")
    shutil.rmtree(source / "bee")
    bench.document("images gone", *encode, "--rescan", codes=(0, 3, 4))


def _retry_failed(bench: Bench) -> None:
    source = bench.copy_input("folder", "images")
    files = [source / "ant" / "000.jpg", source / "cat" / "003.jpg"]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:300])
    encode = ("encode", "images", "--out", "shards", *ENCODE, *_SHARDS)
    bench.ended("over budget", *encode)
    bench.document("with failures", *encode, "--max-errors", 2)
    bench.files("failed", "shards")
    bench.document("verify", "verify", "shards")
    for file, data in zip(files, whole, strict=True):
        file.write_bytes(data)
    bench.document("retried", *encode, "--retry-failed")
    bench.files("retried", "shards")


def _ranges(bench: Bench) -> None:
    encode = ("encode", bench.inputs["folder"], "--out", "shards", *ENCODE, *_SHARDS)
    bench.document("plan", *encode, "--plan-only")
    bench.text("plan again", *encode, "--plan-only")
    bench.document("status of the plan", "status", "shards")
    bench.document("range 2", *encode, "--shard-range", "2/2")
    bench.document("status between", "status", "shards")
    bench.text("status between, text", "status", "shards")
    bench.document("inspect between", "inspect", "shards")
    bench.document("verify between", "verify", "shards", codes=(0, 5))
    bench.ended("finalise too early", *encode, "--finalise")
    bench.ended("train too early", "train", "shards")
    bench.document("range 1", *encode, "--shard-range", "1/2")
    bench.document("finalise", *encode, "--finalise")
    bench.document("status", "status", "shards")
    bench.files("shards", "shards")


def _limit(bench: Bench) -> None:
    encode = ("encode", bench.inputs["one tar"], "--out", "shards", *ENCODE, *_SHARDS)
    bench.document("limited", *encode, "--limit", 9)
    bench.document("again", *encode, "--limit", 9)
    bench.files("limited", "shards")
    bench.document("overwrite", *encode, "--overwrite", "shards")
    bench.files("overwritten", "shards")


def _processes(bench: Bench) -> None:
    bench.document("encode", "encode", bench.inputs["folder"], "--out", "shards", *ENCODE,
                   *_SHARDS, "--executor", "processes", "--devices", "cpu:1")  # fmt: skip
    bench.files("shards", "shards")


def _repair(bench: Bench) -> None:
    encode = ("encode", bench.inputs["folder"], "--out", "shards", *ENCODE, *_SHARDS)
    bench.run(*encode, "--format", "both")
    root = bench.folder / "shards"
    for pattern in ("latents.zarr/train/latents/c.0*", "index/val-*", "tar/train-000001.tar"):
        flip(next(iter(sorted(root.glob(pattern)))))
    for pattern in ("latents.zarr/val/labels/c.0", "errors.parquet", "commits/train-000002.json"):
        (root / pattern).unlink(missing_ok=True)
    (root / "stray.bin").write_bytes(b"not of the cache")
    bench.document("verify", "verify", "shards", codes=(5,))
    bench.document("verify --quick", "verify", "shards", "--quick", codes=(5,))
    bench.document("status", "status", "shards")
    bench.document("repair", "verify", "shards", "--repair", codes=(0, 5))
    bench.files("repaired", "shards")
    bench.document("reencode", "verify", "shards", "--reencode", 5, codes=(0, 5))
    bench.text("verify, text", "verify", "shards", codes=(0, 5))


def _convert(bench: Bench) -> None:
    bench.run("encode", bench.inputs["folder"], "--out", "shards", *ENCODE, *_SHARDS)
    for name, source, words in (
        ("tars", "shards", ("--format", "webdataset")),
        ("both", "shards", ("--format", "both")),
        ("raw", "shards", ("--format", "zarr", "--codec", "none")),
        ("small", "raw", ("--format", "zarr", "--codec", "zstd", "--level", 9)),
        ("back", "tars", ("--format", "zarr")),
        ("arrays", "shards", ("--format", "npy")),
        ("arrays-of-tars", "tars", ("--format", "npy")),
    ):
        bench.document(f"convert {name}", "convert", source, "--out", name, *words)
        bench.files(name, name)
    bench.document("convert again", "convert", "shards", "--out", "both", "--format", "both")
    bench.ended("convert to another", "convert", "shards", "--out", "both", "--format", "zarr")


_GROWTH: dict[str, Callable[[Bench], None]] = {
    "processes": _processes,
    "convert": _convert,
    "repair": _repair,
    "ranges": _ranges,
    "retry-failed": _retry_failed,
    "rescan": _rescan,
    "limit and overwrite": _limit,
}


def _cache_taken_over(bench: Bench) -> None:
    """A cache that the commit made half, finished, grown, repaired and read by each tree."""
    source = bench.copy_input("folder", "images")
    encode = ("encode", "images", "--out", "shards", *ENCODE, *_SHARDS, "--format", "both")
    bench.run(*encode, "--shard-range", "1/2", made_by_base=True)
    bench.document("encode", *encode)
    bench.files("shards", "shards")
    picture(800).save(source / "cat" / "new.jpg")
    bench.document("rescan", *encode, "--rescan")
    flip(next(iter(sorted((bench.folder / "shards").glob("latents.zarr/train/latents/c.1*")))))
    bench.document("repair", "verify", "shards", "--repair", codes=(0, 5))
    bench.files("grown", "shards")
    bench.call("values", "read_cache", path="shards")


def _run_taken_over(bench: Bench) -> None:
    """A run that the commit began, in a cache of the commit, ended by each tree."""
    encode = ("encode", bench.inputs["parts"], "--out", "shards", *ENCODE, *_SHARDS)
    bench.run(*encode, made_by_base=True)
    train = ("train", "shards", "--model", "vitds_tiny", "--epochs", 4, "--batch-size", 8,
             "--name", "run", "--device", "cpu", "--ema", 0.9)  # fmt: skip
    # Where it stops depends on the clock, what it ends with does not.
    bench.run(*train, made_by_base=True, stop_at="epoch 1/", codes=(0, 130))
    ended = bench.document("train", *train, clocks=("trained_epochs",))
    bench.csv_file("summary.csv", Path("runs/run/summary.csv"))
    for name in ("last_checkpoint", "best_checkpoint"):
        for part in ("model.safetensors", "optimizer.safetensors"):
            bench.file(f"{name} {part}", Path(ended[name], part))
    bench.document("evaluate", "evaluate", "runs/run", *BEST)
    bench.document("predict", "predict", "runs/run", *BEST, bench.inputs["few"])


_TAKEN_OVER: dict[str, Callable[[Bench], None]] = {
    "run": _run_taken_over,
    "cache": _cache_taken_over,
}


def flip(path: Path, place: float = 0.5) -> None:
    """Flips a bit of a file, where it is not the last byte."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)
