"""Bytes of a cached view: against entropy, JPEG and float16; and what packing and decoding cost.

    python -m tests.benchmarks.size IMAGES [--count 200] [--weights FILE] [--tables FILE]

Every figure is a mean over the same views: the centre squares of files spread evenly over the
sorted folder. Packing and decoding are timed on one core from memory, contestants taking turns.
`--tables` is a JSON of an entropy model's `cdf`, `cdf_lengths` and `offset`, as CompressAI has
them: a second table is of symbols drawn from it, each on its own.

Shapes: N views, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import blosc
from numcodecs.blosc import Blosc

import ci2p_cache as cc
from ci2p_cache.cache.codecs import CODECS, FRAMES, ChunkCodec
from ci2p_cache.encoder.frozen import FrozenEncoder, saturate
from ci2p_cache.process import tune_process
from tests.benchmarks.measure import Report, Table, machine, pinned, take_turns
from tests.benchmarks.pictures import JPEG_QUALITY, jpeg, mean_psnr, to_pixels, unjpeg, views

__all__ = ["Settings", "main", "measure_size"]

LEVELS = (1, 2, 3, 5, 7, 9)
FORMAT_1 = "int8, format 1: zstd 1"
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
    tables: Path | None = None
    """Tables of an entropy model to draw symbols from."""
    repeats: int = 5
    levels: tuple[int, ...] = LEVELS


@dataclass(frozen=True, eq=False)
class Stored:
    """One way to store the views: the bytes of each, and how to get the values back."""

    name: str
    chunks: list[bytes]
    encode: Callable[[npt.NDArray[Any]], Any]
    decode: Callable[[bytes, npt.NDArray[np.uint8]], Any]
    values: npt.NDArray[Any]
    """(N, values of a view), what decoding gives."""

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
    symbols = stored_symbols(encoder, y, 1.0).numpy()
    bounds = {
        "entropy bound at step 1": bound,
        "entropy of each channel": channel_entropy(symbols),
        f"the view itself as JPEG q{JPEG_QUALITY}": jpeg_bytes,
    }
    tables = [size_table("Bytes per view", stored, settings, bounds)]
    if settings.tables is not None:
        drawn = drawn_symbols(settings.tables, len(pixels))
        of_tables = symbol_ways(drawn, settings)
        title = f"Bytes per view of symbols drawn from {settings.tables.name}"
        entropy = {"entropy of each channel": channel_entropy(drawn)}
        tables.append(size_table(title, of_tables, settings, entropy))
    tables.append(step_table(encoder, y, pixels, jpegs))
    text = (
        f"{len(pixels)} views of {settings.size} x {settings.size} px, latents "
        f"{tuple(y.shape[1:])}; encoder {encoder.spec.arch} quality {encoder.spec.quality}, "
        f"weights {encoder.spec.weights_sha256[:12]}"
    )
    described = machine(("ci2p-cache", "numpy", "torch", "numcodecs", "zstandard", "pillow"))
    return Report(described, text, tables)


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


def channel_entropy(symbols: npt.NDArray[Any]) -> float:
    """Mean bytes of a view if each channel were coded by its own histogram over all views."""
    bits = 0.0
    for values in symbols.swapaxes(0, 1):
        _, counts = np.unique(values, return_counts=True)
        bits -= float((counts * np.log2(counts / values.size)).sum())
    return bits / 8 / len(symbols)


def drawn_symbols(path: Path, count: int) -> npt.NDArray[np.int8]:
    """int8 (count, M, 16, 16), every symbol drawn on its own from its channel's table."""
    tables, rng = json.loads(path.read_text()), np.random.default_rng(0)
    found = []
    for cdf, length, offset in zip(
        tables["cdf"], tables["cdf_lengths"], tables["offset"], strict=True
    ):
        # The last entry is the escape, for symbols that the table has not.
        weights = np.diff(np.array(cdf[:length], np.float64))[:-1]
        drawn = rng.choice(len(weights), (count, 16, 16), p=weights / weights.sum())
        found.append(np.clip(drawn + offset, -127, 127))
    return np.stack(found, axis=1).astype(np.int8)


FastLz4 = type("FastLz4", (CODECS["lz4"],), {"cname": "lz4"})
"""`lz4` packed by plain lz4."""


def symbol_ways(symbols: npt.NDArray[np.int8], settings: Settings) -> list[Stored]:
    """Symbols as caches hold them, in each codec and level, plain and folded."""
    found = [way(FORMAT_1, symbols, chunk_codec(FRAMES, symbols, 1))]
    kinds: list[tuple[str, type[ChunkCodec]]] = [
        ("zstd", CODECS["zstd"]), ("lz4", CODECS["lz4"]), ("fast lz4", FastLz4),
    ]  # fmt: skip
    for fold, stored_as in ((False, "int8"), (True, "folded")):
        for name, kind in kinds:
            for level in settings.levels if kind is not FastLz4 else settings.levels[-1:]:
                codec = chunk_codec(kind, symbols, level, fold=fold)
                found.append(way(f"{stored_as}, {name} {level}", symbols, codec))
    return [*found, way("int8, none", symbols, chunk_codec(CODECS["none"], symbols, 1))]


def chunk_codec(
    kind: type[ChunkCodec], values: npt.NDArray[Any], level: int, *, fold: bool = False
) -> ChunkCodec:
    return kind(level=level, chunk_bytes=values[0].nbytes, item_bytes=values.itemsize, fold=fold)


