"""Cross-validation of configurations: a run per fold, and every image validated once.

::

    source --> a cache per way of encoding --> a run per configuration and fold
                                                   --> which images its last weights classify right
                                                       --> Configuration, a row of the study

Stone, "Cross-validatory choice and assessment of statistical predictions", 1974.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import open_cache
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.encoding.run import encode
from ci2p_cache.experiment.comparison import Configuration, StudySettings
from ci2p_cache.inference.evaluation import EVALUATIONS
from ci2p_cache.inference.prediction_rows import keys_of
from ci2p_cache.inference.run_folder import load_model, open_run
from ci2p_cache.inference.scoring import evaluate
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.machine import checked_device
from ci2p_cache.models.complexity import complexity
from ci2p_cache.training.inputs import train_and_val
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainSummary
from ci2p_cache.training.run import train
from ci2p_cache.training.spec import TrainSpec

__all__ = ["CrossValidation", "Plan", "StudyObserver"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One configuration: how it differs from what all start from."""

    what: str
    """In a few words."""
    encode: dict[str, Any] = field(default_factory=dict)
    """Fields of `EncodeOptions`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainSpec`."""
    is_online: bool = False
    """Whether the encoder is in the loop."""


class StudyObserver:
    """Gives the observers of what runs, each for one block; the base class gives none."""

    def encoding(self, name: str) -> AbstractContextManager[EncodeObserver | None]:
        """Returns the block in which a cache is made, `name` its folder."""
        return nullcontext()

    def training(self, name: str) -> AbstractContextManager[TrainObserver | None]:
        """Returns the block in which a fold is trained, `name` says which."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """Where a study is and what its configurations share; run again, it continues."""

    source: Path
    """The images, a folder per class."""
    out: Path
    """Folder of its caches and runs."""
    settings: StudySettings
    """What all configurations share."""
    base: Plan
    """What every configuration starts from."""
    device: str
    """auto, cpu, cuda or cuda:1, of both stages; auto leaves stage one to its own default."""
    observer: StudyObserver = field(default_factory=StudyObserver)
    """Shows what runs."""

    def encode_options(self, plan: Plan, **changes: Any) -> EncodeOptions:
        """Returns how the cache of a configuration is made.

        Args:
            plan: The configuration.
            changes: Fields that differ from it.
        """
        fields = {**self.base.encode, "size": self.settings.size, "val_fraction": 0.0}
        return EncodeOptions(**{**fields, **plan.encode, "seed": self.settings.seed, **changes})

    def spec(self, plan: Plan, fold: int) -> TrainSpec:
        """Returns how a fold of a configuration is trained, 0 <= fold < folds."""
        shared = self.settings
        fields = {**self.base.train, "epochs": shared.epochs, "batch_size": shared.batch_size}
        fields |= {"lr": shared.lr, "seed": shared.seed, "folds": shared.folds, "fold": fold}
        return TrainSpec(**{**fields, **plan.train})

    def cache_dir(self, options: EncodeOptions) -> Path:
        """Returns where a cache is; configurations that only train otherwise share one."""
        name = f"{options.dtype}-step{options.step:g}-{options.views.replace(':', '')}"
        return self.out / "caches" / f"{name}-{options.size}"

    def run_dir(self, name: str, fold: int) -> Path:
        """Returns the run folder of a fold of the configuration `name`."""
        size, epochs = self.settings.size, self.settings.epochs
        return self.out / "runs" / f"{name}-{size}-{epochs}ep-fold{fold}"

    def encode(self, plan: Plan) -> EncodeSummary:
        """Makes the caches of a configuration, or finds them made.

        Crops are trained from and whole images validated, so crops take two caches.

        Returns:
            Of the cache that is trained from.

        Raises:
            CacheError: whatever `encode` raises.
        """
        options = self.encode_options(plan)
        if options.views.startswith("crops"):
            self._encode(self.encode_options(plan, views="none"))
        return self._encode(options)

    def _encode(self, options: EncodeOptions) -> EncodeSummary:
        out = self.cache_dir(options)
        if self.device != "auto":
            options = dataclasses.replace(options, devices=self.device)
        with self.observer.encoding(out.name) as observer:
            return encode(self.source, out, options, observer=observer)

    def train(self, name: str, plan: Plan, fold: int) -> TrainSummary:
        """Trains one fold of one configuration, or finds it trained; its cache is complete.

        Args:
            name: Of the configuration.
            plan: What it is.
            fold: The part that is left out.

        Raises:
            CacheError: whatever `train` raises.
        """
        spec, cache_dir = self.spec(plan, fold), self.cache_dir(self.encode_options(plan))
        run = self.run_dir(name, fold)
        with ExitStack() as stack:
            loader = None
            if plan.is_online:
                # Only here: it encodes.
                from ci2p_cache.loader.online import OnlineLoader

                split, _ = train_and_val(open_cache(cache_dir), spec, Ranks())
                loader = stack.enter_context(
                    OnlineLoader(
                        split,
                        batch_size=spec.batch_size,
                        seed=spec.seed,
                        device=checked_device(self.device),
                    )
                )
            return train(
                cache_dir,
                spec=spec,
                runs_dir=run.parent,
                name=run.name,
                device=self.device,
                loader=loader,
                observer=stack.enter_context(self.observer.training(f"{name} fold {fold}")),
            )

    def collect(
        self, name: str, plan: Plan, summaries: Sequence[TrainSummary], *, command: str
    ) -> tuple[tuple[str, ...], Configuration]:
        """Validates all folds of a trained configuration.

        Args:
            name: Of the configuration.
            plan: What it is.
            summaries: What training each fold ended with.
            command: What makes this row again.

        Returns:
            The keys of all images, sorted, and the row of the study.

        Raises:
            CacheError: whatever `evaluate` raises.
        """
        right: dict[str, bool] = {}
        for fold in range(self.settings.folds):
            right |= self._classified(name, plan, fold)
        keys = tuple(sorted(right))
        bits = np.asarray([right[key] for key in keys])
        spec, made = self.spec(plan, 0), self.encode(plan)
        cost = complexity(spec.model, size=self.settings.size, num_classes=made.classes)
        is_cached = not plan.is_online and cost.encoder_parameters > 0
        row = Configuration(
            name=name,
            what=plan.what,
            model=spec.model,
            bits=Configuration.pack(bits),
            samples=len(bits),
            correct=int(bits.sum()),
            seconds_per_epoch=statistics.median(s for each in summaries for s in _seconds(each)),
            bytes_per_view=made.cache_bytes / made.views if is_cached else None,
            gmac=(cost.macs if plan.is_online else cost.model_macs) / 1e9,
            device=summaries[0].device,
            command=command,
        )
        return keys, row

    def _classified(self, name: str, plan: Plan, fold: int) -> dict[str, bool]:
        """Returns which images of a fold the last weights classify right, by key."""
        run, options = self.run_dir(name, fold), self.encode_options(plan)
        cache_dir = self.cache_dir(options)
        if not options.views.startswith("crops"):
            made = evaluate(run, cache=cache_dir, checkpoint="last", device=self.device)
            path = run / EVALUATIONS / made.predictions.path
            table = pq.read_table(path, columns=["key", "correct"])
            return dict(zip(table["key"].to_pylist(), table["correct"].to_pylist(), strict=True))
        # The first view of such a cache is a crop like the others; whole images are in another.
        _, val = train_and_val(open_cache(cache_dir), self.spec(plan, fold), Ranks())
        assert val is not None
        whole = open_cache(self.cache_dir(self.encode_options(plan, views="none")))["train"]
        return self._classified_whole(run, whole, set(keys_of(val).values()))

    @torch.inference_mode()
    def _classified_whole(self, run: Path, split: Split, keys: set[str]) -> dict[str, bool]:
        """Classifies those images of another cache by the last weights of a run."""
        device = checked_device(self.device)
        model = load_model(open_run(run, checkpoint="last"), device)
        key_of = keys_of(split)
        rows = np.asarray(sorted(row for row, key in key_of.items() if key in keys))
        found: dict[str, bool] = {}
        with LatentLoader(
            split.subset(rows), batch_size=self.settings.batch_size, device=device, shuffle=False,
            views=0,
        ) as loader:  # fmt: skip
            for batch in loader:
                latents = batch.latents.contiguous(memory_format=torch.channels_last)
                right = (model(latents).argmax(1) == batch.labels).tolist()
                found |= {key_of[r]: x for r, x in zip(batch.rows.tolist(), right, strict=True)}
        return found


def _seconds(summary: TrainSummary) -> list[float]:
    """Returns the seconds of training of each epoch of a run."""
    with (Path(summary.path) / "summary.csv").open(newline="") as file:
        return [int(r["images"]) / float(r["images_per_second"]) for r in csv.DictReader(file)]
