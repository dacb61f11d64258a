"""The contestants of the encode benchmark: each is one process that runs one of these jobs.

Shapes: B views of a batch, H and W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import ci2p_cache as cc
from ci2p_cache.encoder.architecture import value_tensors
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoding import shard as shard_module
from ci2p_cache.encoding.shard import single_threaded
from ci2p_cache.images.decode import decode_image, decoder_name
from ci2p_cache.images.views import image_views
from ci2p_cache.process import tune_process
from ci2p_cache.specs import ImageSpec, ViewSpec
from tests.benchmarks.measure import num_cores
from tests.support.encoders import reference_of

__all__ = ["CONTESTANTS", "Job", "pixel_difference", "serve", "symbol_difference"]

CONTESTANTS = {
    "whole float32 none": "cc.encode: read, decode, g_a, round, zstd, commit; one view an image",
    "whole float32 flip": "cc.encode with the image and its mirror",
    "whole bf16 none": "cc.encode --precision bf16",
    "whole bf16 flip": "cc.encode --precision bf16 with the mirror",
    "g_a float32": "g_a alone as stage one runs it: a one-thread replica per core, tuned allocator",
    "g_a bf16": "the same in bf16",
    "g_a bf16 compiled": "torch.compile of the same layers, on batches of 8",
    "g_a untuned": "g_a alone: torch's default threads on batches of 8, allocator as it comes",
    "naive": "a loop: Pillow, batch 1, model.g_a, torch's default threads, np.save per image",
    "compressai forward": "the same loop with model(x), as compressai.utils.eval_model times it: "
    "g_a, entropy bottleneck with likelihoods, g_s; nothing saved",
}
BATCH = 8
WARM_VIEWS = 32
LIMIT = 89_000_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one contestant is to do in each of its turns."""

    key: str
    images: str
    out: str
    """A folder of its own, not there yet."""
    count: int
    """Views of one turn."""
    size: int


def serve(job: Job) -> None:
    """Warms up, then has a turn for every line of standard input; answers in JSON lines."""
    # Whatever else prints is not to be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, _, rest = job.key.partition(" ")
    turn: Callable[[int], dict[str, float]]
    if kind == "whole":
        turn = whole(job, *rest.split())
    elif kind == "g_a":
        turn = bare(job, rest)
    else:
        turn = loop(job)
    turn(min(WARM_VIEWS, job.count))
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn(job.count)), file=answers, flush=True)


def whole(job: Job, precision: str, views: str) -> Callable[[int], dict[str, float]]:
    """The whole of stage one, into a new folder each time; timed as its summary has it."""
    # As the command does; the library leaves the caller's process alone.
    tune_process("cpu")

    def turn(count: int) -> dict[str, float]:
        shutil.rmtree(job.out, ignore_errors=True)
        options = cc.EncodeOptions(
            labels="none",
            encoder="bundled", size=job.size, views=views, val_fraction=0.0,
            precision="bf16" if precision == "bf16" else "float32",
            limit=max(1, count // (2 if views == "flip" else 1)), devices="cpu",
        )  # fmt: skip
        with profiled() as spent:
            summary = cc.encode(job.images, job.out, options)
        return {
            **spent,
            "views": summary.views,
            "seconds": summary.seconds,
            "waiting": summary.waiting_share,
        }

    return turn


def bare(job: Job, how: str) -> Callable[[int], dict[str, float]]:
    """g_a on random pictures: nothing is read, rounded or written."""
    # The network itself: FrozenEncoder's call would also copy y to NCHW float32.
    g_a, dtype, batch = network(how)
    replicas = 1 if how == "untuned" else num_cores()
    if how != "untuned":
        tune_process()
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, job.size, job.size)
    x_B3HW = torch.rand(shape, generator=generator).to(dtype, memory_format=torch.channels_last)

    def work(batches: int) -> None:
        with torch.inference_mode():
            for _ in range(batches):
                g_a(x_B3HW)

    pool = ThreadPoolExecutor(replicas, initializer=single_threaded if how != "untuned" else None)

    def turn(count: int) -> dict[str, float]:
        batches = max(1, round(count / batch / replicas))
        started, spent = time.perf_counter(), time.process_time()
        for future in [pool.submit(work, batches) for _ in range(replicas)]:
            future.result()
        return {
            "views": batches * batch * replicas,
            "seconds": time.perf_counter() - started,
            "processor": time.process_time() - spent,
        }

    return turn


def network(how: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.dtype, int]:
    """g_a in the arithmetic that `how` begins with, its dtype, and images of a call."""
    encoder = load_encoder("bundled", precision="bf16" if how.startswith("bf16") else "float32")
    dtype = encoder._dtype
    if how.endswith("compiled"):
        plain = copy.deepcopy(encoder._model.g_a).to(dtype)
        return torch.compile(plain, dynamic=False), dtype, BATCH
    return encoder._g_a, dtype, BATCH if how == "untuned" else encoder._at_once or BATCH


