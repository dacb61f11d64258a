"""`bench_training`: training from the cache, held against its compute alone and the alternatives.

::

    cached          the real loop over the cache
    compute alone   the real loop over one batch that never changes: what no loader can beat
    in the loop     the real loop, the frozen encoder run on the images in every step
    vit_b16         the real loop of the ViT-B/16 it replaces, on the images

All in one process, one after another, with the same settings, device and threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ci2p_cache.bench.machine import matmul_flops, ready_device, synchronise
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import CacheError, UsageError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.online import OnlineLoader
from ci2p_cache.loader.order import Rows
from ci2p_cache.loader.pixels import PixelLoader
from ci2p_cache.loader.resident import ResidentLoader, choose_resident
from ci2p_cache.models.complexity import BASELINE, complexity
from ci2p_cache.models.registry import build_model, model_config
from ci2p_cache.record import Record
from ci2p_cache.training.checkpoint_folder import TrainState
from ci2p_cache.training.inputs import model_config_for, train_and_val
from ci2p_cache.training.optim import make_optimizer
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trainer import Trainer

__all__ = ["TrainReport", "TrainRow", "bench_training"]

_WARMUP_STEPS = 2
_LEAST_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRow(Record):
    """One way of training, measured."""

    name: str
    """cached, compute alone, in the loop, or vit_b16."""
    images_per_second: float
    """Training images, forward, backward and optimiser step, after warm-up."""
    wait_share: float
    """Share of the time that the loop waited for data, 0 to 1."""
    utilisation: float
    """Model FLOPs per second over the measured rate of matrix products, 0 to 1."""
    epoch_seconds: float
    """What an epoch over the train split takes at this rate."""
    steps: int
    """Steps that were timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport(Record):
    """What `bench_training` found."""

    model: str
    """Name of the model."""
    device: str
    """Where it trained."""
    threads: int
    """Threads that torch computed with."""
    precision: str
    """float32 or bf16."""
    batch_size: int
    """Images per step."""
    matmul_flops: float
    """Measured rate of matrix products of this precision on this device, in FLOP per second."""
    rows: tuple[TrainRow, ...]
    """The ways that could be measured, cached first."""
    missing: tuple[str, ...]
    """Which could not, and why."""

    def row(self, name: str) -> TrainRow | None:
        """Returns the row of that name, None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def pays_after(self, encode_seconds: float, name: str) -> float | None:
        """Returns after how many epochs encoding has paid for itself against another way.

        Args:
            encode_seconds: What encoding the train split takes.
            name: The other way.

        Returns:
            Epochs; None where that way was not measured or is no slower.
        """
        cached, other = self.row("cached"), self.row(name)
        if cached is None or other is None or other.epoch_seconds <= cached.epoch_seconds:
            return None
        return encode_seconds / (other.epoch_seconds - cached.epoch_seconds)

    def paid_after(self, encode_rate: float) -> dict[str, float | None]:
        """Returns `pays_after` for each way that does without the cache.

        Args:
            encode_rate: Images per second of stage one.
        """
        cached = self.rows[0]
        seconds = cached.epoch_seconds * cached.images_per_second / encode_rate
        without = [row.name for row in self.rows if row.name not in ("cached", "compute alone")]
        return {name: self.pays_after(seconds, name) for name in without}


def bench_training(
    cache_dir: str | Path,
    *,
    spec: TrainSpec,
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 20.0,
    ways: tuple[str, ...] = ("cached", "compute alone", "in the loop", BASELINE),
    tell: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Measures training with a cache on this machine; nothing is written.

    Args:
        cache_dir: A complete cache; the images it was made of, for the ways that need them.
        spec: Model, batch size and precision, as for `train`.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        threads: Threads that read and decode; None: one per core.
        seconds: How long each way is timed, after two steps of warm-up; three steps at least.
        ways: Which to measure.
        tell: Called with a word on what is being measured.

    Raises:
        UsageError: an argument or a setting cannot be used.
        NotACacheError, IncompleteCacheError, ManifestError: the cache cannot be opened.
        InputDataError: there is nothing to train from.
        ShardError: the cache is damaged.
    """
    cache, place = open_cache(cache_dir), ready_device(device)
    train, _ = train_and_val(cache, spec, Ranks())
    config, latent = model_config_for(cache, spec), cache.fingerprint.latent
    if config.reads != "latents":
        raise UsageError(
            f"{spec.model} reads images; what is measured here is a model on latents against others"
        )
    baseline = model_config(
        BASELINE,
        num_classes=config.num_classes,
        latent_size=latent.height,
        drop_path_rate=spec.drop_path,
    )
    tell("matrix products")
    peak = matmul_flops(place, spec.precision)
    flops = _flops_per_image(spec.model, cache, num_classes=config.num_classes)
    rows, missing = [], []
    for name in ways:
        tell(name)
        try:
            loader = _loader(name, train, spec, place, threads)
        except CacheError as error:
            missing.append(f"{name}: {error}")
            continue
        with loader:
            torch.manual_seed(spec.seed)
            model = build_model(baseline if name == BASELINE else config)
            rate, wait_share, steps = _measure(model.to(place), loader, spec, seconds)
        rows.append(
            TrainRow(
                name=name,
                images_per_second=rate,
                wait_share=wait_share,
                utilisation=rate * flops[name] / peak,
                epoch_seconds=len(train.valid_rows) / rate,
                steps=steps,
            )
        )
    return TrainReport(
        model=spec.model,
        device=str(place),
        threads=torch.get_num_threads(),
        precision=spec.precision,
        batch_size=min(spec.batch_size, len(train.valid_rows)),
        matmul_flops=peak,
        rows=tuple(rows),
        missing=tuple(missing),
    )


