"""The section of one run: how it went, what it reached, and where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ci2p_cache.cache.sample_card import read_row
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import CacheError
from ci2p_cache.report.charts import Line, calibration_chart, line_chart, stacked_chart
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    details,
    element,
    figure,
    image,
    join,
    notice,
    percent,
    section,
    table,
    tiles,
)
from ci2p_cache.report.pictures import Illustrator, Picture
from ci2p_cache.report.run_data import Evaluation, Predictions, RunData
from ci2p_cache.report.statistics import accuracy
from ci2p_cache.report.summary import best_epoch_of

__all__ = ["duration", "mean_wait_share", "run_section"]

_LISTED_CLASSES = 30
"""Up to this many all classes are listed; of more the best and worst."""
_LISTED_CONFUSIONS = 15


def run_section(
    run: RunData,
    *,
    anchor: str,
    cache: Cache | None,
    illustrator: Illustrator | None,
    num_mistakes: int,
) -> Html:
    """Returns the section of a run.

    Args:
        run: The run.
        anchor: What the list of contents points to.
        cache: The cache it was trained from; None where that cannot be reached.
        illustrator: Decodes the mistakes; None: they are listed without pictures.
        num_mistakes: How many of the most confident mistakes are shown.
    """
    remarks = [notice(remark.text, remark.command) for remark in run.remarks]
    parts = [
        element("p", f"{run.model}, trained from ", element("code", run.cache), class_="lead"),
        _headline(run),
        *remarks,
        _curves(run),
    ]
    if run.evaluation is not None:
        parts.append(_evaluation(run, run.evaluation))
    if run.predictions is not None and num_mistakes:
        parts.append(_mistakes(run, run.predictions, cache, illustrator, num_mistakes))
    parts.append(_settings(run))
    return section(f"Run {run.name}", *parts, anchor=anchor)


def mean_wait_share(run: RunData) -> float:
    """Returns which share of the training time of all epochs was spent waiting for data."""
    wait = train = 0.0
    for seconds, share in zip(_training_seconds(run), run.columns["wait_share"], strict=True):
        if math.isfinite(seconds) and math.isfinite(share):
            wait, train = wait + seconds * share, train + seconds
    return wait / train if train else math.nan


def duration(seconds: float) -> str:
    """Formats seconds."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _headline(run: RunData) -> Html:
    columns = run.columns
    last, best = int(columns["epoch"][-1]), best_epoch_of(columns)
    entries: list[tuple[str, str, str]] = []
    if best is None:
        entries.append(("last training loss", f"{columns['loss'][-1]:.3f}", f"epoch {last}"))
    else:
        entries.append(("best top-1", percent(best[1]), f"validation, epoch {best[0]:.0f}"))
        entries.append(("last top-1", percent(columns["top1"][-1]), f"validation, epoch {last}"))
    if run.evaluation is not None:
        entries.append(_evaluated_tile(run, run.evaluation))
    seconds = columns["epoch_seconds"]
    rate = float(np.nanmedian(columns["images_per_second"]))
    entries += [
        ("wall time", duration(math.fsum(seconds)), f"{last} epochs"),
        ("per epoch", duration(float(np.nanmedian(seconds))), "median"),
        ("images/s", f"{rate:,.3g}", "of training, median"),
        ("waiting for data", percent(mean_wait_share(run)), "of the training time"),
    ]
    return tiles(entries)


def _evaluated_tile(run: RunData, evaluation: Evaluation) -> tuple[str, str, str]:
    note = f"{evaluation.samples:,} images of {evaluation.split}"
    if run.predictions is not None:
        known = accuracy(run.predictions.correct)
        note += f"; 95 % interval {percent(known.low)} to {percent(known.high)}"
    return ("evaluated top-1", percent(evaluation.top1), note)