def ways_to_store(encoder: FrozenEncoder, y: torch.Tensor, settings: Settings) -> list[Stored]:
    blosc.use_threads = False
    symbols = stored_symbols(encoder, y, 1.0).numpy()
    found = symbol_ways(symbols, settings)
    for shuffle, name in (
        (Blosc.NOSHUFFLE, "no shuffle"), (Blosc.SHUFFLE, "bytes"), (Blosc.BITSHUFFLE, "bits"),
    ):  # fmt: skip
        for codec, level in (("zstd", 2), ("lz4hc", 3)):
            for size in (0, symbols[0].nbytes // 4, symbols[0].nbytes):
                compressor = Blosc(cname=codec, clevel=level, shuffle=shuffle, blocksize=size)
                blocks = f"blocks of {size:,}" if size else "blocks as Blosc likes"
                found.append(
                    way(f"int8, blosc {codec} {level}, {name}, {blocks}", symbols, compressor)
                )
    others = {
        "int16": encoder.quantize(y).to(torch.int16).numpy(),
        "float16": y.to(torch.float16).numpy(),
        "float32": y.numpy(),
    }
    for dtype, values in others.items():
        for name, kind, level in (
            ("format 1: zstd 1", FRAMES, 1), ("zstd 2", CODECS["zstd"], 2),
            ("lz4 3", CODECS["lz4"], 3), ("none", CODECS["none"], 1),
        ):  # fmt: skip
            found.append(way(f"{dtype}, {name}", values, chunk_codec(kind, values, level)))
    return found


def way(name: str, values: npt.NDArray[Any], codec: Any) -> Stored:
    """Stores each view on its own, and makes sure that it comes back."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    # numcodecs' Blosc shuffles by the item size of what it is given.
    encode, decode = codec.encode, codec.decode if isinstance(codec, Blosc) else codec.decode_into
    chunks = [bytes(encode(view)) for view in flat]
    out = np.empty(flat[0].nbytes, np.uint8)
    for chunk, wanted in zip(chunks, flat, strict=True):
        decode(chunk, out)
        if not np.array_equal(out, wanted.view(np.uint8)):
            raise SystemExit(f"{name} gives other values back")
    return Stored(name, chunks, encode, decode, flat)


def size_table(
    title: str, stored: Sequence[Stored], settings: Settings, bounds: dict[str, float]
) -> Table:
    def timed(jobs: Sequence[Callable[[], object]]) -> float:
        """Calls per second on one core."""
        with pinned(1):
            done, started = 0, time.perf_counter()
            while True:
                jobs[done % len(jobs)]()
                done += 1
                spent = time.perf_counter() - started
                if spent >= 0.2:
                    return done / spent

    def packed(one: Stored) -> float:
        return timed([partial(one.encode, view) for view in one.values])

    def decoded(one: Stored) -> float:
        out = np.empty(one.values[0].nbytes, np.uint8)
        return timed([partial(one.decode, chunk, out) for chunk in one.chunks])

    packing, decoding = (take_turns(stored, each, settings.repeats) for each in (packed, decoded))
    first = next(one for one in stored if one.name == FORMAT_1)
    names = [name.removeprefix("the view itself as ") for name in bounds]
    table = Table(
        f"{title}, each compressed on its own; views per second on one core, from memory, median "
        f"of {settings.repeats} repeats, and of those of format 1",
        ("stored as", "bytes", "of format 1", *(f"of the {name}" for name in names),
         "packed views/s", "of format 1's", "decoded views/s", "of format 1's rate", "min", "max"),
    )  # fmt: skip

    def row(name: str, size: float, cells: list[str]) -> list[str]:
        ratios = [f"{size / other:.3f}" for other in (first.mean_bytes, *bounds.values())]
        return [name, f"{size:,.0f}", *ratios, *cells]

    table.rows += [row(name, size, ["-"] * 6) for name, size in bounds.items()]
    for one in stored:
        cells = []
        for rates in (packing, decoding):
            cells += [rates[one].cells()[0], rates[one].over(rates[first]).cells("{:.2f}")[0]]
        cells += decoding[one].over(decoding[first]).cells("{:.2f}")[1:]
        table.rows.append(row(one.name, one.mean_bytes, cells))
    return table


def step_table(
    encoder: FrozenEncoder, y: torch.Tensor, pixels: torch.Tensor, jpegs: list[bytes]
) -> Table:
    """What a smaller step costs and gives."""
    table = Table(
        "Quantisation steps, int8 where at most 1e-4 of the symbols saturate; PSNR of the 8-bit "
        "reconstruction against the view, mean over views",
        ("step", "dtype", "bound, bytes", "zstd 2, bytes", "zstd 2 of the bound", "PSNR, dB"),
    )

    def decoded(y_hat: torch.Tensor) -> float:
        parts = zip(y_hat.split(BATCH), pixels.split(BATCH), strict=True)
        return mean_psnr([(to_pixels(encoder.decode(part)), seen) for part, seen in parts])

    for step in STEPS:
        symbols = stored_symbols(encoder, y, step)
        bound = rate_bound(encoder, symbols, step)
        kind = str(symbols.dtype).removeprefix("torch.")
        stored = symbols.numpy()
        size = way("", stored, chunk_codec(CODECS["zstd"], stored, 2)).mean_bytes
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
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)), help="levels of the codecs")
    parser.add_argument("--tables", type=Path, help="tables of an entropy model")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    report = measure_size(
        Settings(
            images=given.images, count=given.count, size=given.size, weights=given.weights,
            repeats=given.repeats,
            tables=given.tables, levels=tuple(int(level) for level in given.levels.split(",")),
        )
    )  # fmt: skip
    report.publish(markdown=given.markdown, path=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