def _flops_per_image(model: str, cache: Cache, *, num_classes: int) -> dict[str, int]:
    """Returns what a training step computes by each way: forward, and backward twice as much.

    The frozen encoder is run forward only.
    """
    cost = complexity(
        model,
        size=cache.fingerprint.image.size,
        latent_channels=cache.fingerprint.latent.channels,
        num_classes=num_classes,
    )
    return {
        "cached": 6 * cost.model_macs,
        "compute alone": 6 * cost.model_macs,
        "in the loop": 6 * cost.model_macs + 2 * cost.encoder_macs,
        BASELINE: 6 * cost.baseline_macs,
    }


class _OneBatchLoader(BatchLoader):
    """Hands out the same stored values for ever: what training is like that waits for nothing."""

    def _prepare(self) -> None:
        with LatentLoader(self.split, batch_size=self.batch_size, device=self.device) as loader:
            self._batch = next(iter(loader)).stored

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        return lambda: self._batch[: len(rows)]


def _loader(
    name: str, split: Split, spec: TrainSpec, device: torch.device, threads: int | None
) -> BatchLoader:
    stays, _ = choose_resident(split, device, "auto")
    kinds: dict[str, type[BatchLoader]] = {
        "cached": ResidentLoader if stays else LatentLoader,
        "compute alone": _OneBatchLoader,
        "in the loop": OnlineLoader,
        BASELINE: PixelLoader,
    }
    batch_size = min(spec.batch_size, len(split.valid_rows))
    return kinds[name](
        split,
        batch_size=batch_size,
        seed=spec.seed,
        device=device,
        threads=threads,
        drop_last=True,
        recycle=True,
    )


def _measure(
    model: nn.Module, loader: BatchLoader, spec: TrainSpec, seconds: float
) -> tuple[float, float, int]:
    """Runs the real loop for some time; returns images per second, waiting share and steps."""
    timer = _Timer(loader, seconds)
    Trainer(
        spec=spec,
        model=model,
        optimizer=make_optimizer(model, spec),
        train_loader=loader,
        val_loader=None,
        save=lambda _: None,
        should_stop=timer,
        ranks=Ranks(),
        observer=TrainObserver(),
    ).run(TrainState(run="bench", sums={}))
    return timer.rate, timer.wait_share, timer.steps


class _Timer:
    """Asked after each step whether to stop; times from the end of the warm-up on."""

    def __init__(self, loader: BatchLoader, seconds: float) -> None:
        self.rate = self.wait_share = 0.0
        self.steps = 0
        self._loader = loader
        self._seconds = seconds
        self._begun: tuple[float, float, int] | None = None

    def __call__(self) -> bool:
        loader = self._loader
        done = loader.epoch * len(loader) + loader.step
        if self._begun is None:
            if done >= _WARMUP_STEPS:
                synchronise(loader.device)
                self._begun = time.perf_counter(), loader.waited_seconds, done
            return False
        started, waited, first = self._begun
        steps = done - first
        if steps < _LEAST_STEPS or time.perf_counter() - started < self._seconds:
            return False
        synchronise(loader.device)
        took = time.perf_counter() - started
        self.steps = steps
        self.rate = steps * loader.batch_size / took
        self.wait_share = (loader.waited_seconds - waited) / took
        return True