def _curves(run: RunData) -> Html:
    columns = run.columns
    epochs = columns["epoch"]
    minutes = (np.nancumsum(columns["epoch_seconds"]) / 60).tolist()
    top1 = columns["top1"]
    charts = [
        figure(
            line_chart(
                f"Loss of {run.name} over the epochs",
                [
                    Line("train", epochs, columns["loss"], 2),
                    Line("validation", epochs, columns["val_loss"], 0),
                ],
                x_label="epoch",
                y_label="cross-entropy",
            ),
            "Loss over the epochs; label smoothing is in training's alone.",
        ),
        figure(
            line_chart(
                f"Accuracy of {run.name} over the epochs",
                [
                    Line("train", epochs, columns["train_top1"], 2),
                    Line("validation", epochs, top1, 0),
                    Line("validation top-5", epochs, columns["top5"], 3),
                ],
                x_label="epoch",
                y_label="classified right",
                is_share=True,
            ),
            "Top-1 over the epochs, and top-5 of the validation images.",
        ),
    ]
    if any(map(math.isfinite, top1)):
        charts.append(
            figure(
                line_chart(
                    f"Validation top-1 of {run.name} over wall time",
                    [Line("", minutes, top1, 0)],
                    x_label="minutes",
                    y_label="validation top-1",
                    is_share=True,
                ),
                "Accuracy over wall time, validation included.",
            )
        )
    charts += [
        figure(
            stacked_chart(
                f"Seconds of each epoch of {run.name}: training, waiting, the rest",
                epochs,
                _layers(run),
            ),
            "Where the time of an epoch goes; the rest is validation and checkpoints.",
        ),
        figure(
            line_chart(
                f"Share of the training time that {run.name} waited for data",
                [Line("", epochs, columns["wait_share"], 1)],
                x_label="epoch",
                y_label="waiting for data",
                is_share=True,
            ),
            "Share of the training time spent waiting for data.",
        ),
        figure(
            line_chart(
                f"Training images per second of {run.name}",
                [Line("", epochs, columns["images_per_second"], 4)],
                x_label="epoch",
                y_label="images/s",
            ),
            "Throughput of training, waiting included.",
        ),
    ]
    return section("Curves", element("div", *charts, class_="grid"), level=3)


def _training_seconds(run: RunData) -> list[float]:
    """Returns the seconds that each epoch trained, without validation; never more than it took."""
    columns = run.columns
    return [
        min(images / rate, whole) if rate > 0 else math.nan
        for images, rate, whole in zip(
            columns["images"], columns["images_per_second"], columns["epoch_seconds"], strict=True
        )
    ]


def _layers(run: RunData) -> list[tuple[str, Sequence[float], int]]:
    train = np.nan_to_num(np.asarray(_training_seconds(run)))
    wait = train * np.nan_to_num(np.asarray(run.columns["wait_share"]))
    rest = np.nan_to_num(np.asarray(run.columns["epoch_seconds"])) - train
    return [
        ("training", (train - wait).tolist(), 0),
        ("waiting", wait.tolist(), 1),
        ("the rest", np.maximum(rest, 0).tolist(), 2),
    ]


def _evaluation(run: RunData, evaluation: Evaluation) -> Html:
    figures: list[Html] = [_class_table(run, evaluation)]
    if evaluation.confusions:
        rows: list[list[Cell]] = [
            [f"{run.title_of(label)} as {run.title_of(predicted)}", count]
            for label, predicted, count in evaluation.confusions[:_LISTED_CONFUSIONS]
        ]
        figures.append(table("Most frequent confusions", ["taken", "images"], rows))
    if evaluation.bins:
        total = sum(one.samples for one in evaluation.bins)
        chart = calibration_chart(
            f"Accuracy of {run.name} over its confidence",
            [one.confidence for one in evaluation.bins],
            [one.accuracy for one in evaluation.bins],
            [one.samples / total for one in evaluation.bins],
        )
        text = (
            f"Calibration: below the broken line it is too sure of itself; larger dots are more "
            f"images. Expected calibration error {percent(evaluation.ece)}."
        )
        figures.append(figure(chart, text))
    lead = element(
        "p",
        f"Checkpoint {evaluation.checkpoint} on {evaluation.samples:,} images of "
        f"{evaluation.split}: top-1 {percent(evaluation.top1)}, top-5 "
        f"{percent(evaluation.top5)}, {evaluation.nll:.3f} nats, calibration error "
        f"{percent(evaluation.ece)}.",
    )
    return section("Evaluation", lead, element("div", *figures, class_="grid"), level=3)


