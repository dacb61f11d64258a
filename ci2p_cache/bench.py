"""`ci2p-cache bench`: what this machine does with the user's own data; measured, never assumed.

::

    bench_encoding   a sample really encoded; g_a alone on one batch; reading and decoding alone
    bench_loading    batches out of a cache, in the random order of training
    bench_training   the real loop from the cache; over one batch; with the encoder in the loop; and
                     that of the ViT-B/16 it replaces, on the images

All run in one process, one after another, with the same settings, device and threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.encoding.forecast import DryRunReport, dry_run
from ci2p_cache.encoding.intent import load_chosen
from ci2p_cache.encoding.options import BATCH_SIZES, EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.encoding.shard import Replica, make_replicas, refuse_other_decoder, single_threaded
from ci2p_cache.errors import CacheError, UsageError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.order import Rows
from ci2p_cache.loader.pixels import OnlineLoader, PixelLoader
from ci2p_cache.loader.resident import ResidentLoader, choose_resident
from ci2p_cache.machine import checked_device, matmul_flops, num_cores, synchronise
from ci2p_cache.models.complexity import BASELINE, complexity
from ci2p_cache.models.registry import build_model, model_config
from ci2p_cache.record import Record
from ci2p_cache.training.checkpoint import TrainState
from ci2p_cache.training.inputs import model_config_for, train_and_val
from ci2p_cache.training.optim import make_optimizer
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trainer import Trainer

__all__ = [
    "EncodeReport", "TrainReport", "bench_encoding", "bench_loading", "bench_training",
    "encode_rate",
]  # fmt: skip

_REPEATS, _WARMUP_STEPS, _LEAST_STEPS = 5, 2, 3  # of loading; of training


@dataclass(frozen=True, slots=True)
class EncodeRow(Record):
    """A part of stage one, whole, g_a or decoding: images per second, with all their views."""

    name: str
    images_per_second: float
    views_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeReport(Record):
    """What `bench_encoding` found; `waiting_share` is g_a's, of the time; `bytes_` are written."""

    source: str
    device: str
    precision: str
    views_per_image: int
    batch_size: int
    rows: tuple[EncodeRow, ...]
    waiting_share: float
    bytes_per_image: float


def bench_encoding(
    source: str | Path,
    options: EncodeOptions | None = None,
    *,
    seconds: float = 5.0,
    observer: EncodeObserver | None = None,
) -> EncodeReport:
    """Measures stage one with images of a source, as `dry_run` does and with its errors.

    All images count as training images, so that each has all views.

    Args:
        source: As for `encode`.
        options: As for `encode`; `seed` draws the sample.
        seconds: How long g_a alone is timed; the whole takes some 10 s, decoding 2.
        observer: Receives progress and notices.
    """
    options, observer = options or EncodeOptions(), observer or EncodeObserver()
    whole = _sample(source, options, observer)
    views = options.view_spec().num_views("train")
    replicas = make_replicas(load_chosen(options, observer), options.devices)
    kind = replicas[0].device.type
    batch_size = options.batch_size or BATCH_SIZES[kind]
    g_a = _g_a_alone(replicas, batch_size, options.size, seconds) / views
    rates = {"whole": whole.images_per_second, "g_a": g_a}
    rates["decoding"] = whole.decode_images_per_second
    return EncodeReport(
        source=whole.source, device=f"{kind}, {len(replicas)} replicas",
        precision=options.precision, views_per_image=views, batch_size=batch_size,
        rows=tuple(EncodeRow(name, rate, views * rate) for name, rate in rates.items() if rate),
        waiting_share=1 - whole.encoder_share, bytes_per_image=whole.bytes_per_image,
    )  # fmt: skip


def encode_rate(cache: Cache, *, device: str = "auto") -> float:
    """Measures making a cache anew, with its own encoder and settings, in images per second.

    Raises:
        FingerprintMismatchError: this machine decodes with other software, of another speed.
        CacheError: as `dry_run` has them; the images have to be where they were.
    """
    refuse_other_decoder(cache.fingerprint)
    options = EncodeOptions.of(cache.manifest)
    options = replace(
        options,
        # The levels of format 1 are other ones.
        level=None if cache.manifest.format_version == 1 else options.level,
        weights=cache.encoder_path,
        devices=device,
        max_errors="100%",
    )
    return _sample(cache.manifest.source, options, EncodeObserver()).images_per_second


def _sample(source: str | Path, options: EncodeOptions, observer: EncodeObserver) -> DryRunReport:
    options = replace(options, val_fraction=0.0, labels="none")
    with tempfile.TemporaryDirectory(prefix="ci2p-cache-bench-") as folder:
        return dry_run(source, Path(folder) / "cache", options, observer=observer)


