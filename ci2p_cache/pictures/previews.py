"""Previews: what a cache remembers of its pictures, drawn beside the pictures themselves.

::

    original square | view 0 by g_s | view 1 by g_s | energy by position | energy by channel
                                                      one colour bar for all rows

Shape suffixes: M latent channels, h w latent rows and columns.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import read_row
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.errors import UsageError
from ci2p_cache.outputs import check_output, write_whole
from ci2p_cache.pictures.reconstructions import (
    Images,
    MeasuredRow,
    decode_row,
    load_decoder,
    opened_images,
    pixels,
)
from ci2p_cache.record import Record

__all__ = ["PreviewResult", "check_picture", "draw_preview"]

_FORMATS: dict[str, Literal["png", "jpg", "pdf"]] = {
    ".pdf": "pdf", ".jpeg": "jpg", ".jpg": "jpg", ".png": "png",
}  # fmt: skip
"""Suffix -> what a picture is written as."""

_MAX_SAMPLES = 64
"""More rows of panels make a picture that no viewer opens well."""

_UNLABELLED = 4
"""Samples shown of a cache without classes."""

_SHOWN_VIEWS = 2
"""The first two views of a sample show what the others are like."""

_STATE_WORDS = {"changed": "has changed", "missing": "not found"}

_MARK = b"ci2p-cache preview"
"""In the metadata of every picture, whatever its format."""

_DPI = 100
_MIN_PANEL_PX, _MAX_PANEL_PX = 256, 384
_GAP_PX = 16
_TITLE_PX = 30
_CAPTION_PX = 44
_HEAD_PX = 40
_SCALE_PX = 58
"""The colour bar, with its numbers and its unit."""
_FOOT_PX = 44
_AXIS_PX = 44
"""Room for the numbers left of the energy profile."""
_TITLE_CHARS = 110

_FONT = "DejaVu Sans"
"""It comes with matplotlib, so the same picture looks the same everywhere."""

_INK, _FAINT, _BAR = "#1a1a1a", "#666666", "#31688e"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewResult(Record):
    """What a preview shows."""

    path: str
    """The picture."""
    rounded: bool
    """Whether the stored latents are quantised; if not, nothing was rounded before g_s."""
    samples: tuple[MeasuredRow, ...]
    """Its rows, from the top."""


_Square = tuple[npt.NDArray[np.uint8] | None, str]
"""A picture (H, W, 3) and the lines below it; without one the words that stand there instead."""

_Panels = tuple[str, tuple[_Square, ...], npt.NDArray[np.float64]]
"""One row: a line above, the squares, and squared deviations of one latent, (M, h, w)."""


def draw_preview(
    cache: Cache,
    path: str | Path,
    *,
    split: str | None = None,
    rows: Sequence[int] | None = None,
    count: int | None = None,
    source: str | Path | None = None,
) -> PreviewResult:
    """Writes a picture of originals, reconstructions and the energy of the latents.

    Args:
        cache: The cache; `encoder.safetensors` in it is the decoder.
        path: The picture to write, .png, .jpg, .jpeg or .pdf. Of the files that may be there only
            an earlier preview is replaced, as a whole.
        split: Which split; None: the first one.
        rows: Which rows; None: as `count` says.
        count: Draws so many rows, spread evenly over those that hold a latent. None: one row of
            each class; of more than 64 classes 64, spread evenly; without labels four rows.
        source: Where the images are now; None: where they were when the cache was made, and if
            they are not there the picture says so.

    Raises:
        UsageError: a row does not exist or holds no latent, there are too many or none, or the
            path has another suffix, is a folder, or is in the cache or among its images.
        RefusedError: another file is at the path.
        SourceError: `source` is given and cannot be opened.
        ShardError: a shard or index part is damaged.
        WeightsError: the cache's encoder.safetensors is damaged.
        DigestError: it is another encoder than the one that made the latents.
        ResourceError: the picture cannot be written.
    """
    path = Path(path)
    check_picture(cache, path)
    part = cache[split if split is not None else cache.splits[0]]
    chosen = _chosen_rows(part, rows, count)
    encoder = load_decoder(cache)
    with opened_images(cache, source) as images:
        pairs = [_measure(part, row, images, encoder) for row in chosen]
    picture = _draw_figure(
        [panels for _, panels in pairs],
        _headings(part),
        _footer(cache),
        format=_FORMATS[path.suffix.lower()],
    )
    write_whole(path, picture, what="picture")
    return PreviewResult(
        path=str(path),
        rounded=part.latent.is_symbols,
        samples=tuple(sample for sample, _ in pairs),
    )


def check_picture(cache: Cache, path: Path) -> None:
    """Refuses a picture of a cache that `draw_preview` must not or cannot write, before it draws.

    Raises:
        UsageError, RefusedError, ResourceError: as `draw_preview` raises them about the path.
    """
    check_output(path, what="picture", suffixes=tuple(_FORMATS), mark=_MARK)
    images, folder = Path(cache.manifest.source).resolve(), path.parent.resolve()
    if images.is_dir() and folder != images and folder.is_relative_to(images):
        raise UsageError(
            f"{path} is among the images {images}, where the next `encode --rescan` would take "
            "it for one of them",
            hint="choose another place for the picture",
        )


def _chosen_rows(split: Split, rows: Sequence[int] | None, count: int | None) -> list[int]:
    """Returns the rows to draw; those asked for are checked when they are read."""
    stored = split.valid_rows
    if rows is None and not len(stored):
        raise UsageError(f"split {split.name!r} of {split.cache.path} holds no latent to draw")
    labels = split.labels[stored]
    classes = np.unique(labels[labels >= 0]).tolist()
    if rows is not None:
        chosen = list(rows)
    elif count is None and classes:
        shown = _spread(classes, _MAX_SAMPLES)
        chosen = [_spread(stored[labels == label].tolist(), 1)[0] for label in shown]
    else:
        chosen = _spread(stored.tolist(), _UNLABELLED if count is None else count)
    if not 1 <= len(chosen) <= _MAX_SAMPLES:
        raise UsageError(f"{len(chosen)} samples to draw; 1 to {_MAX_SAMPLES} fit a picture")
    return chosen


def _spread(values: list[int], count: int) -> list[int]:
    """Returns up to `count` values, the middles of equal parts: the first are no better."""
    wanted = min(count, len(values))
    return [values[(2 * i + 1) * len(values) // (2 * wanted)] for i in range(wanted)]


def _headings(split: Split) -> list[str]:
    views = split.cache.fingerprint.views
    if split.num_views == 1:
        return ["original", "decoded by g_s"]
    if views.kind == "flip":
        return ["original", "view 0, decoded by g_s", "view 1, the mirror, decoded"]
    return ["view 0, original", "view 0, decoded by g_s", "view 1, original", "view 1, decoded"]


def _footer(cache: Cache) -> tuple[str, str]:
    encoder, latent = cache.fingerprint.encoder, cache.fingerprint.latent
    stored = f"symbols, step {latent.step:g}" if latent.is_symbols else "y, nothing rounded"
    return (
        f"{encoder.arch} quality {encoder.quality} {encoder.metric}, weights "
        f"{encoder.weights_sha256[:12]}   |   {latent.dtype}: {stored}",
        "PSNR after clamping to [0, 1]   |   bpp by the entropy model   |   energy: squares of "
        "view 0 about the medians",
    )


def _measure(
    split: Split, row: int, images: Images | None, encoder: FrozenEncoder
) -> tuple[MeasuredRow, _Panels]:
    """Reads, decodes and measures one sample."""
    entry = read_row(split, row)
    if entry.status != "ok":
        raise UsageError(
            f"row {row} of split {split.name!r} ({entry.key}) holds no latent: {entry.error}",
            hint=f"choose other rows; {split.cache.path / 'errors.parquet'} lists the bad ones",
        )
    num_views = min(split.num_views, _SHOWN_VIEWS)
    measured, y_VMhw, decoded_VCHW, originals = decode_row(split, row, num_views, images, encoder)
    centre = encoder.medians[:, None, None] if encoder.has_symbols else 0.0
    energy_Mhw = (y_VMhw[0] - centre).double().square().numpy()
    title = measured.class_title or "no class"
    title += f"   |   {split.name} row {row}   |   {entry.key}"
    return measured, (title, _squares(split, measured, decoded_VCHW, originals), energy_Mhw)


def _squares(
    split: Split, measured: MeasuredRow, decoded_VCHW: Tensor, originals: Tensor | None
) -> tuple[_Square, ...]:
    """Returns the picture panels of a row, in the order of `_headings`."""
    size = split.cache.fingerprint.image.size
    squares: list[_Square] = []
    for view, decoded_CHW in enumerate(decoded_VCHW):
        if view == 0 or split.cache.fingerprint.views.kind == "crops":
            if originals is None:
                squares.append((None, f"source {_STATE_WORDS[measured.source]}"))
            else:
                squares.append((pixels(originals[view]), f"{size} x {size} pixels"))
        psnr_db, bpp = measured.psnr_db[view], measured.bpp[view]
        quality = "PSNR unknown" if psnr_db is None else f"{psnr_db:.2f} dB"
        rate = "no entropy model" if bpp is None else f"{bpp:.3f} bpp"
        if bpp is not None and not split.latent.is_symbols:
            rate += " if it were rounded"
        caption = f"{quality}, {rate}\n{measured.stored_bytes[view]:,} bytes stored"
        squares.append((pixels(decoded_CHW), caption))
    return tuple(squares)


def _draw_figure(
    rows: Sequence[_Panels],
    headings: Sequence[str],
    footer: Sequence[str],
    *,
    format: Literal["png", "jpg", "pdf"],
) -> bytes:
    """Draws rows of panels under common headings; the file holds `_MARK`."""
    sides = [len(picture) for _, row, _ in rows for picture, _ in row if picture is not None]
    # The pictures' own size where it is one to look at.
    panel_px = min(max([*sides, _MIN_PANEL_PX]), _MAX_PANEL_PX)
    columns = len(headings) + 2
    row_px = _TITLE_PX + panel_px + _CAPTION_PX
    width_px = columns * panel_px + (columns + 1) * _GAP_PX + _AXIS_PX
    height_px = _HEAD_PX + len(rows) * row_px + _SCALE_PX + _FOOT_PX
    figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    page = _Page(figure, width_px, height_px)
    lefts = [_GAP_PX + column * (panel_px + _GAP_PX) for column in range(columns)]
    lefts[-1] += _AXIS_PX
    names = [*headings, "latent energy by position", "latent energy by channel"]
    for left, heading in zip(lefts, names, strict=True):
        page.text(left, _HEAD_PX - 12, heading, size=10.5, weight="bold")
    maps = [np.sqrt(energy.sum(axis=0)) for _, _, energy in rows]
    scale = Normalize(min(map(np.min, maps)), max(map(np.max, maps)))
    for number, (title, squares, energy) in enumerate(rows):
        top = _HEAD_PX + number * row_px
        page.text(_GAP_PX, top + _TITLE_PX - 8, _shortened(title), size=10)
        _draw_row(page, squares, energy, scale, lefts, top + _TITLE_PX, panel_px)
    _draw_scale(page, scale, lefts[-2], _HEAD_PX + len(rows) * row_px, panel_px)
    for number, line in enumerate(footer):
        page.text(_GAP_PX, height_px - _FOOT_PX + 16 * (number + 1), line, size=9, color=_FAINT)
    # Without a date the same picture gives the same bytes.
    mark = _MARK.decode()
    options: dict[str, dict[str, Any]] = {
        "png": {"metadata": {"Software": mark}},
        "pdf": {"metadata": {"Creator": mark, "CreationDate": None}},
        "jpg": {"pil_kwargs": {"quality": 95, "comment": _MARK}},
    }
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, **options[format])
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class _Page:
    """A figure addressed in pixels from its top left corner."""

    figure: Figure
    width_px: int
    height_px: int

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        whole, tall = self.width_px, self.height_px
        bottom = tall - top - height
        return self.figure.add_axes((left / whole, bottom / tall, width / whole, height / tall))

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
            left / self.width_px, 1 - base / self.height_px, _printable(text), fontfamily=_FONT,
            fontsize=size, fontweight=weight, color=color, verticalalignment="baseline",
            # A file name may hold dollar signs, which are no formulas.
            parse_math=False,
        )  # fmt: skip


def _draw_row(
    page: _Page, squares: Sequence[_Square], energy_Mhw: npt.NDArray[np.float64], scale: Normalize,
    lefts: list[int], top: int, panel_px: int,
) -> None:  # fmt: skip
    captions = [caption if picture is not None else "" for picture, caption in squares]
    for (picture, caption), left in zip(squares, lefts, strict=False):
        axes = page.axes(left, top, panel_px, panel_px)
        axes.set_xticks([])
        axes.set_yticks([])
        if picture is not None:
            # Pixels stay squares where they fit a whole number of times.
            fits = panel_px % len(picture) == 0
            axes.imshow(picture, interpolation="nearest" if fits else "antialiased")
            axes.set_axis_off()
            continue
        axes.set_facecolor("#eeeeee")
        axes.text(
            0.5, 0.5, caption, ha="center", va="center", color=_FAINT, fontsize=11,
            fontfamily=_FONT,
        )  # fmt: skip
        for spine in axes.spines.values():
            spine.set_color("#cccccc")
    root = np.sqrt(energy_Mhw.sum(axis=0))
    axes = page.axes(lefts[-2], top, panel_px, panel_px)
    axes.imshow(root, cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_axis_off()
    captions.append(f"root sum of squares over channels:\n{root.min():.3g} to {root.max():.3g}")
    captions.append(_draw_profile(page, energy_Mhw, lefts[-1], top, panel_px))
    for caption, left in zip(captions, lefts, strict=True):
        for number, line in enumerate(caption.split("\n")):
            page.text(left, top + panel_px + 16 + 16 * number, line, size=9)


def _draw_scale(page: _Page, scale: Normalize, left: int, top: int, panel_px: int) -> None:
    """Draws the colour bar of all maps."""
    axes = page.axes(left, top + 4, panel_px, 12)
    page.figure.colorbar(ScalarMappable(scale, "viridis"), cax=axes, orientation="horizontal")
    axes.tick_params(labelsize=8, colors=_FAINT, length=3, labelfontfamily=_FONT)
    page.text(left, top + 50, "one scale for all rows, in the unit of y", size=9)


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


def _shortened(text: str) -> str:
    """Cuts the middle out of a long line: both ends of a path say more than its middle."""
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
