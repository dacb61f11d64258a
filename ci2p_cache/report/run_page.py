"""The section of one run: how it went, what it reached, and where it is wrong."""

from __future__ import annotations

import math

import numpy as np

from ci2p_cache.cache.store import Cache
from ci2p_cache.report.charts import calibration_chart
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    details,
    duration,
    element,
    figure,
    notice,
    percent,
    section,
    table,
    tiles,
)
from ci2p_cache.report.evaluations import Evaluation
from ci2p_cache.report.mistakes import mistakes_section
from ci2p_cache.report.pictures import Illustrator
from ci2p_cache.report.run_curves import curves_section
from ci2p_cache.report.run_data import RunData
from ci2p_cache.report.statistics import accuracy
from ci2p_cache.report.summary import best_epoch_of, mean_wait_share

__all__ = ["run_section"]

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
        curves_section(run),
    ]
    if run.evaluation is not None:
        parts.append(_evaluation(run, run.evaluation))
    if run.predictions is not None and num_mistakes:
        parts.append(mistakes_section(run, run.predictions, cache, illustrator, count=num_mistakes))
    parts.append(_settings(run))
    return section(f"Run {run.name}", *parts, anchor=anchor)


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
        ("waiting for data", percent(mean_wait_share(columns)), "of the training time"),
    ]
    return tiles(entries)


def _evaluated_tile(run: RunData, evaluation: Evaluation) -> tuple[str, str, str]:
    note = f"{evaluation.samples:,} images of {evaluation.split}"
    if run.predictions is not None:
        known = accuracy(run.predictions.correct)
        note += f"; 95 % interval {percent(known.low)} to {percent(known.high)}"
    return ("evaluated top-1", percent(evaluation.top1), note)


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
    if len(run.evaluations) > 1:
        figures.append(_all_evaluations(run))
    lead = element(
        "p",
        f"Checkpoint {evaluation.checkpoint} on {evaluation.samples:,} images of "
        f"{evaluation.split}: top-1 {percent(evaluation.top1)}, top-5 "
        f"{percent(evaluation.top5)}, {evaluation.nll:.3f} nats, calibration error "
        f"{percent(evaluation.ece)}.",
    )
    return section("Evaluation", lead, element("div", *figures, class_="grid"), level=3)


def _all_evaluations(run: RunData) -> Html:
    rows: list[list[Cell]] = []
    for one in run.evaluations:
        origin = "the run's cache" if one.is_own_data else one.cache
        if one.is_encoded_again:
            origin += ", encoded again"
        rows.append([one.split, one.checkpoint, origin, one.samples, percent(one.top1)])
    return table("All evaluations", ["split", "checkpoint", "images of", "images", "top-1"], rows)


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
