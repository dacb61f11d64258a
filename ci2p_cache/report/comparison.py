"""The section that holds several runs against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ci2p_cache.report.charts import NUM_COLORS, Line, line_chart
from ci2p_cache.report.elements import (
    Cell,
    Html,
    duration,
    element,
    figure,
    join,
    notice,
    percent,
    section,
    table,
)
from ci2p_cache.report.run_data import RunData
from ci2p_cache.report.statistics import Estimate, accuracy, paired_difference
from ci2p_cache.report.summary import best_epoch_of, mean_wait_share

__all__ = ["comparison_section"]


def comparison_section(runs: Sequence[RunData], *, anchor: str) -> Html:
    """Returns the section that compares runs; the first is what the others are held against."""
    return section(
        f"{len(runs)} runs compared",
        _result_table(runs),
        *_difference_notes(runs),
        _curves(runs),
        _differing_settings(runs),
        anchor=anchor,
    )


def _result_table(runs: Sequence[RunData]) -> Html:
    base = runs[0]
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        best = best_epoch_of(run.columns)
        columns = run.columns
        difference: Estimate | None = None
        if number and run.predictions is not None and base.predictions is not None:
            difference = paired_difference(run.predictions, base.predictions)
        rows.append(
            [
                join(_swatch(number), run.name),
                run.model,
                "-" if best is None else f"{percent(best[1])} in {best[0]:.0f}",
                percent(columns["top1"][-1]),
                _evaluated(run),
                _signed(difference) if number else "the base",
                duration(float(np.nanmedian(columns["epoch_seconds"]))),
                percent(mean_wait_share(columns)),
            ]
        )
    head = [
        "run", "model", "best top-1 in epoch", "last top-1", "evaluated top-1 [95 %]",
        "points over the first [95 %]", "per epoch", "waiting",
    ]  # fmt: skip
    return table("Results", head, rows)


def _evaluated(run: RunData) -> str:
    if run.evaluation is None:
        return "-"
    if run.predictions is None:
        return percent(run.evaluation.top1)
    known = accuracy(run.predictions.correct)
    return f"{percent(known.value)} [{percent(known.low)}, {percent(known.high)}]"


def _signed(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _difference_notes(runs: Sequence[RunData]) -> list[Html]:
    """Says how to read the intervals, and why a difference is missing."""
    notes = [
        element(
            "p",
            "Intervals are over the images: another draw of images would move the figures that "
            "far. Differences are paired, image by image; one whose interval holds 0 is none that "
            "these images show. What another seed would change is not in them.",
        )
    ]
    base = runs[0].predictions
    missing = [run.name for run in runs if run.predictions is None]
    if missing:
        notes.append(notice(f"Not evaluated, or without predictions: {_listed(missing)}."))
    if base is not None:
        other = [
            run.name
            for run in runs[1:]
            if run.predictions is not None and paired_difference(run.predictions, base) is None
        ]
        if other:
            notes.append(
                notice(
                    f"Evaluated on other images than {runs[0].name}, so not compared image by "
                    f"image: {_listed(other)}."
                )
            )
    return notes


def _listed(names: Sequence[str]) -> str:
    shown = 8
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _curves(runs: Sequence[RunData]) -> Html:
    legend = element(
        "p", *(element("span", _swatch(i), run.name) for i, run in enumerate(runs)), class_="legend"
    )
    minutes = [(np.nancumsum(run.columns["epoch_seconds"]) / 60).tolist() for run in runs]
    epochs = [run.columns["epoch"] for run in runs]
    charts = []
    for name, title, x, x_label, y_label in (
        ("top1", "Validation top-1 over the epochs", epochs, "epoch", "validation top-1"),
        ("top1", "Validation top-1 over wall time", minutes, "minutes", "validation top-1"),
        ("val_loss", "Validation loss over the epochs", epochs, "epoch", "cross-entropy"),
        ("loss", "Training loss over the epochs", epochs, "epoch", "cross-entropy"),
        ("epoch_seconds", "Seconds per epoch", epochs, "epoch", "seconds"),
        ("wait_share", "Share of training time waiting for data", epochs, "epoch", "waiting"),
    ):
        lines = [Line("", x[i], run.columns[name], i) for i, run in enumerate(runs)]
        if not any(map(math.isfinite, (y for line in lines for y in line.y))):
            continue
        chart = line_chart(
            f"{title}, of {len(runs)} runs",
            lines,
            x_label=x_label,
            y_label=y_label,
            is_share=name in ("top1", "wait_share"),
        )
        charts.append(figure(chart, f"{title}."))
    return section("Curves", legend, element("div", *charts, class_="grid"), level=3)


def _swatch(number: int) -> Html:
    """Returns the run's mark: its colour, broken as its line is."""
    kind = number // NUM_COLORS % 4
    return element("i", class_=f"swatch c{number % NUM_COLORS} d{kind}", aria_hidden="true")


def _differing_settings(runs: Sequence[RunData]) -> Html:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    differing = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    same = len(names) - len(differing)
    text = f"{same} of {len(names)} settings are the same in all runs"
    if not differing:
        return section("Settings", element("p", f"{text}."), level=3)
    # Runs may be many and settings few, so runs stand below each other.
    rows: list[list[Cell]] = [
        [join(_swatch(i), run.name), *(run.settings.get(name, "-") for name in differing)]
        for i, run in enumerate(runs)
    ]
    return section(
        "Settings that differ",
        table("Settings that differ", ["run", *differing], rows, is_titled=True),
        element("p", f"{text}; the section of a run lists them."),
        level=3,
    )
