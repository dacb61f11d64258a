"""Charts as inline SVG: text stays text, colours follow the page, the same figures the same bytes.

matplotlib draws with placeholder colours, which are then replaced by the page's own variables, so
that one drawing serves light and dark. `draw_curves` is for people without the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ci2p_cache.outputs import write_whole
from ci2p_cache.report.elements import Html, markup, plain
from ci2p_cache.runs.files import best_epoch_of, read_summary

__all__ = [
    "NUM_COLORS",
    "Line",
    "calibration_chart",
    "confusion_chart",
    "draw_curves",
    "energy_chart",
    "histogram",
    "line_chart",
    "stacked_chart",
]

NUM_COLORS = 8
"""Series colours of the page; further series take them again with broken lines."""

_WIDTH_INCHES, _HEIGHT_INCHES = 4.6, 2.7
"""331 units of the drawing, shown in about as many pixels: three beside each other on a wide page,
one on a phone."""

_BOX, _LEGEND_SHARE = (0.15, 0.19, 0.81, 0.77), 0.07
"""Where the axes are, and what a legend above takes of their height: neighbours line up."""

_MAX_POINTS = 400
"""Points of one line; a chart has fewer pixels."""
_MARKED_POINTS = 12
"""Up to this many points every one gets a dot."""

_INK, _FAINT = "#010101", "#020202"
_SERIES = tuple(f"#0300{number:02x}" for number in range(NUM_COLORS))
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--faint)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES)},
}
"""Placeholder -> what the page's stylesheet defines, for light and for dark."""

_CELL_PX = ((12, 36), (25, 20), (1000, 13))
"""Up to so many classes, how wide a cell of a confusion matrix is; in the widest there is room for
its figure."""
_LABEL_CHARS = 18
"""Characters of a class name beside a confusion matrix."""
_LEVELS, _LEGEND_SHARES = 20, (0.01, 0.05, 0.25, 0.5, 1.0)
"""Shades of a confusion matrix, and shares whose shades are explained."""

_DASHES = ("-", "--", ":", "-.")

_TRAIN, _VAL, _TOP5, _WAIT = "#8a8a8a", "#1f5fa8", "#7fb2e5", "#b5651d"
"""Colours of `draw_curves`: grey for training, blue for validation, brown for waiting."""

_MARKED_EPOCHS = 40
"""Up to this many epochs every one gets a dot; more would run together."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9.5,
    "text.color": _INK, "text.parse_math": False, "path.simplify": False,
    "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _FAINT, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK, "xtick.major.size": 3.0, "ytick.major.size": 3.0,
    "lines.linewidth": 1.6, "lines.markersize": 4.0,
    "legend.frameon": False, "legend.fontsize": 9.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    label: str
    """Its name in the legend; empty for none."""
    x: Sequence[float]
    """Ascending."""
    y: Sequence[float]
    """As long as x; nan leaves a gap."""
    color: int
    """Number of its colour; from `NUM_COLORS` on the line is broken."""


def line_chart(
    alt: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    is_share: bool = False,
) -> Html:
    """Draws lines.

    Args:
        alt: Describes the chart for screen readers; also distinguishes the charts of a page.
        lines: At least one with a point.
        x_label: Below the axis; "epoch" gives whole numbers.
        y_label: Beside the axis.
        is_share: Whether y is a share, shown as percent from 0.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        shown = [line for line in lines if any(map(math.isfinite, line.y))]
        top = max((abs(y) for line in shown for y in line.y if math.isfinite(y)), default=0.0)
        exponent = math.floor(math.log10(top)) if not is_share and 0 < top < 0.01 else 0
        for line in shown:
            x, y = _thinned(line.x, line.y)
            axes.plot(
                x,
                [value / 10.0**exponent for value in y],
                _DASHES[line.color // NUM_COLORS % len(_DASHES)],
                color=_SERIES[line.color % NUM_COLORS],
                marker="o" if len(x) <= _MARKED_POINTS else "",
                label=line.label,
            )
        axes.set(xlabel=x_label, ylabel=f"{y_label}, 1e{exponent}" if exponent else y_label)
        if x_label == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if is_share:
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
            axes.set_ylim(0, _share_limit([y for line in shown for y in line.y]))
        if any(line.label for line in shown):
            _legend(axes)
        return _svg(figure, alt)


def stacked_chart(
    alt: str, x: Sequence[float], layers: Sequence[tuple[str, Sequence[float], int]]
) -> Html:
    """Draws layers of seconds per epoch on top of each other: (label, seconds, colour)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        thinned = [_thinned(x, values) for _, values, _ in layers]
        places = np.asarray(thinned[0][0])
        below = np.zeros(len(places))
        width = 0.8 * (float(np.min(np.diff(places))) if len(places) > 1 else 1.0)
        for (label, _, color), (_, values) in zip(layers, thinned, strict=True):
            height = np.nan_to_num(np.asarray(values))
            if len(places) <= 60:
                axes.bar(places, height, width, bottom=below, color=_SERIES[color], label=label)
            else:
                axes.fill_between(
                    places, below, below + height, color=_SERIES[color], label=label, linewidth=0
                )
            below = below + height
        axes.set(xlabel="epoch", ylabel="seconds")
        axes.set_ylim(0, max(float(below.max(initial=0)) * 1.05, 1e-9))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _legend(axes)
        return _svg(figure, alt)


def histogram(alt: str, values: Sequence[float], *, x_label: str, y_label: str) -> Html:
    """Draws how often values occur, with their median as a line."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        axes.hist(values, bins=min(24, max(4, len(values) // 3)), color=_SERIES[0])
        axes.axvline(float(np.median(values)), color=_SERIES[1], linewidth=1.4)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, alt)


