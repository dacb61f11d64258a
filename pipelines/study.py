"""The study: what each choice costs in accuracy, by cross-validation over every image.

Paper:    Stone 1974 (cross-validation), Efron 1979 (bootstrap). The choices are those of Zhao and
          Sun, arXiv 2502.10120, and of this project's defaults.
Command:  python pipelines/study.py flowers/ --jobs 2          all configurations
          python pipelines/study.py flowers/ --only a-int8     one of them
          python pipelines/study.py flowers/ --table           print the table, run nothing
Hours:    not measured as a whole. By arithmetic from the speed of single steps on one core (96 px):
          62 images/s with vitds_tiny, so 14 minutes for each of nine cached configurations; 30 with
          the encoder in the loop, 17 for vit_tiny, 20 to 35 for vit_ti16, 45 to 90 for
          cnn_vit_tiny. Together 4 to 5 hours of one core, half of that with --jobs 2 on two.
Disk:     up to 16 GB of checkpoints, 230 MB for each of 65 runs; the caches take 0.2 GB.
Hardware: two CPU cores; `--device cuda --size 256 --epochs 30` where there is a GPU (not tried).
Expect:   pipelines/README.md has the table, or says that a row was not run.

Every configuration is trained once for each of five folds, from the same seed, for the same epochs,
and the weights of the last epoch classify the images of the fold that was left out. So each image
is validated once. Two configurations are compared image by image: the interval is the middle 95 %
of the differences in 10,000 draws of the images with replacement, which covers the choice of the
images and not that of the seed: two runs that differ in the seed alone differ too.

Each fold is a run folder of its own below --out, and goes on like any other. RESULTS.csv is the
table; RESULTS.json holds for each configuration which images it classified right, so that anyone
can draw the intervals again. Not in it: quality 1 to 8, which needs weights that could not be
fetched where this was written; see codec_sweep.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

import ci2p_cache as cc
from ci2p_cache.cli import render
from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
from ci2p_cache.errors import CacheError, InterruptedRunError, UsageError
from ci2p_cache.experiment.comparison import (
    Configuration,
    Study,
    StudySettings,
    paired_difference,
    read_study,
    refuse_other_settings,
    with_configuration,
    write_study,
)
from ci2p_cache.inference.run_folder import load_model, open_run
from ci2p_cache.machine import checked_device
from ci2p_cache.training.inputs import train_and_val
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainSummary

REFERENCE = "a-int8"
"""What every configuration is compared with: the defaults, with the tiny ds model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One configuration: how it differs from the reference."""

    what: str
    """In a few words."""
    encode: dict[str, Any] = field(default_factory=dict)
    """Fields of `EncodeOptions`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainSpec`."""
    is_online: bool = False
    """Whether the encoder is in the loop."""


PLANS: dict[str, Plan] = {
    "a-seed1": Plan(what="the reference from another seed: what chance does", train={"seed": 1}),
    "a-float32": Plan(what="float32 y", encode={"dtype": "float32"}),
    "a-float16": Plan(what="float16 y, the paper's", encode={"dtype": "float16"}),
    "a-int8": Plan(what="int8 symbols, image + mirror, cached, vitds_tiny: the defaults"),
    "a-step0.5": Plan(what="int16 symbols, step 0.5", encode={"dtype": "int16", "step": 0.5}),
    "a-step2": Plan(what="int8 symbols, step 2", encode={"step": 2.0}),
    "b-none": Plan(what="the image alone", encode={"views": "none"}),
    "b-latentflip": Plan(
        what="the image, its latents mirrored half the time: wrong, to show it",
        encode={"views": "none"},
        train={"latent_flip": 0.5},
    ),
    "b-crops4": Plan(what="four random-resized crops", encode={"views": "crops:4"}),
    "c-online": Plan(what="the encoder in the loop", is_online=True),
    "d-vit_tiny": Plan(what="CI2P-ViT, tiny", train={"model": "vit_tiny"}),
    "d-vit_ti16": Plan(what="ViT-Ti/16 on images", train={"model": "vit_ti16"}),
    "d-cnn_vit_tiny": Plan(
        what="CNN-ViT, tiny: an encoder at random, trained", train={"model": "cnn_vit_tiny"}
    ),
}
"""All configurations, in the order of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the command line asks for."""

    source: Path
    out: Path
    results: Path
    settings: StudySettings
    names: tuple[str, ...]
    jobs: int
    device: str
    words: tuple[str, ...]
    """The options as they were given, without --only, --jobs and --table."""

    def encode_options(self, plan: Plan, **changes: Any) -> cc.EncodeOptions:
        """Returns how the cache of a configuration is made."""
        fields = {"encoder": "bundled", "size": self.settings.size, "val_fraction": 0.0}
        return cc.EncodeOptions(**{**fields, **plan.encode, "seed": self.settings.seed, **changes})

    def spec(self, plan: Plan, fold: int) -> cc.TrainSpec:
        """Returns how a fold of a configuration is trained."""
        shared = self.settings
        fields = {"model": "vitds_tiny", "epochs": shared.epochs, "batch_size": shared.batch_size}
        fields |= {"lr": shared.lr, "seed": shared.seed, "folds": shared.folds, "fold": fold}
        return cc.TrainSpec(**{**fields, **plan.train})

    def cache_dir(self, options: cc.EncodeOptions) -> Path:
        """Returns where a cache lies; configurations that only train otherwise share one."""
        name = f"{options.dtype}-step{options.step:g}-{options.views.replace(':', '')}"
        return self.out / "caches" / f"{name}-{options.size}"

    def run_name(self, name: str, fold: int) -> str:
        """Returns the name of a fold's run folder."""
        return f"{name}-{self.settings.size}-{self.settings.epochs}ep-fold{fold}"


def encoded(asked: Asked, options: cc.EncodeOptions) -> cc.EncodeSummary:
    """Makes a cache, or finds it made."""
    out = asked.cache_dir(options)
    if asked.device != "auto":
        options = dataclasses.replace(options, devices=asked.device)
    with render.ProgressLine(f"encode {out.name}", unit="images") as line:
        return cc.encode(asked.source, out, options, observer=EncodeWatch(line))


def train_fold(asked: Asked, name: str, fold: int) -> TrainSummary:
    """Trains one fold of one configuration, or finds it trained."""
    plan, spec = PLANS[name], asked.spec(PLANS[name], fold)
    cache_dir = asked.cache_dir(asked.encode_options(plan))
    with ExitStack() as stack:
        loader = None
        if plan.is_online:
            train, _ = train_and_val(cc.open_cache(cache_dir), spec, Ranks())
            loader = stack.enter_context(
                cc.OnlineLoader(
                    train,
                    batch_size=spec.batch_size,
                    seed=spec.seed,
                    device=checked_device(asked.device),
                )
            )
        line = stack.enter_context(render.ProgressLine(f"{name} fold {fold}", unit="steps"))
        return cc.train(
            cache_dir,
            spec=spec,
            runs_dir=asked.out / "runs",
            name=asked.run_name(name, fold),
            device=asked.device,
            loader=loader,
            observer=TrainWatch(line),
        )


def classified(asked: Asked, name: str, fold: int) -> dict[str, bool]:
    """Returns which images of a fold the last weights classify right, by key."""
    plan = PLANS[name]
    run = asked.out / "runs" / asked.run_name(name, fold)
    options = asked.encode_options(plan)
    cache_dir = asked.cache_dir(options)
    if not options.views.startswith("crops"):
        cc.evaluate(run, cache=cache_dir, checkpoint="last", device=asked.device)
        table = pq.read_table(run / "predictions.parquet", columns=["key", "correct"])
        return dict(zip(table["key"].to_pylist(), table["correct"].to_pylist(), strict=True))
    # The first view of such a cache is a crop like the others; whole images lie in another.
    _, val = train_and_val(cc.open_cache(cache_dir), asked.spec(plan, fold), Ranks())
    assert val is not None
    keys = set(np.asarray(_keys(val))[val.valid_rows].tolist())
    whole = cc.open_cache(asked.cache_dir(asked.encode_options(plan, views="none")))["train"]
    return _classified_whole(run, whole, keys, asked)


@torch.inference_mode()
def _classified_whole(run: Path, split: cc.Split, keys: set[str], asked: Asked) -> dict[str, bool]:
    """Classifies the images of another cache by the last weights of a run."""
    device = checked_device(asked.device)
    model = load_model(open_run(run, checkpoint="last"), device)
    all_keys = _keys(split)
    rows = np.asarray([row for row in split.valid_rows.tolist() if all_keys[row] in keys])
    found: dict[str, bool] = {}
    with cc.LatentLoader(
        split.subset(rows), batch_size=asked.settings.batch_size, device=device, shuffle=False,
        views=0,
    ) as loader:  # fmt: skip
        for batch in loader:
            latents = batch.latents.contiguous(memory_format=torch.channels_last)
            right = (model(latents).argmax(1) == batch.labels).tolist()
            found |= {all_keys[r]: x for r, x in zip(batch.rows.tolist(), right, strict=True)}
    return found


def _keys(split: cc.Split) -> list[str]:
    """Returns the key of every row."""
    shards = range(split.record.num_shards)
    return [key for n in shards for key in split.read_index(n, ["key"])["key"].to_pylist()]


def collect(asked: Asked, name: str, summaries: Sequence[TrainSummary]) -> None:
    """Validates the folds of a trained configuration and adds it to the results."""
    plan, folds = PLANS[name], range(asked.settings.folds)
    right: dict[str, bool] = {}
    for fold in folds:
        right |= classified(asked, name, fold)
    keys = sorted(right)
    bits: npt.NDArray[np.bool_] = np.asarray([right[key] for key in keys])
    spec, options = asked.spec(plan, 0), asked.encode_options(plan)
    made = encoded(asked, options)
    cost = cc.complexity(spec.model, size=options.size, num_classes=made.classes)
    is_cached = not plan.is_online and cost.encoder_parameters > 0
    words = ("python", "pipelines/study.py", *asked.words, "--only", name)
    added = Configuration(
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
        command=shlex.join(words),
    )
    path = asked.results.with_suffix(".json")
    study = with_configuration(read_study(path), asked.settings, keys, added)
    write_study(path, study)
    _write_csv(asked.results.with_suffix(".csv"), study)


def _seconds(summary: TrainSummary) -> list[float]:
    """Returns the seconds of training of each epoch of a run."""
    with (Path(summary.path) / "summary.csv").open(newline="") as file:
        return [int(r["images"]) / float(r["images_per_second"]) for r in csv.DictReader(file)]


_HEAD = ("configuration", "what", "accuracy", "against " + REFERENCE, "s/epoch", "bytes/view",
         "GMAC", "command")  # fmt: skip


def table(study: Study | None) -> Iterator[tuple[str, ...]]:
    """Yields a row per configuration, run or not."""
    reference = study.find(REFERENCE) if study is not None else None
    for name, plan in PLANS.items():
        found = study.find(name) if study is not None else None
        if found is None:
            yield (name, plan.what, *["not run yet"] * 5, f"--only {name}")
            continue
        against = "reference" if name == REFERENCE else "no reference yet"
        if reference is not None and name != REFERENCE:
            gap = paired_difference(found.is_right(), reference.is_right())
            points = [f"{100 * x:+.1f}" for x in (gap.value, gap.low, gap.high)]
            against = f"{points[0]} ({points[1]} to {points[2]})"
        size = "-" if found.bytes_per_view is None else f"{found.bytes_per_view:,.0f}"
        yield (
            name, found.what, f"{found.accuracy:.1%} of {found.samples:,}", against,
            f"{found.seconds_per_epoch:.1f}", size, f"{found.gmac:.3f}", found.command,
        )  # fmt: skip


def _write_csv(path: Path, study: Study) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEAD)
        writer.writerows(row for row in table(study) if study.find(row[0]) is not None)
    partial.replace(path)


def run_all(asked: Asked) -> None:
    """Encodes, trains and collects what is asked for."""
    for plan in (PLANS[name] for name in asked.names):
        encoded(asked, asked.encode_options(plan))
        if asked.encode_options(plan).views.startswith("crops"):
            encoded(asked, asked.encode_options(plan, views="none"))
    tasks = [(name, fold) for name in asked.names for fold in range(asked.settings.folds)]
    if asked.jobs > 1:
        # Each fold in a process of its own; what they have trained is then found trained.
        with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda task: _in_process(asked, *task), tasks))
    for name in asked.names:
        summaries = [train_fold(asked, name, fold) for fold in range(asked.settings.folds)]
        collect(asked, name, summaries)


def _in_process(asked: Asked, name: str, fold: int) -> None:
    words = [sys.executable, __file__, *asked.words, "--only", name, "--fold", str(fold)]
    ended = subprocess.run(words, check=False).returncode
    if ended < 0 or ended >= 128:
        number = -ended if ended < 0 else ended - 128
        raise InterruptedRunError(f"{name} fold {fold} was stopped", signal_number=number)
    if ended:
        raise UsageError(f"{name} fold {fold} ended with exit code {ended}; its error is above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="images, a folder per class")
    parser.add_argument("--only", action="append", choices=sorted(PLANS), help="may be repeated")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="folds at once")
    parser.add_argument("--fold", type=int, help="train this fold alone and collect nothing")
    parser.add_argument("--out", type=Path, default=Path("study"), help="caches and runs")
    parser.add_argument("--results", type=Path, help="NAME of NAME.csv and NAME.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    for name, kind, default in (
        ("size", int, 96), ("epochs", int, 12), ("batch-size", int, 32), ("lr", float, 1e-3),
        ("folds", int, 5), ("seed", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args(arguments)
    words = [str(given.source)]
    for option in (
        "out",
        "results",
        "device",
        "size",
        "epochs",
        "batch_size",
        "lr",
        "folds",
        "seed",
    ):
        value = getattr(given, option)
        if value != parser.get_default(option):
            words += [f"--{option.replace('_', '-')}", str(value)]
    named = f"{given.source.resolve().name}_cv_{datetime.now(UTC):%Y%m}"
    asked = Asked(
        source=given.source,
        out=given.out,
        results=given.results or Path("pipelines/results", named),
        settings=StudySettings(
            size=given.size, epochs=given.epochs, batch_size=given.batch_size, lr=given.lr,
            folds=given.folds, seed=given.seed,
        ),
        names=tuple(name for name in PLANS if name in (given.only or PLANS)),
        jobs=given.jobs,
        device=given.device,
        words=tuple(words),
    )  # fmt: skip
    # Two threads that wait for each other lose tenfold when another job takes a core.
    torch.set_num_threads(1)
    try:
        path = asked.results.with_suffix(".json")
        study = read_study(path)
        if study is not None:
            refuse_other_settings(study, asked.settings)
        if given.fold is not None:
            for name in asked.names:
                train_fold(asked, name, given.fold)
            return
        if not given.table:
            run_all(asked)
            study = read_study(path)
    except KeyboardInterrupt:
        render.status("stopped; what was trained is saved: run the same command again to go on")
        sys.exit(130)
    except CacheError as error:
        if isinstance(error, InterruptedRunError):
            error.hint = "run the same command again to go on"
        render.fail(error)
        sys.exit(error.exit_code)
    render.line("| " + " | ".join(_HEAD) + " |")
    render.line("|---" * len(_HEAD) + "|")
    for row in table(study):
        render.line("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
