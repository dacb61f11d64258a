"""Pieces of an HTML page that escape whatever they are given.

Only `Html` is taken as markup; every `str` is text. Class names, keys, paths and settings come from
files that may be a stranger's, so nothing builds markup from them but the functions here.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ci2p_cache.report.pictures import Picture

__all__ = [
    "Cell",
    "Html",
    "bar",
    "details",
    "duration",
    "element",
    "figure",
    "image",
    "join",
    "notice",
    "percent",
    "plain",
    "section",
    "size",
    "table",
    "tiles",
]

_MAX_TEXT = 300
"""Characters shown of one text: a name from a stranger's cache may have megabytes."""


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that stands in the page as it is."""

    text: str
    """The markup."""


Cell = Html | str | int | float | None
"""What a table cell takes; None is shown as a dash, floats with four significant digits."""


def plain(text: str, *, longest: int = _MAX_TEXT) -> str:
    """Returns text that a page only shows: escaped, cut, control and direction characters visible.

    Args:
        text: Anything, also with lone surrogates, as file names have them.
        longest: Characters shown at most.
    """
    if len(text) > longest:
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
            for char in text
        )
    return html.escape(text, quote=True)


def element(tag: str, *children: Html | str, **attributes: str | bool) -> Html:
    """Returns an element; a trailing underscore of an attribute's name is dropped.

    Args:
        tag: Its name, one of ours.
        children: Texts, which are escaped, and markup.
        attributes: Values, which are escaped; True gives the bare name, False leaves it out.
    """
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{plain(str(value), longest=10_000)}"')
        for name, value in attributes.items()
        if value is not False
    )
    if tag in ("img", "meta", "br"):
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{join(*children).text}</{tag}>")


def join(*children: Html | str) -> Html:
    """Returns children one after another."""
    return Html("".join(c.text if isinstance(c, Html) else plain(c) for c in children))


def section(title: str, *parts: Html, level: int = 2, anchor: str = "") -> Html:
    """Returns a titled section; `anchor` is what the list of contents points to."""
    heading = element(f"h{level}", title)
    return element("section", heading, *parts, **({"id": anchor} if anchor else {}))


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, is_titled: bool = False
) -> Html:
    """Returns a table in a box that scrolls sideways; the first column heads its row.

    Args:
        caption: What it shows.
        head: Column names.
        rows: Cells; numbers are set flush right.
        is_titled: Whether a heading above says what the caption says, which is then only read out.
    """
    lines = [list(row) for row in rows]
    right = [
        bool(lines)
        and all(isinstance(row[i], (int, float)) or row[i] is None for row in lines)
        and any(row[i] is not None for row in lines)
        for i in range(len(head))
    ]

    def cell(tag: str, value: Cell, number: int, scope: str | bool = False) -> Html:
        kind = "n" if right[number] else False
        content = value if isinstance(value, Html) else _written(value)
        return element(tag, content, class_=kind, scope=scope)

    body = [
        element(
            "tr",
            *(
                cell("th" if i == 0 else "td", value, i, "row" if i == 0 else False)
                for i, value in enumerate(row)
            ),
        )
        for row in lines
    ]
    names = element("tr", *(cell("th", name, i, "col") for i, name in enumerate(head)))
    whole = element(
        "table",
        element("caption", caption, class_="away" if is_titled else False),
        element("thead", names),
        element("tbody", *body),
    )
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def tiles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Returns headline figures: (name, figure, what stands small below it)."""
    shown = [
        element(
            "div",
            element("dt", name),
            element("dd", element("strong", value), element("small", note)),
        )
        for name, value, note in entries
    ]
    return element("dl", *shown, class_="tiles")


def figure(body: Html, caption: Html | str, *, wide: bool = False) -> Html:
    """Returns a picture or chart with what is to be seen in it."""
    return element("figure", body, element("figcaption", caption), class_="wide" if wide else False)


def image(picture: Picture, alt: str) -> Html:
    """Returns a picture with its bytes in the page."""
    data = base64.b64encode(picture.jpeg).decode("ascii")
    return Html(
        f'<img src="data:image/jpeg;base64,{data}" width="{picture.width_px}" '
        f'height="{picture.height_px}" alt="{plain(alt)}" loading="eager">'
    )


def bar(share: float, text: str) -> Html:
    """Returns a figure with a bar behind it as long as `share`, 0 to 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Html(f'<span class="bar"><i style="width:{width:.1f}%"></i><b>{plain(text)}</b></span>')


def notice(text: str, command: str = "") -> Html:
    """Returns a remark on what is missing, with the command that makes it."""
    told = element("code", Html(plain(command, longest=2000))) if command else ""
    return element("p", text, Html(" "), told, class_="notice")


def details(summary: str, *parts: Html) -> Html:
    """Returns what is shown when it is asked for; print shows the summary."""
    return element("details", element("summary", summary), *parts)


def size(num_bytes: float) -> str:
    """Formats a number of bytes, 1000-based."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def percent(share: float | None, digits: int = 1) -> str:
    """Formats a share; a dash where there is none."""
    return "-" if share is None or share != share else f"{share:.{digits}%}"


def duration(seconds: float) -> str:
    """Formats seconds; a dash where they are not known."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _written(value: str | int | float | None) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
