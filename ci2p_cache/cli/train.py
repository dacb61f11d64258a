"""`ci2p-cache train`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.cli.fields import takes_options
from ci2p_cache.errors import CacheError, RefusedError, UsageError, command, stop_signals
from ci2p_cache.imported import pinned_location
from ci2p_cache.training.spec import TrainSpec

if TYPE_CHECKING:
    from ci2p_cache.loader.batches import BatchLoader
    from ci2p_cache.training.ranks import Ranks
    from ci2p_cache.training.records import TrainSummary

__all__ = ["joined_ranks", "train"]


def _read_config(context: typer.Context, file: Path | None) -> Any:
    """Makes the settings of an `args.yaml` the defaults of the command; returns them."""
    if file is None or context.resilient_parsing:
        return None
    from ci2p_cache.training.folder import read_args_file

    made = read_args_file(file)
    settings = made.settings
    found = settings.spec.to_dict() | {"cache": made.cache}
    if settings.loader == "OnlineLoader":
        found["from_images"] = True
    # A value of the environment, by an earlier name, is there already.
    context.default_map = {**found, **(context.default_map or {})}
    return settings.spec


@takes_options(TrainSpec)
def train(
    *,
    cache: choices.CacheArgument,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Take cache and settings from a run's args.yaml; options change single ones.",
            metavar="FILE",
            is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    options: TrainSpec,
    out: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Run folder [default: model and a digest of settings].")
    ] = None,
    device: choices.DeviceOption = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Threads that read [default: one per core, shared by ranks].",
            rich_help_panel="Machines",
        ),
    ] = None,
    resident: Annotated[
        Literal["auto", "yes", "no"],
        typer.Option(
            help="Keep the train split in memory; auto: on a GPU where it fits.",
            rich_help_panel="Data",
        ),
    ] = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="torch.compile the model; pays in long GPU runs.",
            rich_help_panel="Machines",
        ),
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Also save every so many steps.", metavar="STEPS", rich_help_panel="Machines"
        ),
    ] = None,
    track: choices.TrackOption = "tensorboard",
    from_images: Annotated[
        bool,
        typer.Option(
            "--from-images",
            help="Encode the images again in each epoch, do not read latents: the reference.",
            rich_help_panel="Data",
        ),
    ] = False,
    overwrite: Annotated[
        str | None,
        typer.Option(help="Remove the run --name first; NAME must be that name.", metavar="NAME"),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Stage two: train a Vision Transformer straight from the latents.

    \b
      ci2p-cache train shards/ --model vitds                   the paper's model
      ci2p-cache train shards/ --model vitds_tiny --epochs 30  minutes, on 2 cores
      ci2p-cache train shards/ --model vit --precision bf16    on a GPU
      ci2p-cache train shards/ --model vit_b16                 on the images
      ci2p-cache train shards/ --model ci2p+timm:deit_small_patch16_224
      ci2p-cache train new/ --init-from runs/first --epochs 20      fine-tune
      ci2p-cache run pipelines/animals10.py:paper_vit IMAGES     the paper
      torchrun --nproc-per-node 4 -m ci2p_cache train shards/            4 GPUs

    Writes OUT/NAME/ with args.yaml, summary.csv, TensorBoard events, curves.png and checkpoints
    (best and last); --track csv adds steps.csv, --track wandb logs to Weights & Biases. The same
    command continues where it stopped, in the middle of an epoch if need be, and gives the same
    numbers as if it had never stopped.
    Models on images read the images that the cache was made of, in the same order and views.
    The paper is Zhao and Sun, arXiv 2502.10120.
    """
    from ci2p_cache.cli.watch import TrainWatch
    from ci2p_cache.process import tune_process
    from ci2p_cache.report.charts import draw_curves
    from ci2p_cache.training.run import train as run

    tune_process(device)
    with joined_ranks(device) as ranks, ExitStack() as stack:
        _require_named(overwrite, name)
        _require_named_model(config, options)
        observers = []
        if ranks.is_writer:
            line = stack.enter_context(render.ProgressLine("train", unit="steps"))
            observers.append(TrainWatch(line))
        loader = None
        if from_images and not (options.train_encoder or options.fresh_views):
            loader = stack.enter_context(_online_loader(cache, options, ranks, device, workers))
        summary = run(
            cache,
            spec=options,
            runs_dir=out,
            name=name,
            overwrite=overwrite is not None,
            device=device,
            threads=workers,
            resident=resident,
            compile_model=compile,
            save_every_steps=save_every,
            loader=loader,
            observers=observers,
            track=choices.trackers(track),
            ranks=ranks,
        )
        if not ranks.is_writer:
            return
        curves = draw_curves(Path(summary.path))
    if json:
        render.print_json(summary.to_dict())
    else:
        _print_summary(summary, curves)


