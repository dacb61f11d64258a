"""The study: what each choice costs in accuracy, by cross-validation over every image.

Paper:    Stone 1974 (cross-validation), Efron 1979 (bootstrap). The choices are those of Zhao and
          Sun, arXiv 2502.10120, and of this project's defaults.
Command:  python pipelines/study.py flowers/ --jobs 2          all configurations
          python pipelines/study.py flowers/ --only a-int8     one of them
          python pipelines/study.py flowers/ --table           print the table, run nothing
Hours:    on one of two AVX2 cores (96 px, --jobs 2): 12 minutes for each of nine cached
          configurations, 17 for vit_tiny, 30 for vit_ti16 and about as long with the encoder in
          the loop, 65 for cnn_vit_tiny, 8 for e-encoder. Together 5 to 6 hours of one core, half
          of that with --jobs 2 on two; never run in one piece.
Disk:     up to 22 GB of checkpoints, 230 MB for each of 95 runs; the caches take 0.3 GB.
Hardware: two CPU cores; `--device cuda --size 256 --epochs 30` where there is a GPU (not tried).
Expect:   pipelines/README.md has the table, and what follows from it.

Every configuration is trained once for each of five folds, from the same seed, for the same epochs,
and the weights of the last epoch classify the images of the fold that was left out. So each image
is validated once. Two configurations are compared image by image: the interval is the middle 95 %
of the differences in 10,000 draws of the images with replacement, which covers the choice of the
images and not that of the seed: two runs that differ in the seed alone differ too.

Each fold has its own run folder below --out, and continues like any other. RESULTS.csv is the
table; RESULTS.json holds for each configuration which images it classified right, so that anyone
can draw the intervals again. Not in it: quality 1 to 8, which needs weights that could not be
fetched where this was written; see codec_sweep.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import ci2p_cache as cc
from ci2p_cache.cli import render
from ci2p_cache.cli.ending import reported_errors
from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
from ci2p_cache.errors import InterruptedRunError, ManifestError, RunMismatchError, UsageError
from ci2p_cache.inference.run_folder import load_model
from ci2p_cache.inference.scoring import keys_of
from ci2p_cache.machine import checked_device
from ci2p_cache.outputs import write_whole
from ci2p_cache.record import Record, differing_fields, json_bytes, read_json
from ci2p_cache.runs.evaluations import EVALUATIONS, read_predictions
from ci2p_cache.runs.files import read_summary, training_seconds
from ci2p_cache.runs.statistics import paired_difference
from ci2p_cache.training.inputs import train_and_val
from ci2p_cache.training.opened import open_run
from ci2p_cache.training.ranks import Ranks

REFERENCE = "a-int8"
"""What every configuration is compared with: the defaults, with the tiny ds model."""

COLUMNS = (
    "configuration", "what", "accuracy", f"against {REFERENCE}", "s/epoch", "bytes/view", "GMAC",
    "command",
)  # fmt: skip


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
    after: str | None = None
    """Configuration whose weights each fold begins with, for a quarter of the epochs at a tenth of
    the rate; None: random weights."""


BASE = Plan(
    what="what every configuration starts from",
    encode={"encoder": "bundled"},
    train={"model": "vitds_tiny"},
)

AUGMENT = {"augment": "authors"}
"""What the b-bank rows do to each crop."""

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
    "b-bank4": Plan(what="four augmented crops", encode={"views": "crops:4", **AUGMENT}),
    "b-bank8": Plan(what="eight augmented crops", encode={"views": "crops:8", **AUGMENT}),
    "b-bank16": Plan(what="sixteen augmented crops", encode={"views": "crops:16", **AUGMENT}),
    "b-fresh": Plan(
        what="augmented crops, new in every epoch: the encoder in the loop",
        encode={"views": "crops:1", **AUGMENT},
        train={"fresh_views": True},
        is_online=True,
    ),
    "c-online": Plan(what="the encoder in the loop", is_online=True),
    "d-vit_tiny": Plan(what="CI2P-ViT, tiny", train={"model": "vit_tiny"}),
    "d-vit_ti16": Plan(what="ViT-Ti/16 on images", train={"model": "vit_ti16"}),
    "d-cnn_vit_tiny": Plan(
        what="CNN-ViT, tiny: an encoder at random, trained", train={"model": "cnn_vit_tiny"}
    ),
    "e-more": Plan(
        what="a-int8, then a quarter more epochs at a tenth of the rate", after=REFERENCE
    ),
    "e-encoder": Plan(
        what="the same with the encoder unfrozen",
        train={"train_encoder": True},
        is_online=True,
        after=REFERENCE,
    ),
}
"""All configurations, in the order of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings(Record):
    """What all configurations of a study share, unless a configuration is about it."""

    size: int
    """Side of the images in pixels."""
    epochs: int
    """Epochs of every run."""
    batch_size: int
    """Images per step."""
    lr: float
    """Peak learning rate."""
    folds: int
    """Parts of the data, each left out once."""
    seed: int
    """Seed of weights, order and views of every run, and of the rows of every cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration(Record):
    """One row of the table: what came of one configuration, over all folds."""

    name: str
    """Its name, as `--only` takes it."""
    what: str
    """What it is, in a few words."""
    model: str
    """Name of the model."""
    bits: str
    """Which images were classified right: hex of a bit per key, the first key's the highest."""
    samples: int
    """Images validated, each once."""
    correct: int
    """Images classified right."""
    seconds_per_epoch: float
    """Median wall time of training one epoch of one fold, validation not included."""
    bytes_per_view: float | None
    """Cache bytes per stored view; None where none is read."""
    gmac: float
    """Multiply-accumulates of one forward pass in the training step, in thousand millions."""
    device: str
    """Where it was trained."""
    command: str
    """What makes this row again."""

    def is_right(self) -> npt.NDArray[np.bool_]:
        """Returns which images were classified right, bool (samples,), in the order of the keys."""
        packed = np.frombuffer(bytes.fromhex(self.bits), np.uint8)
        return np.unpackbits(packed)[: self.samples].astype(np.bool_)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study(Record):
    """The file of a study."""

    version: int = 1
    """Version of this record."""
    settings: StudySettings
    """What all configurations share."""
    keys: tuple[str, ...]
    """The images, sorted."""
    configurations: tuple[Configuration, ...]
    """What was run, sorted by name."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(f"study `version` is {self.version}; this ci2p-cache reads 1")
        for each in self.configurations:
            size = len(each.bits) * 4
            if each.samples != len(self.keys) or not 0 <= size - each.samples < 8:
                raise UsageError(
                    f"configuration {each.name} speaks of {each.samples} images in {size} bits; "
                    f"the study has {len(self.keys)}"
                )
            if int(each.is_right().sum()) != each.correct:
                raise UsageError(f"configuration {each.name}: its bits do not add up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The study that the command line asks for; run again, it continues."""

    source: Path
    """The images, a folder per class."""
    out: Path
    """Folder of its caches and runs."""
    results: Path
    """RESULTS.csv and RESULTS.json, without their ends."""
    settings: StudySettings
    """What all configurations share."""
    names: tuple[str, ...]
    """Configurations to run, in the order of the table."""
    jobs: int
    """Folds trained at once."""
    device: str
    """auto, cpu, cuda or cuda:1, of both stages; auto leaves stage one to its own default."""
    words: tuple[str, ...]
    """The options as they were given, without --only, --jobs and --table."""

    def encode_options(self, plan: Plan, **changes: Any) -> cc.EncodeOptions:
        """Returns how the cache of a configuration is made, but for `changes`."""
        fields = {**BASE.encode, "size": self.settings.size, "val_fraction": 0.0}
        return cc.EncodeOptions(**{**fields, **plan.encode, "seed": self.settings.seed, **changes})

    def spec(self, plan: Plan, fold: int) -> cc.TrainSpec:
        """Returns how a fold of a configuration is trained, 0 <= fold < folds."""
        shared = self.settings
        fields = {**BASE.train, "epochs": shared.epochs, "batch_size": shared.batch_size}
        fields |= {"lr": shared.lr, "seed": shared.seed, "folds": shared.folds, "fold": fold}
        if plan.after is not None:
            fields |= {"epochs": max(shared.epochs // 4, 1), "lr": shared.lr / 10}
            fields["init_from"] = str(self.run_dir(plan.after, fold))
        return cc.TrainSpec(**{**fields, **plan.train})

    def cache_dir(self, options: cc.EncodeOptions) -> Path:
        """Returns where a cache is; configurations that only train otherwise share one."""
        name = f"{options.dtype}-step{options.step:g}-{options.views.replace(':', '')}"
        if options.augment is not None:
            name += f"-{options.augment}"
        return self.out / "caches" / f"{name}-{options.size}"

    def run_dir(self, name: str, fold: int) -> Path:
        """Returns the run folder of a fold of the configuration `name`."""
        size, epochs = self.settings.size, self.settings.epochs
        return self.out / "runs" / f"{name}-{size}-{epochs}ep-fold{fold}"


def encode(asked: Asked, plan: Plan) -> cc.EncodeSummary:
    """Makes the caches of a configuration, or finds them made; returns that of training.

    Crops are trained from and whole images validated, so crops take two caches.
    """
    options = asked.encode_options(plan)
    whole = asked.encode_options(plan, views="none", augment=None)
    for each in (whole, options) if options.views.startswith("crops") else (options,):
        out, on_auto = asked.cache_dir(each), asked.device == "auto"
        how = each if on_auto else dataclasses.replace(each, devices=asked.device)
        with render.ProgressLine(f"encode {out.name}", unit="images") as line:
            summary = cc.encode(asked.source, out, how, observer=EncodeWatch(line))
    return summary


def train(asked: Asked, name: str, fold: int) -> cc.TrainSummary:
    """Trains one fold of one configuration, or finds it trained; its cache is complete."""
    plan, run = PLANS[name], asked.run_dir(name, fold)
    spec, cache_dir = asked.spec(plan, fold), asked.cache_dir(asked.encode_options(plan))
    if plan.after is not None:
        train(asked, plan.after, fold)
    with contextlib.ExitStack() as stack:
        loader = None
        if plan.is_online and not (spec.fresh_views or spec.train_encoder):
            split, _ = train_and_val(cc.open_cache(cache_dir), spec, Ranks())
            device = checked_device(asked.device)
            loader = stack.enter_context(
                cc.OnlineLoader(split, batch_size=spec.batch_size, seed=spec.seed, device=device)
            )
        line = stack.enter_context(render.ProgressLine(f"{name} fold {fold}", unit="steps"))
        return cc.train(
            cache_dir, spec=spec, runs_dir=run.parent, name=run.name, device=asked.device,
            loader=loader, observers=[TrainWatch(line)],
        )  # fmt: skip


def run_all(asked: Asked) -> None:
    """Encodes, trains and collects what is asked for."""
    for name in asked.names:
        encode(asked, PLANS[name])
    tasks = [(name, fold) for name in asked.names for fold in range(asked.settings.folds)]
    if asked.jobs > 1:
        # Each fold in its own process; the loop below then finds them trained.
        with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda task: _in_process(asked, *task), tasks))
    for name in asked.names:
        collect(asked, name)