def energy_chart(alt: str, energy: npt.NDArray[np.float64], dead: npt.NDArray[np.bool_]) -> Html:
    """Draws the mean squares (M,) of channels, the largest first, on a logarithmic axis.

    Channels that are `dead`, bool (M,), because they never change, are red.
    """
    order = np.argsort(-energy, kind="stable")
    energy, dead = energy[order], dead[order]
    positive = energy > 0
    floor = max(float(energy[positive].min(initial=np.inf)) / 2, float(energy.max()) * 1e-7)
    if not np.isfinite(floor) or floor <= 0:
        floor = 1e-9
    places = np.arange(1, len(energy) + 1)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        axes.set_yscale("log")
        axes.set_ylim(floor, max(float(energy.max()), floor) * 2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        alive = positive & ~dead
        axes.fill_between(
            places, floor, np.where(alive, energy, floor), step="mid", color=_SERIES[0], linewidth=0
        )
        if dead.any():
            axes.plot(
                places[dead], np.full(int(dead.sum()), floor * 1.3), "x", color=_SERIES[1],
                label="dead", clip_on=False,
            )  # fmt: skip
            _legend(axes)
        axes.set_xlim(0.5, len(energy) + 0.5)
        axes.minorticks_off()
        axes.set(xlabel="channels, by energy", ylabel="mean square")
        return _svg(figure, alt)


def calibration_chart(
    alt: str, confidence: Sequence[float], accuracy: Sequence[float], share: Sequence[float]
) -> Html:
    """Draws accuracy over confidence, one dot per bin, its area growing with the bin's share."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        axes.plot([0, 1], [0, 1], "--", color=_FAINT, linewidth=1.0)
        axes.plot(confidence, accuracy, color=_SERIES[0], linewidth=1.0)
        areas = 12 + 220 * np.asarray(share, np.float64)
        axes.scatter(confidence, accuracy, areas.tolist(), color=_SERIES[0], linewidths=0)
        axes.set(xlabel="confidence", ylabel="accuracy")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_percent))
        return _svg(figure, alt)


def confusion_chart(alt: str, names: Sequence[str], shares: npt.NDArray[np.float64]) -> Html:
    """Draws a confusion matrix as a heat map that scrolls sideways, with a legend below.

    The colour's strength is the root of the share, so that rare confusions are seen too.

    Args:
        alt: Describes the chart for screen readers.
        names: Of the K classes.
        shares: (K, K), a row per true class, a column per predicted one; 0 to 1.
    """
    count = len(names)
    side = next(px for most, px in _CELL_PX if count <= most)
    # Figures stay readable on the strongest shade.
    strongest = 0.55 if side == _CELL_PX[0][1] else 1.0
    labels = [n if len(n) <= _LABEL_CHARS else f"{n[: _LABEL_CHARS - 2]}.." for n in names]
    # In em: letters of some scripts are twice as wide.
    edge = round(30 + 11 * max(sum(0.57 if ord(c) < 0x1100 else 1.0 for c in n) for n in labels))
    places = [round(edge + (i + 0.5) * side) + 4 for i in range(count)]
    texts = [_text(edge, 11, "predicted class"), _text(11, edge, "true class", turn=True, at="end")]
    for label, place in zip(labels, places, strict=True):
        texts.append(_text(edge - 6, place, label, at="end"))
        texts.append(_text(place, edge - 6, label, turn=True))
    shades: dict[float, list[str]] = {}
    for row, column in zip(*np.nonzero(shares), strict=True):
        share = float(shares[row, column])
        shade = strongest * math.ceil(_LEVELS * math.sqrt(share)) / _LEVELS
        shades.setdefault(shade, []).append(f"M{column} {row}h.96v.96h-.96z")
        if strongest < 1:
            figures = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            texts.append(_text(places[column] - 4, places[row], figures, at="middle"))
    cells = "".join(
        f'<path fill-opacity="{shade:.3g}" d="{"".join(paths)}"/>'
        for shade, paths in sorted(shades.items())
    )
    wide, high = max(edge + count * side, edge + 90) + 2, edge + count * side + 2
    legend = "".join(
        f'<span><i class="shade" style="opacity:{strongest * share**0.5:.3g}"></i>{share:.0%}'
        "</span>"
        for share in _LEGEND_SHARES
    )
    return markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}">'
        f'<svg class="matrix" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        'role="img" aria-label="{}" font-size="11" fill="var(--ink)">'
        f'<g transform="translate({edge} {edge}) scale({side})">'
        f'<path fill="var(--page)" d="M0 0h{count}v{count}h-{count}z"/>'
        f'<g fill="var(--series-0)">{cells}</g></g>{{}}</svg></div>'
        f'<p class="legend"><span>share of the true class</span>{legend}</p>',
        alt, alt, texts,
    )  # fmt: skip


def _text(x: int, y: int, words: str, *, at: str = "start", turn: bool = False) -> Html:
    """Returns words of a drawing that start at a point, end there, or have it in their middle."""
    turned = " rotate(-90)" if turn else ""
    place = f'transform="translate({x} {y}){turned}" text-anchor="{at}"'
    return markup(f"<text {place}>{{}}</text>", words)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=100)
    FigureCanvasSVG(figure)
    return figure, figure.add_axes(_BOX)


def _share_limit(values: Sequence[float]) -> float:
    """Returns the top of an axis of shares: 100 % with room for a dot, less where all are small."""
    top = max((value for value in values if math.isfinite(value)), default=1.0)
    return 1.04 if top > 0.5 else max(1.25 * top, 0.01)


def _legend(axes: Axes) -> None:
    """Names what is drawn above the axes, where nothing is drawn over."""
    left, bottom, width, height = _BOX
    axes.set_position((left, bottom, width, height - _LEGEND_SHARE))
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, handlelength=1.2,
        handletextpad=0.4, columnspacing=1.2, borderpad=0.2,
    )  # fmt: skip


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.3g}%"


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns at most `_MAX_POINTS` points, evenly taken, first and last among them."""
    if len(x) <= _MAX_POINTS:
        return list(x), list(y)
    chosen = np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int).tolist()
    return [x[i] for i in chosen], [y[i] for i in chosen]


