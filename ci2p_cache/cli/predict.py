"""`ci2p-cache predict`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import InputDataError

if TYPE_CHECKING:
    from ci2p_cache.inference.classifier import Prediction

__all__ = ["predict"]

_SHOWN_ERRORS = 10


def predict(
    run: choices.RunFolder,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns.", metavar="IMAGES...")
    ],
    top: Annotated[int, typer.Option(help="Classes shown for each image.")] = 5,
    checkpoint: choices.Checkpoint = "best",
    cache: choices.EncoderCache = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode [default: one per core].")
    ] = None,
    device: choices.Device = "auto",
    json: choices.Json = False,
) -> None:
    """Say what pictures show, with nothing but a run folder; the cache may be gone.

    \b
      ci2p-cache predict runs/vitds-1a2b3c4d rose.jpg
      ci2p-cache predict runs/vitds-1a2b3c4d holiday/ 'more/*.png' --top 3
      ci2p-cache predict runs/vitds-1a2b3c4d holiday/ --json > labels.json
      ci2p-cache predict runs/vitds-1a2b3c4d/checkpoints/epoch-0030-step-000000 rose.jpg

    The encoder, its quantisation and the model are those of the run: an image of the cache gets the
    logits that `evaluate` gives it. Images that cannot be read are named at the end, with exit
    code 3; the others are classified all the same.
    """
    from ci2p_cache.inference.classifier import load_classifier
    from ci2p_cache.process import tune_process

    tune_process(device)
    with ExitStack() as stack:
        line = stack.enter_context(render.ProgressLine("predict", unit="images"))
        classifier = load_classifier(run, checkpoint=checkpoint, cache=cache, device=device)
        for text in classifier.notices:
            render.notice(text)
        predictions = classifier.predict(
            images, top=top, batch_size=batch_size, threads=workers, on_progress=line.update
        )
    if json:
        render.print_json([prediction.to_dict() for prediction in predictions])
    else:
        _print(predictions)
    failed = [f"{p.path}: {p.error}" for p in predictions if p.error is not None]
    if failed:
        shown = "\n".join(f"  {text}" for text in failed[:_SHOWN_ERRORS])
        more = f"\n  ... and {len(failed) - _SHOWN_ERRORS:,} more" * (len(failed) > _SHOWN_ERRORS)
        raise InputDataError(
            f"{len(failed)} of {len(predictions)} could not be classified:\n{shown}{more}"
        )


def _print(predictions: list[Prediction]) -> None:
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
