"""Bytes of a cached view: against the entropy bound, JPEG and float16; and what decoding costs.

    python -m tests.benchmarks.size IMAGES [--count 200] [--weights FILE]

Every figure is a mean over the same views: the centre squares of files spread evenly over the
sorted folder. Decoding is timed on one core from memory into one buffer, contestants taking turns.

Shapes: N views, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import blosc
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

import ci2p_cache as cc
from ci2p_cache.encoder.frozen import FrozenEncoder, saturate
from ci2p_cache.process import tune_process
from tests.benchmarks.measure import Report, Table, machine, pinned, take_turns
from tests.benchmarks.pictures import JPEG_QUALITY, jpeg, mean_psnr, to_pixels, unjpeg, views

__all__ = ["Settings", "main", "measure_size"]

LEVELS = (-50, -7, -1, 1, 3, 5, 9, 19)
STEPS = (0.25, 0.5, 1.0, 2.0)
MAX_CLIPPED_SHARE = 1e-4
"""As encoding has it: above it int8 is refused."""
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    images: Path
    count: int = 200
    size: int = 256
    """Side of a view in pixels."""
    weights: Path | None = None
    """Weights of another encoder than the bundled one."""
    repeats: int = 5
    levels: tuple[int, ...] = LEVELS


@dataclass(frozen=True, eq=False)
class Stored:
    """One way to store the views: the bytes of each, and how to get the values back."""

    name: str
    chunks: list[bytes]
    decode: Callable[[bytes, npt.NDArray[np.uint8]], Any]
    raw: npt.NDArray[np.uint8]
    """(N, bytes of a view), what decoding gives."""
    stored_per_second: float
    """Views compressed per second, once over all of them."""

    @property
    def mean_bytes(self) -> float:
        return float(np.mean([len(chunk) for chunk in self.chunks]))


def measure_size(settings: Settings) -> Report:
    """Encodes the views once, then stores them in every way."""
    torch.set_num_threads(1)
    tune_process()
    encoder = (
        cc.load_encoder("bundled")
        if settings.weights is None
        else cc.load_encoder(weights=settings.weights)
    )
    pixels = views(settings.images, settings.count, settings.size)
    y = torch.cat([encoder(part.float() / 255) for part in pixels.split(BATCH)])
    bound = rate_bound(encoder, stored_symbols(encoder, y, 1.0), 1.0)
    jpegs = [jpeg(view) for view in pixels]
    jpeg_bytes = float(np.mean([len(data) for data in jpegs]))
    stored = ways_to_store(encoder, y, settings)
    sizes = size_table(stored, settings, bound=bound, jpeg_bytes=jpeg_bytes)
    steps = step_table(encoder, y, pixels, jpegs)
    text = (
        f"{len(pixels)} views of {settings.size} x {settings.size} px, latents "
        f"{tuple(y.shape[1:])}; encoder {encoder.spec.arch} quality {encoder.spec.quality}, "
        f"weights {encoder.spec.weights_sha256[:12]}"
    )
    described = machine(("ci2p-cache", "numpy", "torch", "numcodecs", "pillow"))
    return Report(described, text, [sizes, steps])


def stored_symbols(encoder: FrozenEncoder, y: torch.Tensor, step: float) -> torch.Tensor:
    """int8 (N, M, h, w) where the package would store that, else int16."""
    symbols = encoder.quantize(y, step=step)
    narrow, clipped = saturate(symbols, 127)
    if float(clipped.sum()) <= MAX_CLIPPED_SHARE * symbols.numel():
        return narrow
    return saturate(symbols, 32767)[0]


def rate_bound(encoder: FrozenEncoder, symbols: torch.Tensor, step: float) -> float:
    """Mean bytes of a view by the entropy model."""
    bits = [
        encoder.bits(encoder.dequantize(part, step=step), step=step)
        for part in symbols.split(BATCH)
    ]
    return float(torch.cat(bits).mean()) / 8


def ways_to_store(encoder: FrozenEncoder, y: torch.Tensor, settings: Settings) -> list[Stored]:
    blosc.use_threads = False
    symbols = stored_symbols(encoder, y, 1.0).numpy()
    wide = encoder.quantize(y).to(torch.int16).numpy()
    half, whole = y.to(torch.float16).numpy(), y.numpy()
    found = [
        way(f"int8, zstd {level}", symbols, Zstd(level=level, checksum=True))
        for level in settings.levels
    ]
    for shuffle, name in (
        (Blosc.NOSHUFFLE, "no shuffle"), (Blosc.BITSHUFFLE, "bitshuffle"),
    ):  # fmt: skip
        for codec, level in (("lz4", 5), ("zstd", 1), ("zstd", 5)):
            compressor = Blosc(cname=codec, clevel=level, shuffle=shuffle)
            found.append(way(f"int8, blosc {codec} {level}, {name}", symbols, compressor))
    found += [
        way("int8, none", symbols, None),
        way("int16, zstd 1", wide, Zstd(level=1, checksum=True)),
        way("int16, none", wide, None),
        way("float16, zstd 1", half, Zstd(level=1, checksum=True)),
        way("float16, none", half, None),
        way("float32, zstd 1", whole, Zstd(level=1, checksum=True)),
        way("float32, none", whole, None),
    ]
    return found


def way(name: str, values: npt.NDArray[Any], codec: Any) -> Stored:
    """Stores each view on its own, and makes sure that it comes back."""
    raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    if codec is None:
        started = time.perf_counter()
        chunks = [view.tobytes() for view in raw]
        spent = time.perf_counter() - started

        def decode(chunk: bytes, out: npt.NDArray[np.uint8]) -> None:
            out[:] = np.frombuffer(chunk, np.uint8)
    else:
        # Blosc shuffles by the item size of what it is given.
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        started = time.perf_counter()
        chunks = [bytes(codec.encode(view)) for view in flat]
        spent = time.perf_counter() - started
        decode = codec.decode
    out = np.empty(raw.shape[1], np.uint8)
    for chunk, wanted in zip(chunks, raw, strict=True):
        decode(chunk, out)
        if not np.array_equal(out, wanted):
            raise SystemExit(f"{name} gives other values back")
    return Stored(name, chunks, decode, raw, len(raw) / spent)


def size_table(
    stored: Sequence[Stored], settings: Settings, *, bound: float, jpeg_bytes: float
) -> Table:
    def timed(one: Stored) -> float:
        out = np.empty(one.raw.shape[1], np.uint8)
        with pinned(1):
            done, started = 0, time.perf_counter()
            while True:
                for chunk in one.chunks:
                    one.decode(chunk, out)
                done += len(one.chunks)
                spent = time.perf_counter() - started
                if spent >= 0.2:
                    return done / spent

    rates = take_turns(stored, timed, settings.repeats)
    half = next(one.mean_bytes for one in stored if one.name == "float16, none")
    table = Table(
        "Bytes per view, each compressed on its own (stored views/s: once over all); decoding on "
        f"one core, from memory, median of {settings.repeats} repeats",
        ("stored as", "bytes", "of the bound", f"of JPEG q{JPEG_QUALITY}", "of float16",
         "stored views/s", "decoded views/s", "min", "max"),
    )  # fmt: skip

    def row(name: str, size: float, cells: list[str]) -> list[str]:
        ratios = [f"{size / bound:.3f}", f"{size / jpeg_bytes:.3f}", f"{size / half:.4f}"]
        return [name, f"{size:,.0f}", *ratios, *cells]

    blank = ["-"] * 4
    table.rows.append(row("entropy bound at step 1", bound, blank))
    table.rows.append(row(f"the view itself as JPEG q{JPEG_QUALITY}", jpeg_bytes, blank))
    for one in stored:
        cells = [f"{one.stored_per_second:,.0f}", *rates[one].cells()]
        table.rows.append(row(one.name, one.mean_bytes, cells))
    return table


def step_table(
    encoder: FrozenEncoder, y: torch.Tensor, pixels: torch.Tensor, jpegs: list[bytes]
) -> Table:
    """What a smaller step costs and gives."""
    table = Table(
        "Quantisation steps, int8 where at most 1e-4 of the symbols saturate; PSNR of the 8-bit "
        "reconstruction against the view, mean over views",
        ("step", "dtype", "bound, bytes", "zstd 1, bytes", "zstd 1 of the bound", "PSNR, dB"),
    )

    def decoded(y_hat: torch.Tensor) -> float:
        parts = zip(y_hat.split(BATCH), pixels.split(BATCH), strict=True)
        return mean_psnr([(to_pixels(encoder.decode(part)), seen) for part, seen in parts])

    for step in STEPS:
        symbols = stored_symbols(encoder, y, step)
        bound = rate_bound(encoder, symbols, step)
        kind = str(symbols.dtype).removeprefix("torch.")
        size = way("", symbols.numpy(), Zstd(level=1, checksum=True)).mean_bytes
        psnr = decoded(encoder.dequantize(symbols, step=step))
        table.rows.append(
            [f"{step:g}", kind, f"{bound:,.0f}", f"{size:,.0f}", f"{size / bound:.3f}",
             f"{psnr:.2f}"]
        )  # fmt: skip
    table.rows.append(["none: y itself", "float32", "-", "-", "-", f"{decoded(y):.2f}"])
    mean_bytes = float(np.mean([len(data) for data in jpegs]))
    quality = mean_psnr(
        [(unjpeg(data)[None], view[None]) for data, view in zip(jpegs, pixels, strict=True)]
    )
    table.rows.append(
        [f"JPEG q{JPEG_QUALITY}", f"{mean_bytes:,.0f} bytes", "-", "-", "-", f"{quality:.2f}"]
    )
    return table


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", type=int, default=256, help="side of a view in pixels")
    parser.add_argument("--weights", type=Path, help="another encoder than the bundled one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)), help="zstd levels")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    report = measure_size(
        Settings(
            images=given.images, count=given.count, size=given.size, weights=given.weights,
            repeats=given.repeats, levels=tuple(int(level) for level in given.levels.split(",")),
        )
    )  # fmt: skip
    report.publish(markdown=given.markdown, path=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
