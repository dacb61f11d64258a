"""The drawing of a preview: rows of squares, an energy map and an energy profile, laid out in px.

It knows nothing of caches: `previews` says what is in each panel and under it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter

__all__ = ["MARK", "PreviewRow", "Square", "draw_figure"]

MARK = b"ci2p-cache preview"
"""In the metadata of every picture, whatever its format."""

_DPI = 100
_MIN_PANEL_PX, _MAX_PANEL_PX = 256, 384
_GAP_PX = 16
_TITLE_PX = 30
_CAPTION_PX = 44
_HEAD_PX = 40
_FOOT_PX = 44
_AXIS_PX = 44
"""Room for the numbers left of the energy profile."""
_TITLE_CHARS = 110

_FONT = "DejaVu Sans"
"""It comes with matplotlib, so the same picture looks the same everywhere."""

_INK, _FAINT, _BAR = "#1a1a1a", "#666666", "#31688e"


@dataclass(frozen=True, slots=True)
class Square:
    """One picture panel."""

    pixels: npt.NDArray[np.uint8] | None
    """(H, W, 3), 0-255; None for a panel that holds words instead."""
    caption: str
    """At most two lines below it."""
    words: str = ""
    """What stands in the panel instead of a picture."""


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row of panels."""

    title: str
    """A line above the panels."""
    squares: tuple[Square, ...]
    """As many as there are headings."""
    energy: npt.NDArray[np.float64]
    """Squared deviations of one latent, (M, h, w)."""


def draw_figure(
    rows: Sequence[PreviewRow],
    headings: Sequence[str],
    footer: Sequence[str],
    *,
    format: Literal["png", "jpg", "pdf"],
) -> bytes:
    """Draws rows of panels under common headings.

    Args:
        rows: At least one.
        headings: One per square of a row.
        footer: At most two lines at the bottom.
        format: What kind of file.

    Returns:
        The file, with `MARK` in it; the same arguments give the same pixels.
    """
    panel_px = _panel_px(rows)
    columns = len(headings) + 2
    row_px = _TITLE_PX + panel_px + _CAPTION_PX
    width_px = columns * panel_px + (columns + 1) * _GAP_PX + _AXIS_PX
    height_px = _HEAD_PX + len(rows) * row_px + _FOOT_PX
    figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    page = _Page(figure, width_px, height_px)
    lefts = [_GAP_PX + column * (panel_px + _GAP_PX) for column in range(columns)]
    lefts[-1] += _AXIS_PX
    names = [*headings, "latent energy by position", "latent energy by channel"]
    for left, heading in zip(lefts, names, strict=True):
        page.text(left, _HEAD_PX - 12, heading, size=10.5, weight="bold")
    for number, row in enumerate(rows):
        top = _HEAD_PX + number * row_px
        page.text(_GAP_PX, top + _TITLE_PX - 8, _shortened(row.title), size=10)
        _draw_row(page, row, lefts, top + _TITLE_PX, panel_px)
    for number, line in enumerate(footer):
        page.text(_GAP_PX, height_px - _FOOT_PX + 16 * (number + 1), line, size=9, color=_FAINT)
    buffer, mark = io.BytesIO(), MARK.decode()
    if format == "jpg":
        figure.savefig(buffer, format=format, pil_kwargs={"quality": 95, "comment": MARK})
    else:
        # Without a date the same picture gives the same bytes.
        metadata: dict[str, Any] = (
            {"Software": mark} if format == "png" else {"Creator": mark, "CreationDate": None}
        )
        figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()


class _Page:
    """A figure addressed in pixels from its top left corner."""

    def __init__(self, figure: Figure, width_px: int, height_px: int) -> None:
        self.figure = figure
        self.width_px = width_px
        self.height_px = height_px

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height_px - top - height
        box = (
            left / self.width_px,
            bottom / self.height_px,
            width / self.width_px,
            height / self.height_px,
        )
        return self.figure.add_axes(box)

    def text(
        self,
        left: float,
        base: float,
        text: str,
        *,
        size: float,
        weight: str = "normal",
        color: str = _INK,
    ) -> None:
        self.figure.text(
            left / self.width_px,
            1 - base / self.height_px,
            _printable(text),
            fontfamily=_FONT,
            fontsize=size,
            fontweight=weight,
            color=color,
            verticalalignment="baseline",
            # A file name may hold dollar signs, which are no formulas.
            parse_math=False,
        )


