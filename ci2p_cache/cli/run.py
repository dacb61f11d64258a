"""`ci2p-cache run`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import InterruptedRunError, UsageError, command

if TYPE_CHECKING:
    from collections.abc import Callable

    from ci2p_cache.experiment.run import ExperimentSummary, StageEvent
    from ci2p_cache.experiment.seeds import SeedsSummary
    from ci2p_cache.experiment.spec import Experiment

__all__ = ["run", "show_stage"]


def run(
    recipe: Annotated[
        str, typer.Argument(help="FILE.py:NAME; FILE.py alone lists its recipes.", metavar="RECIPE")
    ],
    source: Annotated[
        str | None, typer.Argument(help="The images, as `encode` takes them.", metavar="[SRC]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the experiment [default: experiments/NAME].")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Change a field; may be repeated.", metavar="FIELD=VALUE"),
    ] = None,
    until: Annotated[
        Literal["encode", "train", "evaluate", "report"], typer.Option(help="The last stage.")
    ] = "report",
    seeds: Annotated[
        str | None, typer.Option(help="Train once per seed, from one cache.", metavar="0,1,2")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of caches: recipes with the same images and encode settings share one.",
            metavar="DIR",
        ),
    ] = None,
    device: choices.DeviceOption = "auto",
    track: choices.TrackOption = "tensorboard",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run; write nothing.")
    ] = False,
    json: choices.JsonOption = False,
) -> None:
    """Run a whole recipe: encode, train, evaluate, report; in one folder.

    \b
      ci2p-cache run pipelines/flowers.py                       its recipes
      ci2p-cache run pipelines/smoke.py:smoke                   15 seconds
      ci2p-cache run pipelines/flowers.py:vitds_tiny flowers/   all stages
      ci2p-cache run pipelines/flowers.py:vit_tiny flowers/ --set train.epochs=2
      ci2p-cache run flowers.py:vit_tiny flowers/ --seeds 0,1,2 --cache caches/
      ci2p-cache run imagenet.py:vitds imagenet/ --until encode    then, on GPUs:
      torchrun --nproc-per-node 8 -m ci2p_cache run imagenet.py:vitds imagenet/

    Writes experiments/NAME/ with experiment.json (the recipe as it was resolved), shards/, runs/
    and report.html. The same command continues where it stopped. A recipe file is your own
    Python code and is imported; --set changes single fields of what it returns.
    """
    from ci2p_cache.experiment.spec import load_experiment, with_changes
    from ci2p_cache.imported import split_location

    path, name = split_location(recipe)
    if name is None:
        _list(path, json=json)
        return
    experiment = load_experiment(recipe)
    if source is not None:
        if experiment.generate is not None:
            raise UsageError(
                f"{recipe} draws its own pictures, so {source!r} would not be used",
                hint=f"leave it out, or add --set generate=none --set source={source}",
            )
        experiment = dataclasses.replace(experiment, source=source)
    experiment = with_changes(experiment, set or [])
    if experiment.source is None and experiment.generate is None:
        raise UsageError(
            f"{recipe} does not say where its images are",
            hint=command("run", recipe, "IMAGES"),
        )
    numbers = _seeds(seeds, set or [])
    if dry_run:
        _print_plan(experiment, out, json=json)
        return
    how = {"until": until, "device": device, "cache_dir": cache, "track": choices.trackers(track)}
    _run(experiment, out, numbers, json=json, **how)


def _list(path: Path, *, json: bool) -> None:
    """Prints the recipes of a file."""
    from ci2p_cache.experiment.spec import HOW_TO_WRITE, list_recipes, recipe_command

    entries = list_recipes(path)
    if json:
        render.print_json([{"name": name, "summary": text} for name, text in entries.items()])
        return
    if not entries:
        raise UsageError(
            f"{path} has no recipe: no public function without arguments that is annotated to "
            "return an Experiment",
            hint=HOW_TO_WRITE,
        )
    render.print_table(("recipe", "what it is"), entries.items(), title=str(path))
    render.line(f"run one: {recipe_command(path, next(iter(entries)))}")


def _seeds(text: str | None, changes: list[str]) -> list[int] | None:
    """Reads the seeds that are asked for; None: that of the recipe."""
    if text is None:
        return None
    if any(change.partition("=")[0].strip() == "train.seed" for change in changes):
        raise UsageError("`--set train.seed` and `--seeds` do not go together: which are meant?")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"`--seeds` is {text!r}; wanted whole numbers with commas between them, as in 0,1,2"
        ) from error


def _run(
    experiment: Experiment, out: Path | None, seeds: list[int] | None, *, json: bool, **how: Any
) -> None:
    from ci2p_cache.cli.train import joined_ranks
    from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
    from ci2p_cache.experiment.run import run_experiment
    from ci2p_cache.experiment.seeds import SeedsSummary, run_seeds
    from ci2p_cache.process import tune_process

    tune_process(how["device"])
    run: Callable[..., ExperimentSummary | SeedsSummary] = run_experiment
    if seeds is not None:
        run = functools.partial(run_seeds, seeds=seeds)
    with joined_ranks(how["device"]) as ranks, render.ProgressLine("run", unit="") as line:
        try:
            summary = run(
                experiment,
                out=out,
                **how,
                on_event=show_stage,
                encode_observer=EncodeWatch(line),
                train_observer=TrainWatch(line) if ranks.is_writer else None,
                ranks=ranks,
            )
        except InterruptedRunError as error:
            # Each stage says how it continues by itself; here the whole command does.
            error.hint = command(*sys.argv[1:])
            raise
        if not ranks.is_writer:
            return
    if json:
        render.print_json(summary.to_dict())
    elif isinstance(summary, SeedsSummary):
        _print_seeds(summary)
    else:
        _print_summary(summary)


def show_stage(event: StageEvent) -> None:
    """Prints that a stage starts, or what came of it."""
    if event.seconds is None:
        render.status(f"{event.text} ...")
    else:
        render.status(f"  {event.text}  ({event.seconds:.1f} s)")


def _print_plan(experiment: Experiment, out: Path | None, *, json: bool) -> None:
    """Prints the resolved experiment, and how its fields differ from the defaults."""
    from ci2p_cache.encoding.options import EncodeOptions
    from ci2p_cache.experiment.spec import read_experiment, refuse_other
    from ci2p_cache.training.spec import TrainSpec

    root = out or Path("experiments", experiment.name)
    made = read_experiment(root)
    if made is not None:
        refuse_other(root, made, experiment)
    if json:
        render.print_json(experiment.to_dict())
        return
    rows = [("source", experiment.source or f"{experiment.generate} drawn pictures per class", "")]
    for group, defaults in (("encode", EncodeOptions()), ("train", TrainSpec())):
        values = getattr(experiment, group)
        rows += [
            (f"{group}.{field.name}", _shown(values, field.name), _shown(defaults, field.name))
            for field in dataclasses.fields(values)
            if getattr(values, field.name) != getattr(defaults, field.name)
        ]
    render.print_table(
        ("field", "value", "default"), rows, title=f"{root}: a plan, nothing was written"
    )
    if experiment.claim:
        render.line(f"  claim: {experiment.claim}")
    what = "is begun" if made is not None else "is new"
    render.line(f"  {root} {what}; the {experiment.checkpoint} weights will be evaluated")


def _shown(record: Any, field: str) -> str:
    value = getattr(record, field)
    return "none" if value is None else str(value)


def _print_seeds(summary: SeedsSummary) -> None:
    """Prints what an experiment ended with from several seeds."""
    if summary.mean is None:
        render.heading(f"{summary.name}: {len(summary.seeds)} seeds")
    else:
        spread = ""
        if summary.deviation is not None:
            spread = f" (standard deviation {100 * summary.deviation:.2f} points)"
        each = ", ".join(f"{top1:.2%}" for top1 in summary.top1)
        render.heading(
            f"{summary.name}: top-1 {summary.mean:.2%}{spread} of {len(summary.top1)} seeds: {each}"
        )
    if summary.claim:
        render.line(f"  claim       {summary.claim}")
    render.line(f"  cache       {summary.cache}, {summary.encoded_now:,} images encoded now")
    for seed, run in zip(summary.seeds, summary.runs, strict=False):
        render.line(f"  seed {seed:<6} {run}")
    if summary.report is not None:
        render.line(f"  report      {summary.report}")
    for stage, seconds in summary.seconds.items():
        render.line(f"  {stage:<11} {render.duration(seconds)}")


def _print_summary(summary: ExperimentSummary) -> None:
    """Prints what an experiment ended with."""
    scores, trained = summary.scores, summary.trained
    if scores is not None:
        render.heading(
            f"{summary.name}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of "
            f"{scores.samples:,} images"
        )
    elif trained is not None:
        render.heading(f"{summary.name}: trained {trained.last.epoch} epochs")
    else:
        render.heading(f"{summary.name}: encoded")
    if summary.claim:
        render.line(f"  claim       {summary.claim}")
    render.line(f"  cache       {summary.cache}")
    if trained is not None:
        render.line(f"  run         {trained.path}")
    if summary.report is not None:
        render.line(f"  report      {summary.report}")
    for stage, seconds in summary.seconds.items():
        render.line(f"  {stage:<11} {render.duration(seconds)}")
