"""Pictures of run records: the curves of a training run."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ci2p_cache.report.summary import best_epoch_of, read_summary

__all__ = ["draw_curves"]

_SIZE_INCHES, _DPI = (10, 6), 100
"""1000 x 600 px, readable in a README and in a terminal that shows pictures."""

_TRAIN, _VAL, _TOP5, _WAIT = "#8a8a8a", "#1f5fa8", "#7fb2e5", "#b5651d"
"""Grey for what is trained on, blue for what is measured, brown for waiting."""

_MARKED_EPOCHS = 40
"""Up to this many epochs every one gets a dot; more would run together."""


def draw_curves(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Draws loss, accuracy and waiting share over the epochs of a run, as a PNG of 1000 x 600 px.

    Args:
        run_dir: A run folder with a `summary.csv`.
        path: Where the picture goes; None: `curves.png` in the run folder. Replaced whole.

    Returns:
        Where the picture is.

    Raises:
        InputDataError: there is no `summary.csv`, it lacks a column, or no epoch has ended yet.
    """
    run_dir = Path(run_dir)
    path = run_dir / "curves.png" if path is None else Path(path)
    columns = read_summary(run_dir)
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 1))
    loss, accuracy = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    wait = figure.add_subplot(grid[1, :])
    _draw_loss(loss, columns)
    _draw_accuracy(accuracy, columns)
    _line(wait, columns, "wait_share", _WAIT, "")
    wait.set(ylabel="waiting\nfor data", xlabel="epoch")
    wait.set_ylim(0, max(0.1, 1.1 * max(columns["wait_share"])))
    wait.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    wait.yaxis.set_major_locator(MaxNLocator(2))
    last = int(columns["epoch"][-1])
    for axes in (loss, accuracy, wait):
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(run_dir.resolve().name, columns))
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path


def _draw_loss(axes: Axes, columns: dict[str, list[float]]) -> None:
    _line(axes, columns, "loss", _TRAIN, "train")
    _line(axes, columns, "val_loss", _VAL, "validation")
    axes.set(xlabel="epoch", ylabel="cross-entropy", title="loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, columns: dict[str, list[float]]) -> None:
    _line(axes, columns, "train_top1", _TRAIN, "train top-1")
    _line(axes, columns, "top1", _VAL, "validation top-1")
    _line(axes, columns, "top5", _TOP5, "validation top-5")
    best = best_epoch_of(columns)
    if best is not None:
        axes.plot(*best, "o", color=_VAL, markersize=8, fillstyle="none")
    axes.set(xlabel="epoch", ylabel="images classified right", title="accuracy")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, loc="lower right")


def _line(axes: Axes, columns: dict[str, list[float]], name: str, color: str, label: str) -> None:
    """Draws a column over the epochs, unless the run never had it."""
    values = columns[name]
    if not all(map(math.isnan, values)):
        marker = "." if len(values) <= _MARKED_EPOCHS else ""
        axes.plot(columns["epoch"], values, marker=marker, color=color, label=label)


def _title(run: str, columns: dict[str, list[float]]) -> str:
    best = best_epoch_of(columns)
    if best is None:
        return f"{run}: {len(columns['epoch'])} epochs, no validation split"
    return f"{run}: best validation top-1 {best[1]:.1%} in epoch {best[0]:.0f}"