def _g_a_alone(replicas: list[Replica], batch_size: int, size: int, seconds: float) -> float:
    """Returns views per second of all replicas together, each on a batch in its device's memory."""
    threads = torch.get_num_threads()
    views_B3HW = torch.full((batch_size, 3, size, size), 0.5)

    def rate(replica: Replica) -> float:
        batch, done = views_B3HW.to(replica.device, memory_format=torch.channels_last), 0
        with replica.queue():
            replica.encoder(batch).cpu()
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                # Only a byte is fetched, to know that the batch is done.
                replica.encoder(batch)[0, 0, 0, 0].cpu()
                done += batch_size
        return done / (time.perf_counter() - started)

    with ThreadPoolExecutor(len(replicas), "replica", single_threaded) as pool:
        total = sum(pool.map(rate, replicas))
    torch.set_num_threads(threads)
    return total


@dataclass(frozen=True, slots=True)
class LoaderRow(Record):
    """A way of loading with so many threads: images per second, the median over the repeats."""

    name: str
    threads: int
    images_per_second: float
    slowest: float
    fastest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderReport(Record):
    """What `bench_loading` found; `note` says whether the split would stay in memory, and why."""

    device: str
    batch_size: int
    bytes_per_image: int
    rows: tuple[LoaderRow, ...]
    note: str


def bench_loading(
    cache_dir: str | Path,
    *,
    batch_size: int = 128,
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 3.0,
) -> LoaderReport:
    """Measures reading the train split in random order; nothing is written.

    A round of all ways that does not count comes first; it leaves in the page cache what fits.

    Args:
        cache_dir: A complete cache.
        batch_size: Images per batch.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        threads: Threads that read; None: one per core.
        seconds: How long each of the five repeats of each way is timed.

    Raises:
        CacheError: as `open_cache` and `LatentLoader` have them.
    """
    cache, used = open_cache(cache_dir), checked_device(device)
    split = cache["train" if "train" in cache else cache.splits[0]]
    most = threads or num_cores()
    stays, note = choose_resident(split, used, "auto")
    stored, floats = f"{split.latent.dtype}, as stored", "float32, dequantised"
    ways: list[tuple[str, int, type[BatchLoader]]] = [
        (stored, 1, LatentLoader), (stored, most, LatentLoader), (floats, most, LatentLoader)
    ]  # fmt: skip
    ways += [(f"{stored}, resident", most, ResidentLoader)] if stays else []
    with ExitStack() as stack:
        loaders = [
            kind(split, batch_size=batch_size, device=used, threads=count, recycle=True)
            for _, count, kind in ways
        ]
        for loader in loaders:
            stack.enter_context(loader)
        rounds = [
            [_loader_rate(loader, floats=way[0] == floats, seconds=seconds)
             for loader, way in zip(loaders, ways, strict=True)]
            for _ in range(_REPEATS + 1)
        ]  # fmt: skip
    rows = (
        LoaderRow(name, count, median(rates), min(rates), max(rates))
        for (name, count, _), *rates in zip(ways, *rounds[1:], strict=True)
    )
    return LoaderReport(
        device=str(used), batch_size=batch_size, bytes_per_image=split.latent.num_bytes,
        rows=tuple(rows), note=note,
    )  # fmt: skip