def _svg(figure: Figure, alt: str) -> Html:
    """Returns the figure as an element; its ids are its own, its numbers have two decimals."""
    sink = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": alt}):
        figure.savefig(
            sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = sink.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    # The style element would rule the whole page, whose stylesheet has its lines.
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.S)
    # Groups are named alike in every chart; only what is referred to keeps its name.
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    # Coordinates, not the numbers at the axes.
    text = re.sub(r"(?<![#\w.])-?\d+\.\d{3,}(?![\d<])", lambda m: f"{float(m[0]):.2f}", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    for waste in (
        r" font-family: 'DejaVu Sans';",
        r' transform="rotate\(-0 [^"]*"',
        "xlink:(?=href)",
    ):
        text = re.sub(waste, "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    return Html(f'<svg class="chart" {box[0]} role="img" aria-label="{plain(alt)}">{rest}'.rstrip())


def draw_curves(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Draws loss, accuracy and waiting share over the epochs of a run, as a PNG of 1000 x 600 px.

    Args:
        run_dir: A run folder with a `summary.csv`.
        path: Where the picture is written; None: `curves.png` in the run folder.

    Returns:
        Where the picture is.

    Raises:
        InputDataError: there is no `summary.csv`, it lacks a column, or no epoch has ended yet.
        ResourceError: the picture cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "curves.png" if path is None else Path(path)
    columns = read_summary(run_dir)
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 1))
    loss, accuracy = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    wait = figure.add_subplot(grid[1, :])

    def line(axes: Axes, name: str, color: str, label: str = "") -> None:
        """Draws a column over the epochs, unless the run never had it."""
        values = columns[name]
        if not all(map(math.isnan, values)):
            marker = "." if len(values) <= _MARKED_EPOCHS else ""
            axes.plot(columns["epoch"], values, marker=marker, color=color, label=label)

    line(loss, "train_loss", _TRAIN, "train")
    line(loss, "val_loss", _VAL, "validation")
    loss.set(xlabel="epoch", ylabel="cross-entropy", title="loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    line(accuracy, "train_top1", _TRAIN, "train top-1")
    line(accuracy, "val_top1", _VAL, "validation top-1")
    line(accuracy, "val_top5", _TOP5, "validation top-5")
    title = f"{run_dir.resolve().name}: {len(columns['epoch'])} epochs, no validation split"
    best = best_epoch_of(columns)
    if best is not None:
        accuracy.plot(*best, "o", color=_VAL, markersize=8, fillstyle="none")
        title = (
            f"{run_dir.resolve().name}: best validation top-1 {best[1]:.1%} in epoch {best[0]:.0f}"
        )
    accuracy.set(xlabel="epoch", ylabel="images classified right", title="accuracy")
    accuracy.set_ylim(0, 1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracy.legend(frameon=False, loc="lower right")
    line(wait, "wait_share", _WAIT)
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
    figure.suptitle(title)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    write_whole(path, sink.getvalue(), what="picture")
    return path
