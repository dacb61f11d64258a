"""`ci2p-cache evaluate`, `predict`, `export` and `report`: commands about trained runs."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import InputDataError, UsageError

__all__ = ["evaluate", "export", "predict", "report"]

if TYPE_CHECKING:
    from ci2p_cache.report.tables import TableFormat
    from ci2p_cache.runs.evaluations import Evaluation


_SHOWN_CLASSES = 20
_SHOWN_CONFUSIONS = 10


def evaluate(
    run: choices.RunArgument,
    checkpoint: choices.CheckpointOption = "last",
    model: choices.OwnModelOption = None,
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
    device: choices.DeviceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the two files [default: RUN/evaluations].", metavar="DIR"),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Evaluate a trained run: accuracy with its interval, calibration, classes, confusions.

    \b
      ci2p-cache evaluate runs/vitds-1a2b3c4d                the last weights
      ci2p-cache evaluate runs/vitds-1a2b3c4d --checkpoint best
      ci2p-cache evaluate runs/vitds-1a2b3c4d --from-images  encode them again
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
            model=model,
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
    _print_evaluation(result, out / result.predictions.path)


def _print_evaluation(result: Evaluation, predictions: Path) -> None:
    fold = f", fold {result.fold} of {result.folds}" if result.folds else ""
    top5 = f", top-5 {result.top5:.2%}" if len(result.per_class) > 5 else ""
    render.heading(
        f"{result.run}, {result.checkpoint}: top-1 {result.top1:.2%} "
        f"(95 %: {result.top1_low:.2%} to {result.top1_high:.2%}){top5} "
        f"of {result.samples:,} images of {result.split}{fold}"
    )
    render.line(f"  negative log-likelihood     {result.nll:.4f}")
    render.line(f"  expected calibration error  {result.ece:.2%}")
    if result.recorded_top1 is not None:
        same = (result.recorded_top1, result.recorded_nll) == (result.top1, result.nll)
        then = f"top-1 {result.recorded_top1:.2%}, {result.recorded_nll:.4f}"
        render.line(f"  recorded in training        {'the same' if same else then}")
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


if TYPE_CHECKING:
    from ci2p_cache.inference.classifier import Prediction


_SHOWN_ERRORS = 10


def predict(
    run: choices.RunArgument,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns.", metavar="IMAGES...")
    ],
    top: Annotated[int, typer.Option(help="Classes shown for each image.")] = 5,
    checkpoint: choices.CheckpointOption = "last",
    model: choices.OwnModelOption = None,
    cache: choices.EncoderCacheOption = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode [default: one per core].")
    ] = None,
    device: choices.DeviceOption = "auto",
    json: choices.JsonOption = False,
) -> None:
    """Say what pictures show, with nothing but a run folder; the cache may be gone.

    \b
      ci2p-cache predict runs/vitds-1a2b3c4d rose.jpg
      ci2p-cache predict runs/vitds-1a2b3c4d holiday/ 'more/*.png' --top 3
      ci2p-cache predict runs/vitds-1a2b3c4d holiday/ --json > labels.json
      ci2p-cache predict runs/vitds-1a2b3c4d rose.jpg --checkpoint last

    The encoder, its quantisation and the model are those of the run: an image of the cache gets the
    logits that `evaluate` gives it. Images that cannot be read are named at the end, with exit
    code 3; the others are classified all the same.
    """
    from ci2p_cache.inference.classifier import load_classifier
    from ci2p_cache.process import tune_process

    tune_process(device)
    with ExitStack() as stack:
        line = stack.enter_context(render.ProgressLine("predict", unit="images"))
        classifier = load_classifier(
            run, checkpoint=checkpoint, cache=cache, device=device, model=model
        )
        for text in classifier.notices:
            render.notice(text)
        predictions = classifier.predict(
            images, top=top, batch_size=batch_size, threads=workers, on_progress=line.update
        )
    if json:
        render.print_json([prediction.to_dict() for prediction in predictions])
    else:
        _print_predictions(predictions)
    failed = [f"{p.path}: {p.error}" for p in predictions if p.error is not None]
    if failed:
        shown = "\n".join(f"  {text}" for text in failed[:_SHOWN_ERRORS])
        more = f"\n  ... and {len(failed) - _SHOWN_ERRORS:,} more" * (len(failed) > _SHOWN_ERRORS)
        raise InputDataError(
            f"{len(failed)} of {len(predictions)} could not be classified:\n{shown}{more}"
        )


def _print_predictions(predictions: list[Prediction]) -> None:
    good = [prediction for prediction in predictions if prediction.guesses]
    if not good:
        return
    render.print_table(
        ("image", "class", "", "then"),
        [
            (
                prediction.path,
                prediction.guesses[0].title,
                f"{prediction.guesses[0].probability:.1%}",
                ", ".join(f"{g.title} {g.probability:.1%}" for g in prediction.guesses[1:]),
            )
            for prediction in good
        ],
    )


if TYPE_CHECKING:
    from ci2p_cache.inference.export import ExportSummary


def export(
    run: choices.RunArgument,
    out: Annotated[
        Path, typer.Option(help="File to write, .onnx or .pt2, or a folder.", metavar="FILE")
    ],
    format: Annotated[
        Literal["onnx", "torch", "huggingface"],
        typer.Option(
            help="torch: a .pt2 of torch.export. huggingface: a folder with a model card."
        ),
    ] = "onnx",
    what: Annotated[
        Literal["full", "model"],
        typer.Option(help="full: images to logits. model: latents to logits."),
    ] = "full",
    checkpoint: choices.CheckpointOption = "last",
    model: choices.OwnModelOption = None,
    cache: choices.EncoderCacheOption = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Check with these images [default: random ones].", metavar="IMAGES"),
    ] = None,
    count: Annotated[int, typer.Option(help="Inputs to check with.")] = 16,
    overwrite: Annotated[
        str | None,
        typer.Option(help="Replace the file --out; NAME must be its name.", metavar="NAME"),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Export encoder and model for other programs or people, checked against eager.

    \b
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.onnx
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.pt2 --format torch
      ci2p-cache export runs/vitds-1a2b3c4d --out head.onnx --what model
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.onnx --check photos/
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers --format huggingface

    The graph takes float32 images (batch, 3, size, size) in [0, 1] and gives logits; classes, size
    and fingerprint are in its metadata. The file is run, in onnxruntime or torch, before it is
    renamed into place; a file that is there already is refused. ONNX needs
    `pip install 'ci2p-cache[export]'`.

    huggingface writes config.json, the weights, the encoder and a model card into a folder, which
    `predict`, `evaluate`, `export` and `train --init-from` take in the place of the run.
    """
    from ci2p_cache.inference.export import export_model

    if overwrite is not None and overwrite != out.name:
        raise UsageError(
            f"--overwrite names {overwrite!r}, the file is {out.name!r}",
            hint=f"--overwrite {shlex.quote(out.name)} to replace that file",
        )
    render.status(f"exporting to {out} and running it; a minute or so")
    summary = export_model(
        run, out, to=format, what=what, checkpoint=checkpoint, cache=cache, images=check,
        count=count, overwrite=overwrite is not None, model=model,
    )  # fmt: skip
    render.print_json(summary.to_dict()) if json else _print_export(summary)