def _loader_rate(loader: BatchLoader, *, floats: bool, seconds: float) -> float:
    """Returns images per second over some time, continuing where the last call left off."""
    images, started = 0, time.perf_counter()
    loader.load_state_dict(loader.state_dict())
    while True:
        for batch in loader:
            images += len(batch.rows)
            if floats:
                _ = batch.latents
            if time.perf_counter() - started >= seconds:
                synchronise(loader.device)
                return images / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class TrainRow(Record):
    """A way of training, timed over some steps after the warm-up; `epoch_seconds` at its rate.

    `utilisation`: the model's FLOPs per second over the measured rate of matrix products.
    """

    name: str
    images_per_second: float
    wait_share: float
    utilisation: float
    epoch_seconds: float
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport(Record):
    """What `bench_training` found: the ways that could be measured, cached first, and the others.

    `threads` are torch's; `matmul_flops` is the measured rate of matrix products, per second.
    """

    model: str
    device: str
    threads: int
    precision: str
    batch_size: int
    matmul_flops: float
    rows: tuple[TrainRow, ...]
    missing: tuple[str, ...]

    def row(self, name: str) -> TrainRow | None:
        """Returns the row of that name, None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def paid_after(self, encode_rate: float) -> dict[str, float | None]:
        """Returns after how many epochs encoding has paid, at that many images per second.

        For each way that does without the cache; None where it is no slower.
        """
        cached, *others = self.rows
        seconds = cached.epoch_seconds * cached.images_per_second / encode_rate
        saved = {row.name: row.epoch_seconds - cached.epoch_seconds for row in others}
        saved.pop("compute alone", None)
        return {name: seconds / each if each > 0 else None for name, each in saved.items()}


def bench_training(
    cache_dir: str | Path,
    *,
    spec: TrainSpec,
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 20.0,
    ways: tuple[str, ...] = ("cached", "compute alone", "in the loop", BASELINE),
    notify: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Measures training with a cache on this machine; nothing is written.

    Args:
        cache_dir: A complete cache; the images it was made of, for the ways that need them.
        spec: Model, batch size and precision, as for `train`.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        threads: Threads that read and decode; None: one per core.
        seconds: How long each way is timed, after two steps of warm-up; three steps at least.
        ways: Which to measure.
        notify: Called with a word on what is being measured.

    Raises:
        UsageError: the model reads images.
        CacheError: as `train` has them.
    """
    cache, used = open_cache(cache_dir), checked_device(device)
    train, _ = train_and_val(cache, spec, Ranks())
    config = model_config_for(cache, spec)
    if config.reads != "latents":
        raise UsageError(
            f"{spec.model} reads images; what is measured here is a model on latents against others"
        )
    baseline = model_config(
        BASELINE, num_classes=config.num_classes, latent_size=cache.fingerprint.latent.height,
        drop_path_rate=spec.drop_path,
    )  # fmt: skip
    loaders = _loaders(train, spec.model, used)
    notify("matrix products")
    peak = matmul_flops(used, spec.precision)
    batch_size = min(spec.batch_size, len(train.valid_rows))
    rows, missing = [], []
    for name in ways:
        notify(name)
        kind, flops = loaders[name]
        try:
            loader = kind(
                train, batch_size=batch_size, seed=spec.seed, device=used, threads=threads,
                drop_last=True, recycle=True,
            )  # fmt: skip
        except CacheError as error:
            missing.append(f"{name}: {error}")
            continue
        with loader:
            torch.manual_seed(spec.seed)
            own = baseline if name == BASELINE else config
            rate, waited, steps = _timed(build_model(own), loader, spec, seconds)
        epoch_seconds = len(train.valid_rows) / rate
        rows.append(TrainRow(name, rate, waited, rate * flops / peak, epoch_seconds, steps))
    return TrainReport(
        model=spec.model, device=str(used), threads=torch.get_num_threads(),
        precision=spec.precision, batch_size=batch_size, matmul_flops=peak,
        rows=tuple(rows), missing=tuple(missing),
    )  # fmt: skip


def _loaders(
    split: Split, model: str, device: torch.device
) -> dict[str, tuple[type[BatchLoader], int]]:
    """Returns each way's loader, and the FLOPs of a step per image: the encoder's forward only."""
    stays, _ = choose_resident(split, device, "auto")
    cost = complexity(
        model, size=split.cache.fingerprint.image.size, latent_channels=split.latent.channels,
        num_classes=len(split.cache.classes),
    )  # fmt: skip
    return {
        "cached": (ResidentLoader if stays else LatentLoader, 6 * cost.model_macs),
        "compute alone": (_OneBatchLoader, 6 * cost.model_macs),
        "in the loop": (OnlineLoader, 6 * cost.model_macs + 2 * cost.encoder_macs),
        BASELINE: (PixelLoader, 6 * cost.baseline_macs),
    }


class _OneBatchLoader(BatchLoader):
    """Hands out the same stored values for ever: what training is like that waits for nothing."""

    def _prepare(self) -> None:
        with LatentLoader(self.split, batch_size=self.batch_size, device=self.device) as loader:
            self._batch = next(iter(loader)).stored

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        return lambda: self._batch[: len(rows)]


def _timed(
    model: nn.Module, loader: BatchLoader, spec: TrainSpec, seconds: float
) -> tuple[float, float, int]:
    """Runs the real loop for some time; returns images/s, share of waiting, steps after warm-up."""
    marks: list[tuple[int, float, float]] = []

    def is_over() -> bool:
        done, now = loader.epoch * len(loader) + loader.step, time.perf_counter()
        first, since, _ = marks[0] if marks else (_WARMUP_STEPS - _LEAST_STEPS, float("-inf"), 0)
        if done < first + _LEAST_STEPS or now - since < seconds:
            return False
        synchronise(loader.device)
        marks.append((done, time.perf_counter(), loader.waited_seconds))
        return len(marks) > 1

    model = model.to(loader.device)
    Trainer(
        spec=spec, model=model, optimizer=make_optimizer(model, spec), train_loader=loader,
        val_loader=None, save=lambda _: None, should_stop=is_over, ranks=Ranks(),
        observer=TrainObserver(),
    ).run(TrainState(run="bench", sums={}))  # fmt: skip
    # The loop asks more than once whether it is over.
    steps, took, waited = (after - before for before, after in zip(*marks[:2], strict=True))
    return steps * loader.batch_size / took, waited / took, int(steps)
