"""The study: what each choice costs in accuracy, by cross-validation over every image.

Paper:    Stone 1974 (cross-validation), Efron 1979 (bootstrap). The choices are those of Zhao and
          Sun, arXiv 2502.10120, and of this project's defaults.
Command:  python pipelines/study.py flowers/ --jobs 2          all configurations
          python pipelines/study.py flowers/ --only a-int8     one of them
          python pipelines/study.py flowers/ --table           print the table, run nothing
Hours:    on one of two AVX2 cores (96 px, --jobs 2): 12 minutes for each of nine cached
          configurations, 17 for vit_tiny, 30 for vit_ti16 and about as long with the encoder in
          the loop, 65 for cnn_vit_tiny. Together 4 to 5 hours of one core, half of that with
          --jobs 2 on two; never run in one piece.
Disk:     up to 16 GB of checkpoints, 230 MB for each of 65 runs; the caches take 0.2 GB.
Hardware: two CPU cores; `--device cuda --size 256 --epochs 30` where there is a GPU (not tried).
Expect:   pipelines/README.md has the table, and what follows from it.

Every configuration is trained once for each of five folds, from the same seed, for the same epochs,
and the weights of the last epoch classify the images of the fold that was left out. So each image
is validated once. Two configurations are compared image by image: the interval is the middle 95 %
of the differences in 10,000 draws of the images with replacement, which covers the choice of the
images and not that of the seed: two runs that differ in the seed alone differ too.

Each fold is a run folder of its own below --out, and continues like any other. RESULTS.csv is the
table; RESULTS.json holds for each configuration which images it classified right, so that anyone
can draw the intervals again. Not in it: quality 1 to 8, which needs weights that could not be
fetched where this was written; see codec_sweep.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from ci2p_cache.cli import render
from ci2p_cache.cli.ending import told_errors
from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
from ci2p_cache.errors import InterruptedRunError, UsageError
from ci2p_cache.experiment.comparison import (
    StudySettings,
    read_study,
    refuse_other_settings,
    with_configuration,
    write_study,
)
from ci2p_cache.experiment.cross_validation import CrossValidation, Plan, StudyObserver
from ci2p_cache.experiment.study_table import study_csv, study_head, study_rows
from ci2p_cache.outputs import write_whole

REFERENCE = "a-int8"
"""What every configuration is compared with: the defaults, with the tiny ds model."""

BASE = Plan(
    what="what every configuration starts from",
    encode={"encoder": "bundled"},
    train={"model": "vitds_tiny"},
)

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


class Watch(StudyObserver):
    """Shows a progress line for what runs."""

    @contextmanager
    def encoding(self, name: str) -> Iterator[EncodeWatch]:
        """Shows that a cache is made."""
        with render.ProgressLine(f"encode {name}", unit="images") as line:
            yield EncodeWatch(line)

    @contextmanager
    def training(self, name: str) -> Iterator[TrainWatch]:
        """Shows that a fold is trained."""
        with render.ProgressLine(name, unit="steps") as line:
            yield TrainWatch(line)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked(CrossValidation):
    """The study, and what the command line asks for."""

    base: Plan = BASE
    results: Path
    """RESULTS.csv and RESULTS.json, without their ends."""
    names: tuple[str, ...]
    """Configurations to run, in the order of the table."""
    jobs: int
    """Folds trained at once."""
    words: tuple[str, ...]
    """The options as they were given, without --only, --jobs and --table."""

    @property
    def record(self) -> Path:
        """RESULTS.json."""
        return self.results.with_suffix(".json")


def run_all(asked: Asked) -> None:
    """Encodes, trains and collects what is asked for."""
    for name in asked.names:
        asked.encode(PLANS[name])
    tasks = [(name, fold) for name in asked.names for fold in range(asked.settings.folds)]
    if asked.jobs > 1:
        # Each fold in a process of its own; what they have trained is then found trained.
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
    """Trains what is not trained of a configuration, and adds it to the results."""
    plan = PLANS[name]
    summaries = [asked.train(name, plan, fold) for fold in range(asked.settings.folds)]
    words = ("python", "pipelines/study.py", *asked.words, "--only", name)
    keys, added = asked.collect(name, plan, summaries, command=shlex.join(words))
    study = with_configuration(read_study(asked.record), asked.settings, keys, added)
    write_study(asked.record, study)
    table = study_csv(study, PLANS, reference=REFERENCE)
    write_whole(asked.results.with_suffix(".csv"), table, what="table")


def _parser() -> argparse.ArgumentParser:
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
        observer=Watch(),
        words=tuple(words),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    asked = _asked(parser, given)
    # Two threads that wait for each other lose tenfold when another job takes a core.
    torch.set_num_threads(1)
    with told_errors(go_on="run the same command again to continue"):
        study = read_study(asked.record)
        if study is not None:
            refuse_other_settings(study, asked.settings)
        if given.fold is not None:
            for name in asked.names:
                asked.train(name, PLANS[name], given.fold)
            return
        if not given.table:
            run_all(asked)
            study = read_study(asked.record)
    head = study_head(REFERENCE)
    render.line("| " + " | ".join(head) + " |")
    render.line("|---" * len(head) + "|")
    for row in study_rows(study, PLANS, reference=REFERENCE):
        render.line("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
