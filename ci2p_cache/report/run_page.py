"""The sections of runs: how one went and where it is wrong; several against the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import read_row
from ci2p_cache.errors import CacheError
from ci2p_cache.report.charts import (
    NUM_COLORS,
    Line,
    calibration_chart,
    confusion_chart,
    line_chart,
    stacked_chart,
)
from ci2p_cache.report.compared import difference, few_names, seed_table
from ci2p_cache.report.data import RunData, is_encoded_again
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    details,
    duration,
    figure,
    image,
    markup,
    notice,
    percent,
    section,
    table,
    tiles,
    typed,
)
from ci2p_cache.runs.evaluations import Evaluation, Predictions
from ci2p_cache.runs.files import best_epoch_of, mean_wait_share, training_seconds
from ci2p_cache.runs.statistics import wilson_interval

if TYPE_CHECKING:
    from ci2p_cache.pictures.reconstructions import LatentIllustrator

__all__ = ["comparison_section", "run_section"]

_LISTED_CLASSES = 30
"""Up to this many all classes are listed; of more the best and worst."""
_DRAWN_CLASSES = 50
"""Up to so many classes the confusion matrix is drawn; of more its largest entries are listed."""
_LISTED_CONFUSIONS = 15

_CURVES = (
    ("Loss of {} over the epochs",
     "Loss over the epochs; label smoothing is in training's alone.",
     "epoch", "cross-entropy", False, (("train", "train_loss", 2), ("validation", "val_loss", 0))),
    ("Accuracy of {} over the epochs",
     "Top-1 over the epochs, and top-5 of the validation images.",
     "epoch", "accuracy", True,
     (("train", "train_top1", 2), ("validation", "val_top1", 0),
      ("validation top-5", "val_top5", 3))),
    ("Validation top-1 of {} over wall time",
     "Accuracy over wall time, validation included.",
     "minutes", "validation top-1", True, (("", "val_top1", 0),)),
    ("Share of the training time that {} waited for data",
     "Share of the training time spent waiting for data.",
     "epoch", "waiting for data", True, (("", "wait_share", 1),)),
    ("Training images per second of {}",
     "Throughput of training, waiting included.",
     "epoch", "images/s", False, (("", "images_per_second", 4),)),
    ("Learning rate of {} over the epochs",
     "Learning rate of each epoch's last step.",
     "epoch", "learning rate", False, (("", "lr", 5),)),
    ("Gradient norm of {} over the epochs",
     "L2 norm of all gradients together before clipping, mean of each epoch.",
     "epoch", "gradient norm", False, (("", "grad_norm", 7),)),
)  # fmt: skip
"""(title, caption, x, y, whether y is a share, (label, column, colour) of each line)."""


def run_section(
    run: RunData,
    *,
    anchor: str,
    cache: Cache | None,
    illustrator: LatentIllustrator | None,
    num_mistakes: int,
) -> Html:
    """Returns the section of a run, with its `num_mistakes` most confident mistakes.

    These are listed without pictures where there is no illustrator, or where `cache`, which it was
    trained from, cannot be reached.
    """
    parts = [
        markup(
            '<p class="lead">{}, trained from <code>{}</code>; last written {}</p>',
            run.model, run.cache, run.written,
        ),
        _headline(run),
        *(notice(*remark) for remark in run.remarks),
        Html("<p>This command trains with the same settings:</p>"),
        typed(run.command),
        section("Curves", markup('<div class="grid">{}</div>', _curves(run)), level=3),
    ]  # fmt: skip
    if run.evaluation is not None:
        parts.append(_evaluation(run, run.evaluation))
        if run.predictions is not None and num_mistakes:
            split = run.evaluation.split
            parts.append(_mistakes(run, run.predictions, split, cache, illustrator, num_mistakes))
    rows: list[list[Cell]] = [[name, value] for name, value in run.settings.items()]
    numerics: list[list[Cell]] = [[name, value] for name, value in run.numerics.items()]
    tables = (
        table("What binds the run", ["setting", "value"], rows),
        table("What it ran on", ["what", "value"], numerics),
    )
    both = markup('<div class="grid two">{}</div>', tables)
    parts.append(details("Settings and machine", both))
    return section(f"Run {run.name}", *parts, anchor=anchor)


def _headline(run: RunData) -> Html:
    columns = run.columns
    last, best = int(columns["epoch"][-1]), best_epoch_of(columns)
    entries: list[tuple[str, str, str]] = []
    if best is None:
        entries.append(("last training loss", f"{columns['train_loss'][-1]:.3f}", f"epoch {last}"))
    else:
        entries.append(("best top-1", percent(best[1]), f"validation, epoch {best[0]:.0f}"))
        entries.append(
            ("last top-1", percent(columns["val_top1"][-1]), f"validation, epoch {last}")
        )
    if run.evaluation is not None:
        note = f"{run.evaluation.samples:,} images of {run.evaluation.split}"
        if run.predictions is not None:
            correct = run.predictions.correct
            low, high = wilson_interval(int(correct.sum()), len(correct))
            note += f"; 95 % interval {percent(low)} to {percent(high)}"
        entries.append(("evaluated top-1", percent(run.evaluation.top1), note))
    seconds = columns["epoch_seconds"]
    rate = float(np.nanmedian(columns["images_per_second"]))
    entries += [
        ("wall time", duration(math.fsum(seconds)), f"{last} epochs"),
        ("per epoch", duration(float(np.nanmedian(seconds))), "median"),
        ("images/s", f"{rate:,.3g}", "of training, median"),
        ("waiting for data", percent(mean_wait_share(columns)), "of the training time"),
    ]
    if run.trained is not None:
        rest = (
            "; the rest is the frozen g_a" if run.parameters else "; the run has no copy of its g_a"
        )
        rest = "" if run.parameters == run.trained else rest
        entries.append(("parameters", _millions(run), f"{run.trained:,} trained{rest}"))
    return tiles(entries)


def _millions(run: RunData) -> str:
    return "-" if run.parameters is None else f"{run.parameters / 1e6:.2f} M"


def _curves(run: RunData) -> list[Html]:
    """Returns loss, accuracy, time and waiting over the epochs."""
    columns = run.columns
    x = {"epoch": columns["epoch"]}
    if any(map(math.isfinite, columns["val_top1"])):
        x["minutes"] = (np.nancumsum(columns["epoch_seconds"]) / 60).tolist()
    charts = []
    for title, caption, x_label, y_label, is_share, series in _CURVES:
        if x_label in x:
            lines = [Line(label, x[x_label], columns[each], color) for label, each, color in series]
            alt = title.format(run.name)
            chart = line_chart(alt, lines, x_label=x_label, y_label=y_label, is_share=is_share)
            charts.append(figure(chart, caption))
    train = np.nan_to_num(np.asarray(training_seconds(columns)))
    wait = train * np.nan_to_num(np.asarray(columns["wait_share"]))
    rest = np.maximum(np.nan_to_num(np.asarray(columns["epoch_seconds"])) - train, 0)
    alt = f"Seconds of each epoch of {run.name}: training, waiting, the rest"
    layers = [("training", train - wait, 0), ("waiting", wait, 1), ("the rest", rest, 2)]
    seconds = stacked_chart(alt, x["epoch"], [(label, y.tolist(), c) for label, y, c in layers])
    caption = "Where the time of an epoch goes; the rest is validation and checkpoints."
    return [*charts[:-4], figure(seconds, caption), *charts[-4:]]


def _evaluation(run: RunData, evaluation: Evaluation) -> Html:
    figures: list[Html] = [_class_table(run, evaluation)]
    matrix = _confusion(run, evaluation)
    wrong = [each for each in evaluation.confusion if each[0] != each[1]]
    wrong.sort(key=lambda each: (-each[2], each[0], each[1]))
    if wrong and matrix is None:
        rows: list[list[Cell]] = [
            [f"{run.title_of(label)} as {run.title_of(predicted)}", count]
            for label, predicted, count in wrong[:_LISTED_CONFUSIONS]
        ]
        figures.append(table("Most frequent confusions", ["taken", "images"], rows))
    bins = [
        (each.confidence, each.accuracy, each.samples)
        for each in evaluation.bins
        if each.samples > 0 and each.confidence is not None and each.accuracy is not None
    ]
    if bins:
        confidence, accuracy, samples = zip(*sorted(bins), strict=True)
        shares = [each / sum(samples) for each in samples]
        title = f"Accuracy of {run.name} over its confidence"
        text = (
            f"Calibration: below the dashed line the model is overconfident; larger dots stand for "
            f"more images. Expected calibration error {percent(evaluation.ece)}."
        )
        figures.append(figure(calibration_chart(title, confidence, accuracy, shares), text))
    if len(run.evaluations) > 1:
        figures.append(_all_evaluations(run))
    lead = markup(
        "<p>{}</p>",
        f"Checkpoint {evaluation.checkpoint} on {evaluation.samples:,} images of "
        f"{evaluation.split}: top-1 {percent(evaluation.top1)}, top-5 "
        f"{percent(evaluation.top5)}, {evaluation.nll:.3f} nats, calibration error "
        f"{percent(evaluation.ece)}.",
    )
    grid = markup('<div class="grid">{}</div>', figures)
    return section("Evaluation", lead, grid, *([matrix] if matrix else []), level=3)


def _confusion(run: RunData, evaluation: Evaluation) -> Html | None:
    """Returns the confusion matrix as a heat map; None with more classes than one can look at."""
    labels = sorted({label for pair in evaluation.confusion for label in pair[:2]})
    if not 1 < len(labels) <= _DRAWN_CLASSES:
        return None
    counts = np.zeros((len(labels), len(labels)))
    for label, predicted, count in evaluation.confusion:
        # A stranger's count may be any whole number.
        counts[labels.index(label), labels.index(predicted)] = min(max(count, 0), 2**53)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [run.title_of(label) for label in labels]
    wrong = shares - np.diag(np.diag(shares))
    row, column = divmod(int(wrong.argmax()), len(labels))
    text = "Confusion matrix: rows are the true classes, columns what their images were taken for. "
    if wrong.any():
        text += (
            f"The largest share off the diagonal: {percent(wrong[row, column])} of {names[row]}, "
            f"taken for {names[column]}."
        )
    drawn = figure(confusion_chart(f"{text} Run {run.name}.", names, shares), text)
    return markup('<div class="grid one">{}</div>', drawn)


def _all_evaluations(run: RunData) -> Html:
    rows: list[list[Cell]] = []
    for path, one in run.evaluations.items():
        origin = "the run's cache" if one.is_own_data else one.cache
        if is_encoded_again(path):
            origin += ", encoded again"
        rows.append([one.split, one.checkpoint, origin, one.samples, percent(one.top1)])
    return table("All evaluations", ["split", "checkpoint", "images of", "images", "top-1"], rows)


def _class_table(run: RunData, evaluation: Evaluation) -> Html:
    known = sorted(
        (each.correct / each.samples, each.label, each.samples)
        for each in evaluation.per_class
        if each.samples > 0
    )
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
    split: str,
    cache: Cache | None,
    illustrator: LatentIllustrator | None,
    count: int,
) -> Html:
    """Returns the mistakes that a run was most sure of, as pictures where they can be made."""
    wrong = np.flatnonzero(~predictions.correct)
    order = np.lexsort((predictions.row[wrong], -predictions.confidence[wrong]))
    chosen = wrong[order][:count].tolist()
    if not chosen:
        return section("Mistakes", Html("<p>None: every image is classified right.</p>"), level=3)
    samples = {int(predictions.row[i]): predictions.key[i] for i in chosen}
    pictures, reason = _pictures(run, split, samples, cache, illustrator)
    intro = (
        f"{len(wrong):,} of {len(predictions.correct):,} images are misclassified; these have "
        "the highest confidence."
    )
    if pictures:
        intro += " Pictures are decoded from the cached latents."
    cards = []
    for number, i in enumerate(chosen):
        label = run.title_of(int(predictions.label[i]))
        taken = run.title_of(int(predictions.predicted[i]))
        words = markup(
            "<b>{}</b> {}<br>is <b>{}</b><br><small>{}</small>",
            taken, percent(float(predictions.confidence[i]), 0), label, predictions.key[i],
        )  # fmt: skip
        picture = image(pictures[number], f"{label}, taken for {taken}") if pictures else Html("")
        cards.append(figure(picture, words))
    parts = [markup("<p>{}</p>", intro), *([notice(reason)] if reason else [])]
    parts.append(markup('<div class="thumbs">{}</div>', cards))
    return section("Most confident mistakes", *parts, level=3)


def _pictures(
    run: RunData,
    split: str,
    samples: dict[int, str],
    cache: Cache | None,
    illustrator: LatentIllustrator | None,
) -> tuple[list[bytes], str]:
    """Returns pictures of rows with these keys, or none and why there are none."""
    if illustrator is None:
        return [], "Shown without pictures: none were asked for."
    if cache is None or split not in cache:
        return [], f"Shown without pictures: {run.cache} is not there, or not the run's cache."
    try:
        for row, key in samples.items():
            if read_row(cache[split], row).key != key:
                return [], f"Shown without pictures: {cache.path} holds other images."
        return illustrator.thumbnails(cache, split, list(samples)), ""
    except CacheError as error:
        return [], f"Shown without pictures: {error}"


def comparison_section(runs: Sequence[RunData], *, anchor: str) -> Html:
    """Returns the section that compares runs with the first one."""
    base = runs[0].predictions
    differences = [difference([run], runs[:1]) for run in runs[1:]]
    parts = [
        _result_table(runs, differences),
        Html(
            "<p>Intervals are over the images: another draw of images would move the figures that "
            "far. Differences are paired, image by image; one whose interval holds 0 is none that "
            "these images show. What another seed would change is not in them.</p>"
        ),
        seed_table(runs),
    ]
    missing = [run.name for run in runs if run.predictions is None]
    if missing:
        parts.append(notice(f"Not evaluated, or without predictions: {few_names(missing)}."))
    other = [
        run.name
        for run, difference in zip(runs[1:], differences, strict=True)
        if base is not None and run.predictions is not None and difference is None
    ]
    if other:
        text = f"Evaluated on other images than {runs[0].name}, so not compared image by image: "
        parts.append(notice(f"{text}{few_names(other)}."))
    title = f"{len(runs)} runs compared"
    return section(title, *parts, _compared_curves(runs), _differing_settings(runs), anchor=anchor)


def _result_table(
    runs: Sequence[RunData], differences: Sequence[tuple[float, float, float] | None]
) -> Html:
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        best, columns, against = best_epoch_of(run.columns), run.columns, "the base"
        if number:
            points = differences[number - 1]
            against = "-" if points is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
        rows.append(
            [
                markup("{}{}", _swatch(number), run.name),
                run.model,
                _millions(run),
                "-" if best is None else f"{percent(best[1])} in {best[0]:.0f}",
                percent(columns["val_top1"][-1]),
                _evaluated(run),
                against,
                duration(float(np.nanmedian(columns["epoch_seconds"]))),
                percent(mean_wait_share(columns)),
            ]
        )
    head = [
        "run", "model", "parameters", "best top-1 in epoch", "last top-1", "evaluated top-1 [95 %]",
        "points over the first [95 %]", "per epoch", "waiting",
    ]  # fmt: skip
    return table("Results", head, rows)


def _evaluated(run: RunData) -> str:
    if run.evaluation is None or run.predictions is None:
        return "-" if run.evaluation is None else percent(run.evaluation.top1)
    right, count = int(run.predictions.correct.sum()), len(run.predictions.correct)
    low, high = wilson_interval(right, count)
    return f"{percent(right / count)} [{percent(low)}, {percent(high)}]"


def _compared_curves(runs: Sequence[RunData]) -> Html:
    names = [markup("<span>{}{}</span>", _swatch(i), run.name) for i, run in enumerate(runs)]
    legend = markup('<p class="legend">{}</p>', names)
    minutes = [(np.nancumsum(run.columns["epoch_seconds"]) / 60).tolist() for run in runs]
    epochs = [run.columns["epoch"] for run in runs]
    charts = []
    for name, title, x, x_label, y_label in (
        ("val_top1", "Validation top-1 over the epochs", epochs, "epoch", "validation top-1"),
        ("val_top1", "Validation top-1 over wall time", minutes, "minutes", "validation top-1"),
        ("val_loss", "Validation loss over the epochs", epochs, "epoch", "cross-entropy"),
        ("train_loss", "Training loss over the epochs", epochs, "epoch", "cross-entropy"),
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
            is_share=name in ("val_top1", "wait_share"),
        )
        charts.append(figure(chart, f"{title}."))
    return section("Curves", legend, markup('<div class="grid">{}</div>', charts), level=3)


def _swatch(number: int) -> Html:
    """Returns the run's mark: its colour, broken as its line is."""
    color, kind = number % NUM_COLORS, number // NUM_COLORS % 4
    return Html(f'<i class="swatch c{color} d{kind}" aria-hidden="true"></i>')


def _differing_settings(runs: Sequence[RunData]) -> Html:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    differing = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    same = len(names) - len(differing)
    text = f"{same} of {len(names)} settings are the same in all runs"
    if not differing:
        return section("Settings", markup("<p>{}.</p>", text), level=3)
    # Runs may be many and settings few, so runs stand below each other.
    rows: list[list[Cell]] = [
        [markup("{}{}", _swatch(i), run.name), *(run.settings.get(name, "-") for name in differing)]
        for i, run in enumerate(runs)
    ]
    return section(
        "Settings that differ",
        table("Settings that differ", ["run", *differing], rows, is_titled=True),
        markup("<p>{}; the section of a run lists them.</p>", text),
        level=3,
    )