def _in_process(asked: Asked, name: str, fold: int) -> None:
    words = [sys.executable, __file__, *asked.words, "--only", name, "--fold", str(fold)]
    ended = subprocess.run(words, check=False).returncode
    if ended < 0 or ended >= 128:
        number = -ended if ended < 0 else ended - 128
        raise InterruptedRunError(f"{name} fold {fold} was stopped", signal_number=number)
    if ended:
        raise UsageError(f"{name} fold {fold} ended with exit code {ended}; its error is above")


def collect(asked: Asked, name: str) -> None:
    """Trains what is not trained of a configuration, validates all folds, adds it to the results.

    Raises:
        RunMismatchError: the results are of other settings or images.
    """
    plan = PLANS[name]
    summaries = [train(asked, name, fold) for fold in range(asked.settings.folds)]
    right: dict[str, bool] = {}
    for fold in range(asked.settings.folds):
        right |= _classified(asked, name, fold)
    keys = tuple(sorted(right))
    bits = np.asarray([right[key] for key in keys])
    spec, made = asked.spec(plan, 0), encode(asked, plan)
    cost = cc.complexity(spec.model, size=asked.settings.size, num_classes=made.classes)
    is_cached = not plan.is_online and cost.encoder_parameters > 0
    seconds = [s for each in summaries for s in training_seconds(read_summary(Path(each.path)))]
    added = Configuration(
        name=name,
        what=plan.what,
        model=spec.model,
        bits=np.packbits(bits).tobytes().hex(),
        samples=len(bits),
        correct=int(bits.sum()),
        seconds_per_epoch=statistics.median(seconds),
        bytes_per_view=made.cache_bytes / made.views if is_cached else None,
        gmac=(cost.macs if plan.is_online else cost.model_macs) / 1e9,
        device=summaries[0].device,
        command=shlex.join(("python", "pipelines/study.py", *asked.words, "--only", name)),
    )
    record = asked.results.with_suffix(".json")
    found = read_study(record, asked.settings)
    study = with_configuration(found, asked.settings, keys, added)
    write_whole(record, json_bytes(study.to_dict()), what="study")
    write_whole(asked.results.with_suffix(".csv"), study_csv(study), what="table")


