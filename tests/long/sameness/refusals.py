"""Units on refusals: bad options, sources, weights, caches and runs; exit codes and first lines."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.long.sameness.bench import Bench, Unit
from tests.long.sameness.caches import ENCODE, flip

__all__ = ["count", "units"]

_ENCODE = "encode IMAGES --out new --encoder bundled --size 64"

_WORDS = {
    "no such command": "nosuch",
    "no such option": "encode IMAGES --out new --nosuch 1",
    "no --out": "encode IMAGES",
    "no source": "encode --out new",
    "size": "encode IMAGES --out new --encoder bundled --size 65",
    "size is no number": "encode IMAGES --out new --size large",
    "resize-side": f"{_ENCODE} --resize-side 32",
    "dtype": f"{_ENCODE} --dtype int4",
    "step 0": f"{_ENCODE} --step 0",
    "step of floats": f"{_ENCODE} --dtype float32 --step 2",
    "views": f"{_ENCODE} --views turn",
    "crops 0": f"{_ENCODE} --views crops:0",
    "level": f"{_ENCODE} --level 23",
    "codec": f"{_ENCODE} --codec gzip",
    "shard-samples": f"{_ENCODE} --shard-samples 0",
    "val-fraction": f"{_ENCODE} --val-fraction 1.5",
    "seed": f"{_ENCODE} --seed -1",
    "limit": f"{_ENCODE} --limit 0",
    "batch-size": f"{_ENCODE} --batch-size 0",
    "workers": f"{_ENCODE} --workers 0",
    "devices": f"{_ENCODE} --devices tpu",
    "cuda": f"{_ENCODE} --devices cuda:99",
    "max-errors": f"{_ENCODE} --max-errors some",
    "max-pixels": f"{_ENCODE} --max-pixels 0",
    "shard-range": f"{_ENCODE} --shard-range 3/2",
    "shard-range text": f"{_ENCODE} --shard-range first",
    "shard-range auto": f"{_ENCODE} --shard-range auto",
    "finalise nothing": f"{_ENCODE} --finalise",
    "finalise a plan": f"{_ENCODE} --finalise --plan-only",
    "overwrite another": f"{_ENCODE} --overwrite other",
    "out is a file": "encode IMAGES --out FILE --encoder bundled --size 64",
    "out is foreign": "encode IMAGES --out FOREIGN --encoder bundled --size 64",
    "overwrite foreign": "encode IMAGES --out FOREIGN --encoder bundled --size 64 "
    "--overwrite foreign",
    "out in source": "encode IMAGES --out IMAGES/new --encoder bundled --size 64",
    "arch": "encode IMAGES --out new --arch nosuch",
    "quality": "encode IMAGES --out new --quality 9",
    "bundled quality": f"{_ENCODE} --quality 3",
    "a URL of no kind": "encode ftp://host/x.tar --out new --encoder bundled --size 64",
    "no cache: status": "status nowhere",
    "no cache: verify": "verify FOREIGN",
    "no cache: inspect": "inspect FOREIGN",
    "no cache: train": "train FOREIGN",
    "no cache: convert": "convert FOREIGN --out new --format npy",
    "no cache: report": "report FOREIGN",
    "no cache: bench": "bench loader FOREIGN",
    "no run: evaluate": "evaluate nowhere",
    "no run: predict": "predict FOREIGN IMAGES",
    "no run: export": "export FOREIGN --out new.onnx",
    "no recipe file": "run nowhere.py",
    "verify: quick repair": "verify FOREIGN --quick --repair",
    "verify: weights": "verify FOREIGN --weights w.pth",
    "complexity: size": "complexity --size 100",
    "complexity: sizes": "complexity --sizes 224,large",
    "complexity: channels": "complexity --latent-channels 100",
    "complexity: model": "complexity --model nosuch",
    "demo in a full folder": "demo --folder FOREIGN",
}
"""Name -> command line; IMAGES, FILE, FOREIGN stand for paths."""

_SETTINGS = {
    "size": "--size 96",
    "resize-side": "--resize-side 80",
    "interpolation": "--interpolation bicubic",
    "exif": "--exif apply",
    "max-pixels": "--max-pixels 10000",
    "views": "--views flip",
    "number of crops": "--views crops:3",
    "seed": "--seed 7",
    "dtype": "--dtype int16",
    "float dtype": "--dtype float32",
    "step": "--step 0.5",
    "precision": "--precision bf16",
    "format": "--format webdataset",
    "codec": "--codec none",
    "level": "--level 3",
    "shard-samples": "--shard-samples 5",
    "val-fraction": "--val-fraction 0.5",
    "limit": "--limit 9",
    "two at once": "--level 3 --dtype float16",
}
"""Name -> options that a folder made with others refuses."""

_SPEC = {
    "model": "--model vit_tiny",
    "epochs": "--epochs 3",
    "batch-size": "--batch-size 4",
    "lr": "--lr 0.01",
    "seed": "--seed 1",
    "ema": "--ema 0.9",
    "order": "--order blocks",
    "folds": "--folds 3",
    "online": "--online",
    "overwrite another": "--overwrite other",
}
"""Name -> options that a run made with others refuses."""

_TRAIN_WORDS = {
    "model": "--model nosuch",
    "timm model": "--model timm:nosuch",
    "a convnet on latents": "--model ci2p+timm:resnet18",
    "epochs": "--epochs 0",
    "batch-size": "--batch-size 0",
    "accumulate": "--accumulate 9 --batch-size 8",
    "lr": "--lr 0",
    "min-lr": "--min-lr 1",
    "warm-up": "--warmup-epochs 200",
    "adam decays": "--optimizer adam --weight-decay 0.1",
    "label-smoothing": "--label-smoothing 1",
    "mix-probability": "--mix-probability 0.5",
    "fold": "--folds 3 --fold 3",
    "one fold": "--folds 1",
    "more folds than images": "--folds 1000",
    "pos-embed on images": "--model vit_ti16 --pos-embed",
    "device": "--device tpu",
    "save-every": "--save-every 0",
    "online images": "--model vit_ti16 --online",
    "name": "--name ../outside",
}
"""Name -> options of `train` that are refused before anything is made."""

_CACHE_DAMAGE: dict[str, tuple[str, str]] = {
    "cache.json cut": ("cache.json", "cut"),
    "cache.json flipped": ("cache.json", "flip"),
    "cache.json gone": ("cache.json", "remove"),
    "cache.json empty": ("cache.json", "empty"),
    "another version": ("cache.json", "version"),
    "plan flipped": ("plan.parquet", "flip"),
    "encoder flipped": ("encoder.safetensors", "flip"),
    "encoder gone": ("encoder.safetensors", "remove"),
    "record flipped": ("commits/train-000000.json", "flip"),
    "record gone": ("commits/train-000001.json", "remove"),
    "shard flipped": ("latents.zarr/train/latents/c.0.*", "flip"),
    "shard cut": ("latents.zarr/train/latents/c.0.*", "cut"),
    "shard gone": ("latents.zarr/train/latents/c.0.*", "remove"),
    "index flipped": ("index/train-000000.parquet", "flip"),
    "labels gone": ("latents.zarr/train/labels/c.0", "remove"),
    "labels flipped": ("latents.zarr/train/labels/c.0", "flip"),
    "metadata flipped": ("latents.zarr/train/latents/zarr.json", "flip"),
    "tar flipped": ("tar/train-000000.tar", "flip"),
}
"""Name -> (glob of a file, what is done to it)."""

_RUN_DAMAGE: dict[str, tuple[str, str]] = {
    "weights flipped": ("checkpoints/epoch-*/model.safetensors", "flip"),
    "weights gone": ("checkpoints/epoch-*/model.safetensors", "remove"),
    "state gone": ("checkpoints/epoch-*/state.json", "remove"),
    "digests gone": ("checkpoints/epoch-*/digests.json", "remove"),
    "args.yaml cut": ("args.yaml", "cut"),
    "model.json cut": ("model.json", "cut"),
    "encoder flipped": ("encoder.safetensors", "flip"),
    "last.json empty": ("checkpoints/last.json", "empty"),
}
"""The same for a run folder; every file that the glob finds is damaged."""


def _make_safetensors(path: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


_WEIGHTS: dict[str, Callable[[Path], object]] = {
    "missing.pth.tar": lambda path: None,
    "text.pth.tar": lambda path: path.write_text("no weights\n"),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "folder.safetensors": lambda path: path.mkdir(),
    "other.safetensors": lambda path: _make_safetensors(
        path, {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
    ),
    "outside.safetensors": lambda path: _make_safetensors(
        path, {"a": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}}
    ),
    "name.txt": lambda path: path.write_bytes(b"PK"),
}
"""Name of a weights file -> what makes it."""


def count() -> int:
    """Returns the number of refusals of the command line that are compared, at least."""
    damages = 2 * len(_CACHE_DAMAGE) + 2 * len(_RUN_DAMAGE)
    tables = (_WORDS, _SETTINGS, _SPEC, _TRAIN_WORDS, _WEIGHTS)
    return damages + sum(len(table) for table in tables)


def units() -> list[Unit]:
    """Returns the units of the group refusals."""
    return [Unit("refusals", name, work) for name, work in _UNITS.items()]


def _options(bench: Bench) -> None:
    file, foreign = bench.folder / "file", bench.folder / "foreign"
    file.write_text("a file\n")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("not ours\n")
    paths = {"IMAGES": bench.copy_input("few", "images"), "FILE": file, "FOREIGN": foreign}
    for name, line in _WORDS.items():
        words = []
        for word in line.split():
            first, slash, rest = word.partition("/")
            words.append(f"{paths.get(first, first)}{slash}{rest}" if first in paths else word)
        bench.ended(name, *words)
        bench.note(f"{name}, left", sorted(path.name for path in bench.folder.iterdir()))


def _sources(bench: Bench) -> None:
    for name in sorted(bench.inputs.locations):
        if name.startswith("bad "):
            bench.ended(name, "encode", bench.inputs[name], "--out", f"{name}-out", *ENCODE)
    bench.note("left", sorted(path.name for path in bench.folder.iterdir()))


def _settings(bench: Bench) -> None:
    encode = ("encode", bench.inputs["few"], "--out", "shards", *ENCODE, "--views", "crops:2")
    bench.run(*encode)
    for name, words in _SETTINGS.items():
        bench.ended(name, *encode, *words.split())
    bench.ended("another source", "encode", bench.inputs["parts"], *encode[2:], "--rescan")
    bench.files("shards", "shards")


def _weights(bench: Bench) -> None:
    for name, make in _WEIGHTS.items():
        path = bench.folder / name
        make(path)
        bench.ended(name, "encode", bench.inputs["few"], "--out", "new", "--size", 64,
                      "--weights", name)  # fmt: skip
    # Port 9 of this machine: no one answers.
    bench.ended("official, no server", "encode", bench.inputs["few"], "--out", "new",
                  environment={"CI2P_CACHE_WEIGHTS_URL": "http://127.0.0.1:9/"})  # fmt: skip


def _damage(root: Path, pattern: str, how: str) -> None:
    found = sorted(root.glob(pattern))
    assert found, f"nothing is at {pattern}"
    for path in found:
        data = path.read_bytes()
        if how == "flip":
            flip(path)
        elif how == "remove":
            path.unlink()
        elif how == "version":
            path.write_bytes(
                re.sub(rb'"format_version": \d', b'"format_version": 9', data, count=1)
            )
        else:
            path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")


def _caches(bench: Bench) -> None:
    bench.run("encode", bench.inputs["few"], "--out", "whole", *ENCODE, "--shard-samples", 2,
              "--val-fraction", 0.3, "--format", "both")  # fmt: skip
    for name, (pattern, how) in _CACHE_DAMAGE.items():
        shutil.rmtree(bench.folder / "shards", ignore_errors=True)
        shutil.copytree(bench.folder / "whole", bench.folder / "shards")
        _damage(bench.folder / "shards", pattern, how)
        bench.ended(f"{name}: verify", "verify", "shards")
        # Some damage is of files that a command does not read.
        for command in (("status", "shards"), ("inspect", "shards", "--row", 0),
                        ("convert", "shards", "--out", "new", "--format", "npy")):  # fmt: skip
            shutil.rmtree(bench.folder / "new", ignore_errors=True)
            bench.ended(f"{name}: {command[0]}", *command)


def _runs(bench: Bench) -> None:
    bench.run("encode", bench.inputs["few"], "--out", "shards", *ENCODE, "--val-fraction", 0.4)
    train = ("train", "shards", "--model", "vitds_tiny", "--epochs", 1, "--batch-size", 2,
             "--name", "run", "--device", "cpu")  # fmt: skip
    for name, words in _TRAIN_WORDS.items():
        bench.ended(f"new: {name}", "train", "shards", "--runs", "made", *words.split())
    bench.note("made", sorted(str(path) for path in (bench.folder / "made").rglob("*")))
    bench.run(*train)
    for name, words in _SPEC.items():
        bench.ended(name, *train, *words.split())
    for name, command in {
        "checkpoint": ("evaluate", "runs/run", "--checkpoint", "third"),
        "split": ("evaluate", "runs/run", "--split", "test"),
        "cache": ("evaluate", "runs/run", "--cache", "nowhere"),
        "top": ("predict", "runs/run", bench.inputs["few"], "--top", 0),
        "no pictures": ("predict", "runs/run", "nowhere.jpg"),
        "no such picture": ("predict", "runs/run", bench.inputs["bad all cut"]),
        "export to nowhere": ("export", "runs/run", "--out", "no/such/folder.onnx"),
        "export checked with nothing": ("export", "runs/run", "--out", "a.pt2", "--to", "torch",
                                        "--check", "nowhere"),
        "row": ("inspect", "shards", "--row", 99),
        "key": ("inspect", "shards", "--key", "no/such.jpg"),
        "split of a row": ("inspect", "shards", "--split", "test", "--row", 0),
        "convert into itself": ("convert", "shards", "--out", "shards", "--format", "npy"),
        "convert onto a run": ("convert", "shards", "--out", "runs", "--format", "zarr"),
        "report of the same name": ("report", "runs/run", "runs/run", "--out", "a.html"),
    }.items():  # fmt: skip
        bench.ended(name, *command)
    bench.run("encode", bench.inputs["imagenet"], "--out", "other", *ENCODE)
    bench.ended("other classes", "evaluate", "runs/run", "--cache", "other")
    bench.ended("a run of another cache", "train", "other", *train[2:])
    (bench.folder / "runs/run").rename(bench.folder / "whole")
    for name, (pattern, how) in _RUN_DAMAGE.items():
        shutil.rmtree(bench.folder / "runs/run", ignore_errors=True)
        shutil.copytree(bench.folder / "whole", bench.folder / "runs/run")
        _damage(bench.folder / "runs/run", pattern, how)
        bench.ended(f"{name}: predict", "predict", "runs/run", bench.inputs["few"])
        bench.ended(f"{name}: train", *train)


def _python(bench: Bench) -> None:
    bench.run("encode", bench.inputs["few"], "--out", "shards", *ENCODE)
    bench.run("train", "shards", "--model", "vitds_tiny", "--epochs", 1, "--name", "run")
    bench.call("errors", "refusals", cache="shards", run="runs/run")


_UNITS: dict[str, Callable[[Bench], None]] = {
    "runs": _runs,
    "caches": _caches,
    "options": _options,
    "sources": _sources,
    "settings": _settings,
    "weights": _weights,
    "python": _python,
}
