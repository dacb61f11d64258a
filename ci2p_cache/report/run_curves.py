"""The curves of one run: loss, accuracy, time and waiting over its epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ci2p_cache.report.charts import Line, line_chart, stacked_chart
from ci2p_cache.report.elements import Html, element, figure, section
from ci2p_cache.report.run_data import RunData
from ci2p_cache.report.summary import training_seconds

__all__ = ["curves_section"]


def curves_section(run: RunData) -> Html:
    """Returns the section with the curves of a run."""
    charts = [*_scores(run), _seconds(run), *_speed(run)]
    return section("Curves", element("div", *charts, class_="grid"), level=3)


def _scores(run: RunData) -> list[Html]:
    columns = run.columns
    epochs, top1 = columns["epoch"], columns["top1"]
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
        minutes = (np.nancumsum(columns["epoch_seconds"]) / 60).tolist()
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
    return charts


def _seconds(run: RunData) -> Html:
    return figure(
        stacked_chart(
            f"Seconds of each epoch of {run.name}: training, waiting, the rest",
            run.columns["epoch"],
            _layers(run.columns),
        ),
        "Where the time of an epoch goes; the rest is validation and checkpoints.",
    )


def _speed(run: RunData) -> list[Html]:
    columns = run.columns
    epochs = columns["epoch"]
    return [
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


def _layers(columns: dict[str, list[float]]) -> list[tuple[str, Sequence[float], int]]:
    train = np.nan_to_num(np.asarray(training_seconds(columns)))
    wait = train * np.nan_to_num(np.asarray(columns["wait_share"]))
    rest = np.nan_to_num(np.asarray(columns["epoch_seconds"])) - train
    return [
        ("training", (train - wait).tolist(), 0),
        ("waiting", wait.tolist(), 1),
        ("the rest", np.maximum(rest, 0).tolist(), 2),
    ]