def _require_named(overwrite: str | None, name: str | None) -> None:
    """Refuses to remove a run whose name was not typed twice."""
    if overwrite is not None and overwrite != name:
        quoted = shlex.quote(overwrite)
        raise UsageError(
            f"--overwrite names {overwrite!r}, --name is {name!r}",
            hint=f"--name {quoted} --overwrite {quoted} trains that run from the start",
        )


def _require_named_model(config: Any, options: TrainSpec) -> None:
    """Refuses to run the code that an `args.yaml` names, which may come from a stranger."""
    own = pinned_location(config.model) if isinstance(config, TrainSpec) else None
    if own and config.model == options.model:
        raise RefusedError(
            f"--config names the model {own[0].name}:{own[1]}; its code runs only if you name the "
            "file",
            hint=f"repeat the command with --model FILE.py:{own[1]}",
        )


def _online_loader(
    cache: Path, spec: TrainSpec, ranks: Ranks, device: str, workers: int | None
) -> BatchLoader:
    """Returns the loader with the encoder in the loop, for this rank."""
    from ci2p_cache.cache.store import open_cache
    from ci2p_cache.loader.pixels import OnlineLoader
    from ci2p_cache.training.loaders import splits_of

    split, _ = splits_of(open_cache(cache), spec)
    return OnlineLoader(
        split,
        batch_size=spec.batch_size,
        seed=spec.seed,
        device=ranks.device(device),
        threads=workers or ranks.num_threads,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Joins the ranks that torchrun has started; all but rank 0 keep silent, errors included."""
    from ci2p_cache.training.ranks import Ranks

    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        # Until the ranks are joined, and note signals together, a signal just ends them: while one
        # waits for another in C code, no handler of Python's would be called.
        for number in stop_signals():
            signal.signal(number, signal.SIG_DFL)
    try:
        with ranks.joined(device) as joined:
            yield joined
    except CacheError as error:
        if ranks.world_size > 1:
            # torchrun sends it to those that are left; they are on their way, with a word to say.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not ranks.is_writer:
            raise SystemExit(error.exit_code) from error
        raise


def _print_summary(summary: TrainSummary, curves: Path) -> None:
    last, best = summary.last, summary.best
    if best.val_top1 is None or last.val_top1 is None:
        render.heading(
            f"{summary.name}: training loss {last.train_loss:.3f} after {last.epoch} epochs"
        )
    else:
        render.heading(
            f"{summary.name}: top-1 {last.val_top1:.2%} after {last.epoch} epochs, "
            f"best {best.val_top1:.2%} in epoch {best.epoch}"
        )
    render.line(f"  curves      {curves}")
    render.line(f"  numbers     {summary.path}/summary.csv")
    render.line(f"  best        {summary.best_checkpoint}")
    render.line(f"  last        {summary.last_checkpoint}")
    if Path(summary.path, "tensorboard").is_dir():
        render.line(f"  live        tensorboard --logdir {Path(summary.path).parent}")
    render.line(f"next: {command('evaluate', summary.path)}")