def _classified(asked: Asked, name: str, fold: int) -> dict[str, bool]:
    """Returns which images of a fold the last weights classify right, by key."""
    plan, run = PLANS[name], asked.run_dir(name, fold)
    options = asked.encode_options(plan)
    cache_dir = asked.cache_dir(options)
    if not options.views.startswith("crops"):
        made = cc.evaluate(run, cache=cache_dir, checkpoint="last", device=asked.device)
        found = read_predictions(run / EVALUATIONS / made.predictions.path)
        return dict(zip(found.key, found.correct.tolist(), strict=True))
    # The first view of such a cache is a crop like the others; whole images are in another.
    _, val = train_and_val(cc.open_cache(cache_dir), asked.spec(plan, fold), Ranks())
    assert val is not None
    whole = cc.open_cache(asked.cache_dir(asked.encode_options(plan, views="none", augment=None)))[
        "train"
    ]
    device, keys, key_of = checked_device(asked.device), set(keys_of(val).values()), keys_of(whole)
    rows = np.asarray(sorted(row for row, key in key_of.items() if key in keys))
    model = load_model(open_run(run, checkpoint="last"), device)
    right: dict[str, bool] = {}
    with (
        torch.inference_mode(),
        cc.LatentLoader(
            whole.subset(rows), batch_size=asked.settings.batch_size, device=device, shuffle=False,
            views=0,
        ) as loader,
    ):  # fmt: skip
        for batch in loader:
            latents = batch.latents.contiguous(memory_format=torch.channels_last)
            hits = (model(latents).argmax(1) == batch.labels).tolist()
            right |= {key_of[row]: hit for row, hit in zip(batch.rows.tolist(), hits, strict=True)}
    return right


