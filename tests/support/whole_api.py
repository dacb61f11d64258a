"""Calls the whole public API, and prints what that has changed of the process."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import random
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

import ci2p_cache as cc

__all__ = ["main"]


class _HeapInfo(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]


def _large_blocks_are_mapped() -> bool:
    """Whether glibc maps a block of 64 MiB on its own, as it does unless mallopt was called."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, _HeapInfo
    # The fourth counts the blocks that are mapped on their own.
    before = libc.mallinfo2().d
    block = libc.malloc(ctypes.c_size_t(64 * 2**20))
    mapped = libc.mallinfo2().d > before
    libc.free(ctypes.c_void_p(block))
    return bool(mapped)


def _state() -> dict[str, object]:
    """Returns what a library has no business to change."""
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    umask = os.umask(0o22)
    os.umask(umask)
    return {
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "umask": umask,
        "logging": (logging.root.level, list(logging.root.handlers)),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "allocator maps large blocks": _large_blocks_are_mapped(),
        "random numbers": (
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002  # what others may still use
            torch.get_rng_state().tolist(),
        ),
    }


def _call_everything(images: str, out: Path) -> None:
    options = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.3)
    spec = cc.TrainSpec(model="vitds_nano", epochs=1, batch_size=4)
    cc.dry_run(images, out / "shards", options)
    cc.encode(images, out / "shards", options)
    cc.status(out / "shards")
    cc.verify(out / "shards")
    cc.reencode(out / "shards", 2)
    cc.repair(out / "shards")
    cc.convert(out / "shards", out / "tars", format="webdataset")
    cache = cc.open_cache(out / "shards")
    for loader in (cc.LatentLoader, cc.ResidentLoader, cc.OnlineLoader, cc.PixelLoader):
        with loader(cache["train"], batch_size=4) as batches:
            list(batches)
    run = Path(cc.train(out / "shards", spec=spec, runs_dir=out / "runs", device="cpu").path)
    cc.evaluate(run, device="cpu")
    cc.evaluate(run, device="cpu", from_images=True, out=out)
    picture = next(Path(images).rglob("*.jpg"))
    cc.load_classifier(run, device="cpu").predict([picture])
    cc.export_model(run, out / "model.pt2", to="torch", what="model", count=2)
    cc.complexity("vitds_nano", size=64)
    with torch.random.fork_rng():
        # Its weights are drawn, as those of torch's own modules are.
        cc.create_model("vitds_nano", latent_size=4)
    cc.load_encoder("bundled")
    experiment = cc.Experiment(name="one", source=images, encode=options, train=spec)
    cc.run_experiment(experiment, out / "experiment", device="cpu")
    cc.run_seeds(experiment, [1], out / "seeds", device="cpu", until="evaluate")


def main() -> None:
    """Calls everything on a folder of images, with a folder to write to."""
    images, out = sys.argv[1:]
    # What torch.export imports adds filters of its own.
    importlib.import_module("torch._dynamo")
    before = _state()
    _call_everything(images, Path(out))
    after = _state()
    for name, value in after.items():
        if value != before[name]:
            print(f"{name}: {str(before[name])[:200]} -> {str(value)[:200]}")