def _print_export(summary: ExportSummary) -> None:
    check = summary.check
    shape = ", ".join(map(str, summary.input_shape))
    render.heading(f"{summary.path}: {summary.format}, {render.size(summary.bytes)}")
    render.line(f"  input       float32 (batch, {shape})")
    render.line(f"  checkpoint  {summary.checkpoint}")
    render.line(
        f"  checked     {check.inputs:,} inputs: logits differ by at most "
        f"{check.max_difference:.2g}; the largest is {check.scale:.3g}"
    )
    if check.differing_values:
        render.line(
            f"  rounding    {check.differing_values:,} of {check.stored_values:,} values round to "
            f"the other side of a tie, in {check.differing_inputs:,} inputs; there logits differ "
            f"by up to {check.end_to_end_difference:.2g}"
        )


def report(
    paths: Annotated[
        list[str], typer.Argument(help="Run folders and caches.", metavar="PATH...", readable=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write [default: report.html; a table goes to the screen]."),
    ] = None,
    table: Annotated[
        Literal["markdown", "csv", "latex"] | None,
        typer.Option(help="A table of the runs instead: .md, .csv or .tex."),
    ] = None,
    over_seeds: Annotated[
        bool,
        typer.Option(
            "--over-seeds", help="In the table, one row for runs that differ in their seed alone."
        ),
    ] = False,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    count: Annotated[int, typer.Option(help="Samples measured of each cache.")] = 64,
    pictures: Annotated[
        bool, typer.Option(help="Decode latents for reconstructions, bounds and mistakes.")
    ] = True,
    json: choices.JsonOption = False,
) -> None:
    """Write one HTML page about runs and caches, to look at, print or send.

    \b
      ci2p-cache report runs/mine                           curves, mistakes
      ci2p-cache report runs/mine shards/                   and the cache
      ci2p-cache report runs/one runs/two --out both.html   side by side
      ci2p-cache report shards/ --no-pictures               in a second
      ci2p-cache report runs/* --table latex                a table of the runs
      ci2p-cache report runs/* --table csv --over-seeds     over seeds

    The page is one file under 5 MB, without scripts; it opens without a network. Several runs are
    compared with the first. Run `ci2p-cache evaluate` before: classes, confusions, calibration,
    intervals and mistakes come from the evaluation of the latest checkpoint, on the run's own
    validation split if there is one. The page shows pictures from the cache: think before you send
    it on. The command replaces only an earlier report.
    """
    if table is not None:
        if json or source is not None or not pictures:
            raise UsageError("--table takes none of --json, --source and --no-pictures")
        _table(paths, out, table, over_seeds)
        return
    if over_seeds:
        raise UsageError("--over-seeds is for a table; add --table markdown")
    from ci2p_cache.pictures.reconstructions import LatentIllustrator
    from ci2p_cache.report.html import write_report

    illustrator = LatentIllustrator(source=source, num_samples=count) if pictures else None
    summary = write_report(paths, out or Path("report.html"), illustrator=illustrator)
    for path in summary.skipped:
        render.notice(f"{path} is left out: no epoch of it has ended yet")
    if json:
        render.print_json(summary.to_dict())
    else:
        held = f"runs: {len(summary.runs)}, caches: {len(summary.caches)}"
        render.line(f"written: {summary.path} ({held}; {render.size(summary.bytes)})")
        render.line("next: open it in a browser")


def _table(paths: list[str], out: Path | None, format: TableFormat, over_seeds: bool) -> None:
    from ci2p_cache.report.tables import run_table, write_table

    if out is not None:
        write_table(paths, out, format=format, over_seeds=over_seeds)
        render.line(f"written: {out}")
        return
    for line in run_table(paths, format=format, over_seeds=over_seeds).splitlines():
        render.line(line)