def _class_table(run: RunData, evaluation: Evaluation) -> Html:
    known = [
        (right / samples, label, samples)
        for label, samples, right in evaluation.per_class
        if samples > 0
    ]
    known.sort(key=lambda one: (one[0], one[1]))
    caption = "Accuracy per class, the worst first"
    if len(known) > _LISTED_CLASSES:
        half = _LISTED_CLASSES // 2
        caption = f"The {half} worst and the {half} best of {len(known):,} classes"
        known = [*known[:half], *known[-half:]]
    rows: list[list[Cell]] = [
        [run.title_of(label), bar(share, percent(share, 0)), samples]
        for share, label, samples in known
    ]
    return table(caption, ["class", "right", "images"], rows)


def _mistakes(
    run: RunData,
    predictions: Predictions,
    cache: Cache | None,
    illustrator: Illustrator | None,
    count: int,
) -> Html:
    wrong = np.flatnonzero(~predictions.correct)
    order = np.lexsort((predictions.row[wrong], -predictions.confidence[wrong]))
    chosen = wrong[order][:count].tolist()
    if not chosen:
        return section("Mistakes", element("p", "None: every image is classified right."), level=3)
    split = run.evaluation.split if run.evaluation is not None else "val"
    samples = {int(predictions.row[i]): predictions.key[i] for i in chosen}
    pictures, told = _pictures(run, split, samples, cache, illustrator)
    cards = []
    for place, i in enumerate(chosen):
        label = run.title_of(int(predictions.label[i]))
        taken = run.title_of(int(predictions.predicted[i]))
        words = join(
            element("b", taken),
            f" {percent(float(predictions.confidence[i]), 0)}",
            element("br"),
            "is ",
            element("b", label),
            element("br"),
            element("small", predictions.key[i]),
        )
        if pictures is None:
            cards.append(element("figure", element("figcaption", words)))
        else:
            alt = f"{label}, taken for {taken}"
            cards.append(figure(image(pictures[place], alt), words))
    intro = (
        f"{len(wrong):,} of {len(predictions.correct):,} images are classified wrong; these with "
        "the highest confidence. Pictures are decoded from the cached latents."
        if pictures is not None
        else f"{len(wrong):,} of {len(predictions.correct):,} images are classified wrong; these "
        "with the highest confidence."
    )
    parts = [element("p", intro), *([notice(told)] if told else [])]
    return section(
        "Most confident mistakes", *parts, element("div", *cards, class_="thumbs"), level=3
    )


def _pictures(
    run: RunData,
    split: str,
    samples: dict[int, str],
    cache: Cache | None,
    illustrator: Illustrator | None,
) -> tuple[list[Picture] | None, str]:
    """Returns pictures of rows with these keys, or None and why there are none."""
    if illustrator is None:
        return None, "Shown without pictures: none were asked for."
    if cache is None or split not in cache:
        return None, f"Shown without pictures: {run.cache} is not there, or not the run's cache."
    try:
        for row, key in samples.items():
            if read_row(cache[split], row).key != key:
                return None, f"Shown without pictures: {cache.path} holds other images."
        return illustrator.thumbnails(cache, split, list(samples)), ""
    except CacheError as error:
        return None, f"Shown without pictures: {error}"


def _settings(run: RunData) -> Html:
    rows: list[list[Cell]] = [[name, value] for name, value in run.settings.items()]
    numerics: list[list[Cell]] = [[name, value] for name, value in run.numerics.items()]
    return details(
        "Settings and machine",
        element(
            "div",
            table("What binds the run", ["setting", "value"], rows),
            table("What it ran on", ["what", "value"], numerics),
            class_="grid two",
        ),
    )
