"""Both stages on one CUDA device, in under eight minutes: rates, waiting, utilisation, ratios.

    python -m tests.benchmarks.gpu [--images FOLDER] [--json FILE] [--markdown]

Without a folder it generates JPEGs. In this order: g_a alone on images that are on the device; the
whole of stage one, and decoding with g_a at rest; batches out of the cache onto the device; then
training at bf16 (--precision), for each model from the cache, its compute alone, with the encoder
in the loop, and ViT-B/16 from the JPEGs. Utilisation is held against the device's own rate of
matrix products. Everything also runs with --device cpu, for trying it out; the figures are those
of the device.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

import ci2p_cache as cc
from ci2p_cache.bench import (
    TrainReport,
    bench_loading,
    bench_training,
)
from ci2p_cache.machine import checked_device, matmul_flops, synchronise
from ci2p_cache.models.complexity import complexity
from tests.benchmarks.measure import Report, Table, machine
from tests.benchmarks.pictures import SUFFIXES

__all__ = ["Settings", "main", "measure_gpu"]

IN_THE_LOOP = {"vit": 1.15, "vitds": 1.4, "vit_tiny": 3.0, "vitds_tiny": 3.0}
"""Wanted of a cached epoch against the encoder in the loop, on a host of 16 cores."""
OVER_VIT_B16 = 2.5
UTILISATION = {"vit": 0.4}
WAITING = 0.02


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and for how long."""

    images: Path | None = None
    count: int = 2000
    """Images taken of the folder, or generated."""
    size: int = 256
    device: str = "cuda"
    models: tuple[str, ...] = ("vit", "vitds", "vitds_tiny")
    batch_size: int = 256
    precision: Literal["float32", "bf16"] = "bf16"
    """Of training."""
    seconds: float = 12.0
    """Of each way of training; the other parts take a third of it."""


