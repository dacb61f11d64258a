"""`doctor`: is this machine fit for the work, and what to do about what is not.

Looks and measures; changes nothing but a temporary file whose writing it times. Works where torch
or compressai cannot be imported, because that is one of the things it finds.
"""

from __future__ import annotations

import importlib
import io
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ci2p_cache.errors import CacheError
from ci2p_cache.record import Record

__all__ = ["Diagnosis", "diagnose"]

_WANTED_FILES = 4096
"""Open files: a shard each in random order, ImageNet has 1,252 of them."""

_PROBE_BYTES = 64 * 2**20
"""Written and synced to time a disk; a second on a slow one."""

_SLOW_DISK_BYTES = 50e6
"""Bytes per second below which writing latents would hold up a fast device: 4,500 views/s."""

_IMPORTED = ("torch", "torchvision", "compressai", "numpy", "zarr", "pyarrow", "timm")
"""What fails to import in combinations that pip allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis(Record):
    """One thing that was looked at."""

    subject: str
    """What was looked at, a word or two."""
    state: Literal["ok", "note", "problem"]
    """ok; note: works, but slower or with less; problem: something here will not work."""
    found: str
    """What was found."""
    advice: str
    """What to do about it; empty where nothing is needed."""


def diagnose(folder: str | Path = ".") -> tuple[Diagnosis, ...]:
    """Examines this machine and environment.

    Args:
        folder: Where caches will be written; it, or its nearest existing parent, is timed.

    Returns:
        What was found, in the order of the walk: interpreter, packages, devices, decoder, weights,
        limits, memory, disk. Never raises for a finding.
    """
    examinations: tuple[Callable[[], Iterator[Diagnosis]], ...] = (
        _interpreter,
        _packages,
        _imports,
        _devices,
        _decoder,
        _weights,
        _limits,
        lambda: _disk(Path(folder)),
    )
    return tuple(each for examine in examinations for each in examine())


def _ok(subject: str, found: str) -> Diagnosis:
    return Diagnosis(subject=subject, state="ok", found=found, advice="")


def _note(subject: str, found: str, advice: str) -> Diagnosis:
    return Diagnosis(subject=subject, state="note", found=found, advice=advice)


def _problem(subject: str, found: str, advice: str) -> Diagnosis:
    return Diagnosis(subject=subject, state="problem", found=found, advice=advice)


def _interpreter() -> Iterator[Diagnosis]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        yield _problem("python", found, "images are decoded in processes that need Linux")
    else:
        yield _ok("python", found)


def _wanted() -> Iterator[Requirement]:
    """Yields what this package asks for on this Python, its extras left out."""
    for wanted in map(Requirement, requires("ci2p-cache") or ()):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield wanted


def _packages() -> Iterator[Diagnosis]:
    """Holds what is installed against what this package asks for."""
    for wanted in _wanted():
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield _problem(wanted.name, "not installed", _reinstall(wanted))
            continue
        if wanted.specifier.contains(found, prereleases=True):
            yield _ok(wanted.name, found)
        else:
            yield _problem(wanted.name, f"{found}; wanted {wanted.specifier}", _reinstall(wanted))


def _reinstall(wanted: Requirement) -> str:
    return f"pip install '{wanted.name}{wanted.specifier}'"


def _imports() -> Iterator[Diagnosis]:
    """Imports what is known to fail in wrong company, each after what it needs."""
    for name in _IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            if getattr(error, "name", None) == name == "compressai":
                # Where it is a dependency, _packages has named it.
                if name not in {each.name for each in _wanted()}:
                    yield _note(
                        name,
                        "not installed; it installs with Python 3.11 and 3.12, this is "
                        f"{platform.python_version()}",
                        "only architectures other than bmshj2018-factorized, training a codec and "
                        "evaluate_rate_distortion need it: use Python 3.11 or 3.12 for them",
                    )
                continue
            yield _problem(
                f"import {name}",
                f"{type(error).__name__}: {error}".splitlines()[0],
                "torch, torchvision, numpy and compressai, if it is there, must fit together: make "
                "a fresh environment and pip install ci2p-cache into it",
            )


def _devices() -> Iterator[Diagnosis]:
    try:
        import torch

        from ci2p_cache.machine import BF16_GAIN, has_bf16, num_cores
    except Exception:  # reported by _imports
        return
    cores = num_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _ok("processor", f"{cores} cores, {memory / 2**30:.0f} GiB of memory")
    if has_bf16(torch.device("cpu")):
        yield _ok("bfloat16", f"computed by this processor: {BF16_GAIN}")
    else:
        yield _note("bfloat16", "emulated on this processor", "use --precision float32 on the CPU")
    if not torch.cuda.is_available():
        yield _note("cuda", "no device", "encoding and training run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield _ok(f"cuda:{number}", found)
        else:
            yield _note(f"cuda:{number}", f"{found}, no bfloat16", "use --precision float32")
    # Decoding keeps a device busy only with enough cores beside it, at some 400 images/s each.
    if cores < 4 * torch.cuda.device_count():
        yield _note(
            "cores per device",
            f"{cores / torch.cuda.device_count():.0f}",
            "decoding will hold up encoding; training from the cache needs few cores",
        )


def _decoder() -> Iterator[Diagnosis]:
    """Decodes a picture that it makes."""
    try:
        from PIL import Image

        from ci2p_cache.images.decode import decode_image, decoder_name
        from ci2p_cache.specs import ImageSpec

        jpeg = io.BytesIO()
        Image.new("RGB", (48, 32), "teal").save(jpeg, "jpeg")
        decode_image(jpeg.getvalue(), ImageSpec(size=32, resize_side=32, decoder=decoder_name()))
    except Exception as error:  # whatever a broken installation raises
        yield _problem("decoder", str(error), "pip install --force-reinstall torchvision pillow")
        return
    yield _ok("decoder", decoder_name())


def _weights() -> Iterator[Diagnosis]:
    try:
        from ci2p_cache.encoder.load import load_encoder
        from ci2p_cache.encoder.weights import weights_folder

        load_encoder("bundled")
    except CacheError as error:
        yield _problem("bundled encoder", str(error), "pip install --force-reinstall ci2p-cache")
        return
    except Exception:  # reported by _imports
        return
    yield _ok("bundled encoder", "whole")
    try:
        folder = weights_folder()
    except CacheError as error:
        yield _note("official encoders", str(error), error.hint or "")
        return
    names = sorted(path.name for path in folder.glob("*.pth.tar"))
    if names:
        yield _ok("official encoders", f"{', '.join(names)} in {folder}")
    else:
        yield _note(
            "official encoders",
            f"none in {folder} yet",
            "the first `encode` fetches its own; without a network: --weights FILE, or "
            "--encoder bundled",
        )


def _limits() -> Iterator[Diagnosis]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _WANTED_FILES:
        yield _ok("open files", "no limit" if most == resource.RLIM_INFINITY else f"{most:,}")
    else:
        yield _note(
            "open files",
            f"{most:,} at most",
            f"raise the hard limit (`ulimit -Hn {_WANTED_FILES}` as root): each shard stays open",
        )


def _disk(folder: Path) -> Iterator[Diagnosis]:
    """Reports the free space, and times writing 64 MiB with fsync."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    subject, size = f"disk of {place}", f"{free / 1e9:.1f} GB free"
    data = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            started = time.perf_counter()
            for _ in range(_PROBE_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            rate = _PROBE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        yield _problem(subject, f"{size}; cannot be written: {error.strerror}", "choose another")
        return
    found = f"{size}, writes {rate / 1e6:,.0f} MB/s"
    if rate < _SLOW_DISK_BYTES:
        yield _note(subject, found, "slow: encode to a local disk, and copy the finished folder")
    else:
        yield _ok(subject, found)