def _draw_row(page: _Page, row: PreviewRow, lefts: list[int], top: int, panel_px: int) -> None:
    total = row.energy.sum(axis=0)
    captions = [square.caption for square in row.squares]
    for square, left in zip(row.squares, lefts, strict=False):
        axes = page.axes(left, top, panel_px, panel_px)
        axes.set_xticks([])
        axes.set_yticks([])
        if square.pixels is None:
            axes.set_facecolor("#eeeeee")
            axes.text(
                0.5,
                0.5,
                square.words,
                ha="center",
                va="center",
                color=_FAINT,
                fontsize=11,
                fontfamily=_FONT,
            )
            for spine in axes.spines.values():
                spine.set_color("#cccccc")
        else:
            axes.imshow(square.pixels, interpolation=_interpolation(square.pixels, panel_px))
            axes.set_axis_off()
    axes = page.axes(lefts[-2], top, panel_px, panel_px)
    axes.imshow(np.sqrt(total), cmap="viridis", interpolation="nearest")
    axes.set_axis_off()
    low, high = np.sqrt(total.min()), np.sqrt(total.max())
    captions.append(f"root sum of squares over channels:\ndark {low:.3g}, bright {high:.3g}")
    captions.append(_draw_profile(page, row.energy, lefts[-1], top, panel_px))
    for caption, left in zip(captions, lefts, strict=True):
        for number, line in enumerate(caption.split("\n")):
            page.text(left, top + panel_px + 16 + 16 * number, line, size=9)


def _draw_profile(
    page: _Page, energy_Mhw: npt.NDArray[np.float64], left: int, top: int, panel_px: int
) -> str:
    """Draws each channel's mean energy, sorted, and returns the caption."""
    energy = np.sort(energy_Mhw.mean(axis=(1, 2)))[::-1]
    axes = page.axes(left, top + 2, panel_px, panel_px - 22)
    positive = energy > 0
    if positive.any():
        floor = max(energy[positive].min() / 2, energy[0] * 1e-7)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(floor, energy[0] * 2)
        # One outline: a bar for each channel takes a quarter of the time of the whole picture.
        edges = np.arange(positive.sum() + 1) + 0.5
        axes.stairs(energy[positive], edges, baseline=floor, fill=True, color=_BAR)
    axes.set_xlim(0.5, len(energy) + 0.5)
    axes.set_xticks([1, len(energy) // 2, len(energy)])
    axes.minorticks_off()
    axes.tick_params(labelsize=8, colors=_FAINT, length=3, labelfontfamily=_FONT)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color("#999999")
    shares = np.cumsum(energy) / max(energy.sum(), 1e-30)
    half, most = (int(np.searchsorted(shares, share)) + 1 for share in (0.5, 0.9))
    return (
        f"mean square; 0 in {int((~positive).sum())} of {len(energy)} channels;\n"
        f"half of all in {min(half, len(energy))}, 90 % in {min(most, len(energy))} channels"
    )


def _panel_px(rows: Sequence[PreviewRow]) -> int:
    """Returns the side of a panel: the pictures' own where it is of a size to look at."""
    sides = [
        square.pixels.shape[0]
        for row in rows
        for square in row.squares
        if square.pixels is not None
    ]
    return min(max([*sides, _MIN_PANEL_PX]), _MAX_PANEL_PX)


def _interpolation(pixels: npt.NDArray[np.uint8], panel_px: int) -> str:
    """Keeps pixels as squares where they fit a whole number of times, so nothing is smoothed."""
    return "nearest" if panel_px % pixels.shape[0] == 0 else "antialiased"


def _shortened(text: str) -> str:
    """Cuts the middle out of a long line: both ends of a path tell more than its middle."""
    if len(text) <= _TITLE_CHARS:
        return text
    half = (_TITLE_CHARS - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _printable(text: str) -> str:
    """Returns text with what the font cannot draw, or what would break the line, as escapes."""
    known = get_font(findfont(FontProperties(family=_FONT))).get_charmap()
    return "".join(
        char
        if ord(char) in known and char.isprintable()
        else char.encode("ascii", "backslashreplace").decode()
        for char in text
    )