def symbol_difference(images: Path, size: int, limit: int = 128) -> list[list[str]]:
    """How many symbols of pictures bf16 and compiling change, and by how much at most."""
    single_threaded()
    encoder = load_encoder("bundled")
    pictures = [
        transforms.pil_to_tensor(by_pillow(path, size))
        for path in sorted(images.rglob("*.*"))[:limit]
    ]
    kinds = ("float32", "float32 compiled", "bf16", "bf16 compiled")
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
    for kind in kinds:
        g_a, dtype, _ = network(kind)
        for start in range(0, len(pictures) // BATCH * BATCH, BATCH):
            x_BCHW = torch.stack(pictures[start : start + BATCH]).to(torch.float32).div(255)
            with torch.inference_mode():
                y = g_a(x_BCHW.to(dtype, memory_format=torch.channels_last))
            found[kind].append(encoder.quantize(y))
    rows = []
    for first, second in itertools.combinations(kinds, 2):
        gap = (torch.cat(found[first]) - torch.cat(found[second])).abs()
        share = float((gap > 0).double().mean())
        rows.append([first, second, f"{share:.4%}", str(int(gap.max()))])
    return rows


def loop(job: Job) -> Callable[[int], dict[str, float]]:
    """One picture after another, as a script would do it."""
    # What a script has that knows nothing of us.
    model = reference_of(value_tensors(load_encoder("bundled")._model), 5)
    model.to(memory_format=torch.contiguous_format)
    paths = sorted(Path(job.images).rglob("*.*"))
    out = Path(job.out)

    def turn(count: int) -> dict[str, float]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        started, spent = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for number, path in enumerate(paths[:count]):
                pixels = transforms.pil_to_tensor(by_pillow(path, job.size))
                x_1CHW = pixels[None].to(torch.float32) / 255
                if job.key == "naive":
                    np.save(out / f"{number}.npy", model.g_a(x_1CHW)[0].numpy())
                else:
                    model(x_1CHW)
        return {
            "views": len(paths[:count]),
            "seconds": time.perf_counter() - started,
            "processor": time.process_time() - spent,
        }

    return turn


def by_pillow(path: Path, size: int) -> Image.Image:
    """torchvision's own recipe on Pillow images: shorter side to `size`, central square."""
    with Image.open(path) as image:
        resized = transforms.resize(
            image.convert("RGB"), [size], InterpolationMode.BILINEAR, antialias=True
        )
        square: Image.Image = transforms.center_crop(resized, [size, size])
    return square


def pixel_difference(images: Path, size: int, limit: int = 200) -> dict[str, float]:
    """Holds decode and resize of stage one against Pillow's, over the first files."""
    spec = ImageSpec(
        size=size, resize_side=size, interpolation="bilinear", exif="ignore", max_pixels=LIMIT,
        decoder=decoder_name(),
    )  # fmt: skip
    largest, total, differing, values, count = 0, 0, 0, 0, 0
    for path in sorted(images.rglob("*.*"))[:limit]:
        image = decode_image(path.read_bytes(), spec)
        view, _ = image_views(image, spec, ViewSpec.parse("none"), split="val", key="")
        other = transforms.pil_to_tensor(by_pillow(path, size))
        gap = (view[0].to(torch.int16) - other.to(torch.int16)).abs()
        largest = max(largest, int(gap.max()))
        total += int(gap.sum())
        differing += int((gap > 0).sum())
        values += gap.numel()
        count += 1
    return {
        "images": count,
        "largest": largest,
        "mean": total / values,
        "share": differing / values,
    }


@contextlib.contextmanager
def profiled() -> Iterator[dict[str, float]]:
    """Adds up processor seconds of stage one by what they are spent on.

    Its functions are wrapped with clocks of the threads that run them. What decoders take is read
    from /proc before they end, because they are not children of this process. Loading the encoder,
    listing and the end of a cache are left out.
    """
    spent: dict[str, float] = defaultdict(float)
    lock = threading.Lock()

    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                with lock:
                    spent[part] += time.thread_time() - started

        return wrapper

    encoder = shard_module.ShardEncoder
    places: list[tuple[Any, str, str]] = [
        (shard_module, "encode_views", "g_a"),
        (shard_module, "load_image", "reading"),
        (encoder, "_pack", "packing"),
        (encoder, "_finish", "committing"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, clocked(getattr(owner, name), part))
    process, before = 0.0, dict[int, float]()

    def begin(self: Any) -> Any:
        nonlocal process
        process = time.process_time()
        before.update(descendants())
        return enter(self)

    def end(self: Any, *error: Any) -> None:
        spent["processor"] = time.process_time() - process
        spent["other"] = max(0.0, spent["processor"] - sum(spent[part] for _, _, part in places))
        spent["decoding"] = sum(s - before.get(pid, 0.0) for pid, s in descendants().items())
        spent["processor"] += spent["decoding"]
        leave(self, *error)

    enter, leave = encoder.__enter__, encoder.__exit__
    originals += [(encoder, "__enter__", enter), (encoder, "__exit__", leave)]
    encoder.__enter__, encoder.__exit__ = begin, end  # type: ignore[method-assign]  # put back below
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def descendants() -> dict[int, float]:
    """Processor seconds of every process below this one."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / tick
    found = {}
    for pid in parents:
        above = parents[pid]
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            found[pid] = seconds[pid]
    return found