def read_study(path: Path, settings: StudySettings | None = None) -> Study | None:
    """Reads the file of a study, None where there is none.

    Raises:
        ManifestError: it is damaged or of another version.
        RunMismatchError: `settings` are given, and it has others; the message lists them.
    """
    try:
        study = Study.from_dict(read_json(path))
    except FileNotFoundError:
        return None
    except (ManifestError, ValueError) as error:
        raise ManifestError(f"{path} is damaged or of another version: {error}") from error
    lines = [
        f"  {name}: {ours!r} in the study, {theirs!r} asked for"
        for name, ours, theirs in differing_fields(study.settings, settings or study.settings)
    ]
    if lines:
        raise RunMismatchError(
            "the study was made with other settings; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --results",
        )
    return study


def with_configuration(
    study: Study | None, settings: StudySettings, keys: Sequence[str], added: Configuration
) -> Study:
    """Returns a study with a configuration added, or in place of the one of that name.

    Raises:
        RunMismatchError: the study has other images.
    """
    if study is not None and study.keys != tuple(keys):
        raise RunMismatchError(
            f"the study is of {len(study.keys)} other images than these {len(keys)}",
            hint="choose another --results",
        )
    known = {} if study is None else {each.name: each for each in study.configurations}
    _, ordered = zip(*sorted((known | {added.name: added}).items()), strict=True)
    return Study(settings=settings, keys=tuple(keys), configurations=ordered)


def study_rows(study: Study | None, against: str = REFERENCE) -> Iterator[tuple[str, ...]]:
    """Yields a row per configuration, run or not, in the order of the plans."""
    known = {} if study is None else {each.name: each for each in study.configurations}
    base = known.get(against)
    for name, plan in PLANS.items():
        found = known.get(name)
        if found is None:
            yield (name, plan.what, *["not run yet"] * 5, f"--only {name}")
            continue
        gap = "reference" if name == against else "no reference yet"
        if base is not None and base is not found:
            found_gap = paired_difference(found.is_right(), base.is_right())
            gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * each for each in found_gap))
        size = "-" if found.bytes_per_view is None else f"{found.bytes_per_view:,.0f}"
        yield (
            name, found.what, f"{found.correct / found.samples:.1%} of {found.samples:,}", gap,
            f"{found.seconds_per_epoch:.1f}", size, f"{found.gmac:.3f}", found.command,
        )  # fmt: skip


def study_csv(study: Study) -> bytes:
    """Returns the table of what was run as CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    names = {each.name for each in study.configurations}
    writer.writerows(row for row in study_rows(study) if row[0] in names)
    return text.getvalue().encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="images, a folder per class")
    parser.add_argument("--only", action="append", choices=sorted(PLANS), help="may be repeated")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    parser.add_argument(
        "--against", choices=sorted(PLANS), default=REFERENCE, help="what --table compares with"
    )
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
    return parser


def _asked(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Asked:
    words = [str(given.source)]
    for option in ("out", "results", "device", "size", "epochs", "batch_size", "lr", "folds",
                   "seed"):  # fmt: skip
        value = getattr(given, option)
        if value != parser.get_default(option):
            words += [f"--{option.replace('_', '-')}", str(value)]
    named = f"{given.source.resolve().name}_cv_{datetime.now(UTC):%Y%m}"
    return Asked(
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    asked = _asked(parser, given)
    # Two threads that wait for each other lose tenfold when another job takes a core.
    torch.set_num_threads(1)
    with reported_errors(go_on="run the same command again to continue"):
        record = asked.results.with_suffix(".json")
        study = read_study(record, asked.settings)
        if given.fold is not None:
            for name in asked.names:
                train(asked, name, given.fold)
            return
        if not given.table:
            run_all(asked)
            study = read_study(record)
    head = [name.replace(REFERENCE, given.against) for name in COLUMNS]
    render.line("| " + " | ".join(head) + " |")
    render.line("|---" * len(COLUMNS) + "|")
    for row in study_rows(study, given.against):
        render.line("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
