"""How far the validation that a run shows is from what its weights reach: `short_runs.py`.

Trains `vitds_tiny` for a few lengths and seeds, and holds the accuracy and loss of each run's last
epoch against those of the same weights with BatchNorm statistics of the whole train split, from
torch's own `update_bn`. Tells also what estimating the statistics costs of an epoch, and, with
`--draws`, how far the accuracy strays with statistics of fewer samples.

    python -m tests.benchmarks.short_runs IMAGES --epochs 1,2,5,20
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ci2p_cache as cc
from ci2p_cache.training.checkpoint import weights_of
from ci2p_cache.training.metrics import opened_statistics, validate
from ci2p_cache.training.ranks import Ranks
from tests.support.fresh import fresh_model

ALL = 2**40
"""As many samples as there are."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run; accuracies in percent."""

    epochs: int
    seed: int
    shown: float
    fresh: float
    shown_loss: float
    fresh_loss: float
    share: float | None
    """Of an epoch's time that the estimate took, in percent."""


def main() -> None:
    """Prints a row for each run, and with `--json` writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--cache", type=Path, help="where the cache is or will be")
    parser.add_argument("--runs", type=Path, help="where the runs are or will be")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--model", default="vitds_tiny")
    parser.add_argument("--epochs", default="1,2,5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--draws", type=int, default=0, help="random sets for each sample count")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = options.cache or Path(folder) / "cache"
        if not cache_dir.exists():
            encode = cc.EncodeOptions(encoder="bundled", size=options.size)
            cc.encode(options.images, cache_dir, encode)
        rows = []
        print("| epochs | seed | shown % | fresh % | shown loss | fresh loss | % of an epoch |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for row in runs(cache_dir, options.runs or Path(folder) / "runs", options):
            share = "" if row.share is None else f"{row.share:.1f}"
            print(
                f"| {row.epochs} | {row.seed} | {row.shown:.1f} | {row.fresh:.1f} "
                f"| {row.shown_loss:.3f} | {row.fresh_loss:.3f} | {share} |",
                flush=True,
            )
            rows.append(dataclasses.asdict(row))
        if options.json:
            options.json.write_text(json.dumps(rows))


def runs(cache_dir: Path, runs_dir: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Trains and validates, run by run."""
    cache = cc.open_cache(cache_dir)
    for epochs in map(int, options.epochs.split(",")):
        for seed in range(options.seeds):
            spec = cc.TrainSpec(
                model=options.model, epochs=epochs, batch_size=options.batch_size, seed=seed,
                ema=options.ema,
            )  # fmt: skip
            summary = cc.train(cache_dir, spec=spec, runs_dir=runs_dir, device="cpu")
            weights = weights_of(Path(summary.last_checkpoint))
            model = fresh_model(cache, spec, weights, samples=ALL)
            fresh, fresh_loss = scores(model, cache["val"])
            if options.draws:
                tell_draws(cache, spec, weights, draws=options.draws)
            last = summary.last
            assert last.val_top1 is not None
            assert last.val_loss is not None
            yield Row(
                epochs=epochs, seed=seed, shown=100 * last.val_top1, fresh=fresh,
                shown_loss=last.val_loss, fresh_loss=fresh_loss,
                share=share_of_epoch(cache["train"], spec, model, last.epoch_seconds),
            )  # fmt: skip


def scores(model: nn.Module, split: cc.Split) -> tuple[float, float]:
    """Returns top-1 in percent and the mean loss over a split."""
    with cc.LatentLoader(split, batch_size=64, shuffle=False, views=0) as loader:
        found = validate(model, loader, precision="float32", should_stop=lambda: False)
    assert found is not None
    return 100 * found.top1, found.loss


def share_of_epoch(
    train: cc.Split, spec: cc.TrainSpec, model: nn.Module, seconds: float
) -> float | None:
    """Returns what an estimate takes of an epoch's seconds, in percent; None without BatchNorm."""
    models = [model] if not spec.ema else [model, model]
    took = []
    with opened_statistics(
        models, train, spec, device=torch.device("cpu"), reads="latents", threads=None,
        ranks=Ranks(),
    ) as estimated:  # fmt: skip
        for _ in range(5):
            if estimated is None:
                return None
            started = time.perf_counter()
            estimated.estimate()
            took.append(time.perf_counter() - started)
    return 100 * statistics.median(took) / seconds


def tell_draws(
    cache: cc.Cache, spec: cc.TrainSpec, weights: dict[str, torch.Tensor], *, draws: int
) -> None:
    """Prints how accuracy and loss stray with statistics of random sets of samples."""
    for samples in (32, 64, 128, 256, 512):
        drawn = [
            scores(
                fresh_model(cache, dataclasses.replace(spec, seed=1000 + draw), weights,
                            samples=samples),
                cache["val"],
            )
            for draw in range(draws)
        ]  # fmt: skip
        top1, loss = np.array(drawn).T
        print(
            f"<!-- {samples} samples: top-1 {top1.mean():.1f} +- {top1.std():.1f} %, "
            f"loss {loss.mean():.3f} +- {loss.std():.3f} -->",
            flush=True,
        )


if __name__ == "__main__":
    main()
