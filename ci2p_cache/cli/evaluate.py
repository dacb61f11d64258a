"""`ci2p-cache evaluate`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render

if TYPE_CHECKING:
    from ci2p_cache.runs.evaluations import Evaluation

__all__ = ["evaluate"]

_SHOWN_CLASSES = 20
_SHOWN_CONFUSIONS = 10


def evaluate(
    run: choices.RunFolder,
    checkpoint: choices.Checkpoint = "best",
    cache: Annotated[
        str | None, typer.Option(help="Cache folder or URL [default: the run's].", metavar="DIR")
    ] = None,
    from_images: Annotated[
        bool, typer.Option("--from-images", help="Encode the images again, do not read latents.")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of the cache.", autocompletion=choices.splits)
    ] = "val",
    batch_size: Annotated[
        int | None, typer.Option(help="Images per batch [default: the run's].")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read [default: one per core].")
    ] = None,
    device: choices.Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the two files [default: RUN/evaluations].", metavar="DIR"),
    ] = None,
    json: choices.Json = False,
) -> None:
    """Evaluate a trained run: accuracy with its interval, calibration, classes, confusions.

    \b
      ci2p-cache evaluate runs/vitds-1a2b3c4d                      best weights, validation split
      ci2p-cache evaluate runs/vitds-1a2b3c4d --checkpoint last
      ci2p-cache evaluate runs/vitds-1a2b3c4d --from-images        with the encoder in the loop
      ci2p-cache evaluate runs/vitds-1a2b3c4d --cache other/ --split test

    Writes SPLIT-CHECKPOINT.json and .parquet (one row per image) into RUN/evaluations, two files
    for each split and checkpoint. From the run's own cache the numbers are those that training
    recorded for these weights. A cache with other classes, or encoded in another way, is refused.
    """
    from ci2p_cache.inference.scoring import evaluate as score
    from ci2p_cache.process import tune_process
    from ci2p_cache.runs.evaluations import EVALUATIONS

    tune_process(device)
    with ExitStack() as stack:
        line = stack.enter_context(render.ProgressLine("evaluate", unit="images"))
        result = score(
            run,
            cache=cache,
            from_images=from_images,
            split=split,
            checkpoint=checkpoint,
            device=device,
            batch_size=batch_size,
            threads=workers,
            source=source,
            out=out,
            on_progress=line.update,
        )
    if json:
        render.print_json(result.to_dict())
        return
    if out is None:
        folder = run.parent.parent if run.parent.name == "checkpoints" else run
        out = folder / EVALUATIONS
    _print(result, out / result.predictions.path)


def _print(result: Evaluation, predictions: Path) -> None:
    fold = f", fold {result.fold} of {result.folds}" if result.folds else ""
    render.heading(
        f"{result.run}, {result.checkpoint}: top-1 {result.top1:.2%} "
        f"(95 %: {result.top1_low:.2%} to {result.top1_high:.2%}), top-5 {result.top5:.2%} "
        f"of {result.samples:,} images of {result.split}{fold}"
    )
    render.line(f"  negative log-likelihood     {result.nll:.4f}")
    render.line(f"  expected calibration error  {result.ece:.2%}")
    if result.recorded_top1 is not None:
        same = (result.recorded_top1, result.recorded_nll) == (result.top1, result.nll)
        told = f"top-1 {result.recorded_top1:.2%}, {result.recorded_nll:.4f}"
        render.line(f"  recorded in training        {'the same' if same else told}")
    render.line()
    classes = sorted(result.per_class, key=lambda c: c.correct / max(c.samples, 1))
    render.print_table(
        ("class", "right", "of", "share"),
        [
            (c.name, c.correct, c.samples, f"{c.correct / c.samples:.1%}" if c.samples else "-")
            for c in classes[:_SHOWN_CLASSES]
        ],
        title="classes, the worst first",
    )
    if len(classes) > _SHOWN_CLASSES:
        render.line(f"... and {len(classes) - _SHOWN_CLASSES:,} more classes (--json lists them)")
    names = [c.name for c in result.per_class]
    wrong = sorted((c for c in result.confusion if c[0] != c[1]), key=lambda c: -c[2])
    if wrong:
        render.line()
        render.print_table(
            ("is", "was taken for", "times"),
            [(names[a], names[b], count) for a, b, count in wrong[:_SHOWN_CONFUSIONS]],
            title="confusions, the most frequent first",
        )
    render.line()
    render.line(f"written: {predictions.with_suffix('.json')}, {predictions}")