def measure_gpu(settings: Settings) -> Report:
    """Measures it all, in a temporary folder that is removed."""
    device = checked_device(settings.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = _images(settings, folder / "images")
        tables = [_g_a(settings, device), _stage_one(settings, images, folder)]
        tables.append(_loading(settings, folder / "bf16"))
        reports = [
            bench_training(
                folder / "bf16",
                spec=cc.TrainSpec(
                    model=model, batch_size=settings.batch_size, precision=settings.precision
                ),
                device=settings.device,
                seconds=settings.seconds,
                # One ViT-B/16 for all: it is the same for each model.
                ways=("cached", "compute alone", "in the loop", *(("vit_b16",) if not i else ())),
            )
            for i, model in enumerate(settings.models)
        ]
        tables += [_training(reports), _ratios(reports)]
    described = machine(("ci2p-cache", "torch", "compressai", "timm"))
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
    what = "the folder's own" if settings.images else "generated JPEGs"
    return Report(described, f"{settings.count:,} images ({what}), {settings.size} px", tables)


def _images(settings: Settings, folder: Path) -> Path:
    """Copies images into two classes, or makes them: smooth, with grain, 500 x 375 JPEGs."""
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
    if settings.images is not None:
        found = sorted(p for p in settings.images.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise SystemExit("the folder holds no image")
        for i in range(settings.count):
            path = found[i % len(found)]
            shutil.copy(path, folder / "ab"[i % 2] / f"{i:06d}{path.suffix}")
        return folder
    rng = np.random.default_rng(0)
    for i in range(settings.count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 6, (375, 500, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
        image.save(folder / "ab"[i % 2] / f"{i:06d}.jpg", quality=90)
    return folder


def _g_a(settings: Settings, device: torch.device) -> Table:
    table = Table("g_a alone, images on the device", ("precision", "views/s", "utilisation"))
    macs = complexity("vit", size=settings.size).encoder_macs
    on_cuda = device.type == "cuda"
    for precision in ("float32", "tf32", "bf16") if on_cuda else ("float32", "bf16"):
        encoder = cc.load_encoder("bundled", precision=precision, device=device)
        images = torch.rand(settings.batch_size, 3, settings.size, settings.size, device=device)
        rate = _rate(encoder, images, settings.seconds / 3)
        peak = matmul_flops(device, "bf16" if precision == "bf16" else "float32")
        share = f"{2 * macs * rate / peak:.0%}"
        table.rows.append([precision, f"{rate:,.0f}", share])
    if on_cuda:
        table.notes.append("tf32 is held against IEEE float32 products, so it may pass 100 %.")
    return table


def _rate(encoder: cc.FrozenEncoder, images: torch.Tensor, seconds: float) -> float:
    """Returns images per second, after three calls of warm-up."""
    for _ in range(3):
        encoder(images)
    synchronise(images.device)
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        encoder(images)
        synchronise(images.device)
        calls += 1
    return len(images) * calls / (time.perf_counter() - started)


def _stage_one(settings: Settings, images: Path, folder: Path) -> Table:
    table = Table(
        "the whole of stage one, image and mirror",
        ("precision", "images/s", "views/s", "g_a waited", "decoding alone, images/s"),
    )
    for precision in ("float32", "bf16"):
        options = cc.EncodeOptions(
            encoder="bundled", size=settings.size, precision=precision, devices=settings.device,
            val_fraction=0.0,
        )  # fmt: skip
        foretold = cc.dry_run(images, folder / precision, options)
        done = cc.encode(images, folder / precision, options)
        table.rows.append([
            precision,
            f"{done.images_per_second:,.0f}",
            f"{2 * done.images_per_second:,.0f}",
            f"{done.waiting_share:.0%}",
            f"{foretold.decode_images_per_second:,.0f}",
        ])  # fmt: skip
    return table


def _loading(settings: Settings, cache: Path) -> Table:
    found = bench_loading(
        cache, batch_size=settings.batch_size, device=settings.device, seconds=settings.seconds / 12
    )
    table = Table(
        f"batches of {found.batch_size} onto the device", ("what", "threads", "images/s", "GB/s")
    )
    for row in found.rows:
        gigabytes = row.images_per_second * found.bytes_per_image / 1e9
        cells = [row.name, str(row.threads), f"{row.images_per_second:,.0f}", f"{gigabytes:.1f}"]
        table.rows.append(cells)
    if found.note:
        table.notes.append(found.note)
    return table


def _training(reports: Sequence[TrainReport]) -> Table:
    first = reports[0]
    table = Table(
        f"training at {first.precision}, batches of {first.batch_size} "
        f"({first.matmul_flops / 1e12:.1f} TFLOP/s of matrix products)",
        ("model", "way", "images/s", "utilisation", "waiting"),
    )
    for report in reports:
        for row in report.rows:
            table.rows.append([
                report.model if row.name != "vit_b16" else row.name,
                row.name if row.name != "vit_b16" else "from JPEGs",
                f"{row.images_per_second:,.1f}",
                f"{row.utilisation:.0%}",
                f"{row.wait_share:.1%}",
            ])  # fmt: skip
    return table


def _ratios(reports: Sequence[TrainReport]) -> Table:
    table = Table("what is wanted", ("model", "what", "found", "wanted", "holds"))
    baseline = reports[0].row("vit_b16")
    for report in reports:
        cached, online = report.row("cached"), report.row("in the loop")
        assert cached is not None, "it needs nothing that could be missing"
        found: list[tuple[str, float, float | None, bool]] = [
            ("waiting", cached.wait_share, WAITING, False)
        ]
        if report.model in UTILISATION:
            wanted = UTILISATION[report.model]
            found.append(("utilisation, cached", cached.utilisation, wanted, True))
        if online is not None:
            ratio = cached.images_per_second / online.images_per_second
            found.append(("cached over in the loop", ratio, IN_THE_LOOP.get(report.model), True))
        if baseline is not None:
            ratio = cached.images_per_second / baseline.images_per_second
            found.append(("cached over ViT-B/16 from JPEGs", ratio, OVER_VIT_B16, True))
        for what, value, wanted_value, at_least in found:
            wish, holds = "", ""
            if wanted_value is not None:
                wish = f"{'>=' if at_least else '<='} {wanted_value:g}"
                holds = "yes" if (value >= wanted_value) == at_least else "NO"
            table.rows.append([report.model, what, f"{value:.3g}", wish, holds])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; without one they are made")
    parser.add_argument("--count", type=int, default=default.count)
    parser.add_argument("--size", type=int, default=default.size)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--models", nargs="+", default=list(default.models))
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--precision", choices=("float32", "bf16"), default=default.precision)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    given = vars(parser.parse_args(arguments))
    path, markdown = given.pop("json"), given.pop("markdown")
    given["models"] = tuple(given["models"])
    measure_gpu(Settings(**given)).publish(markdown=markdown, path=path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
