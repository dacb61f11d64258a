"""Pieces of an HTML page that escape whatever they are given.

Only `Html` is taken as markup; every `str` is text. Class names, keys, paths and settings come from
files that may be a stranger's, so nothing builds markup from them but the functions here.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

__all__ = [
    "Cell",
    "Html",
    "bar",
    "details",
    "duration",
    "figure",
    "image",
    "markup",
    "notice",
    "percent",
    "plain",
    "section",
    "table",
    "tiles",
    "typed",
    "visible",
]

_MAX_TEXT = 300
"""Characters shown of one text: a name from a stranger's cache may have megabytes."""


@dataclass(frozen=True, slots=True)
class Html:
    """Markup, put into the page as it is."""

    text: str
    """The markup."""


Cell = Html | str | int | float | None
"""What a table cell takes; None is shown as a dash, floats with four significant digits."""


def plain(text: str, *, longest: int = _MAX_TEXT) -> str:
    """Returns text that a page only shows: `visible`, and escaped."""
    return html.escape(visible(text, longest=longest), quote=True)


def visible(text: str, *, longest: int = _MAX_TEXT) -> str:
    """Returns text cut, with control and direction characters as escapes.

    It may hold lone surrogates, as file names do.
    """
    if len(text) > longest:
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
            for char in text
        )
    return text


def markup(template: str, *parts: Html | str | Iterable[Html]) -> Html:
    """Fills the `{}` of our template: text is escaped, markup joined."""

    def text(part: Html | str | Iterable[Html]) -> str:
        if isinstance(part, Html):
            return part.text
        return plain(part) if isinstance(part, str) else "".join(each.text for each in part)

    return Html(template.format(*map(text, parts)))


def section(title: str, *parts: Html, level: int = 2, anchor: str = "") -> Html:
    """Returns a titled section; `anchor` is what the list of contents points to."""
    given = markup(' id="{}"', anchor) if anchor else ""
    return markup(f"<section{{}}><h{level}>{{}}</h{level}>{{}}</section>", given, title, parts)


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, is_titled: bool = False
) -> Html:
    """Returns a table in a box that scrolls sideways; the first column heads its row.

    Numbers are set flush right. With `is_titled` a heading above says what the caption says, which
    is then only read out.
    """
    lines = [list(row) for row in rows]
    numbers = [
        {type(row[i]) for row in lines} <= {int, float, type(None)}
        and any(row[i] is not None for row in lines)
        for i in range(len(head))
    ]

    def row_of(values: Sequence[Cell], scope: str = "") -> Html:
        cells = []
        for i, (value, is_number) in enumerate(zip(values, numbers, strict=True)):
            scoped = scope or ("row" if i == 0 else "")
            tag = "th" if scoped else "td"
            given = ' class="n"' * is_number + f' scope="{scoped}"' * bool(scoped)
            content = value if isinstance(value, Html) else _written(value)
            cells.append(markup(f"<{tag}{given}>{{}}</{tag}>", content))
        return markup("<tr>{}</tr>", cells)

    away = ' class="away"' if is_titled else ""
    return markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table>'
        f"<caption{away}>{{}}</caption><thead>{{}}</thead><tbody>{{}}</tbody></table></div>",
        caption, caption, row_of(head, "col"), map(row_of, lines),
    )  # fmt: skip


def tiles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Returns headline figures: (name, figure, what stands small below it)."""
    one = "<div><dt>{}</dt><dd><strong>{}</strong><small>{}</small></dd></div>"
    return markup('<dl class="tiles">{}</dl>', [markup(one, *entry) for entry in entries])


def figure(body: Html, caption: Html | str) -> Html:
    """Returns a picture or chart with its caption."""
    return markup("<figure>{}<figcaption>{}</figcaption></figure>", body, caption)


def image(jpeg: bytes, alt: str) -> Html:
    """Returns a picture with its bytes in the page."""
    width, height = Image.open(io.BytesIO(jpeg)).size
    data = base64.b64encode(jpeg).decode("ascii")
    return markup(
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{{}}" '
        'loading="eager">',
        alt,
    )


def bar(share: float, text: str) -> Html:
    """Returns a figure with a bar behind it as long as `share`, 0 to 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return markup(f'<span class="bar"><i style="width:{width:.1f}%"></i><b>{{}}</b></span>', text)


def notice(text: str, command: str = "") -> Html:
    """Returns a remark on what is missing, with the command that makes it."""
    return markup('<p class="notice">{} {}</p>', text, typed(command) if command else "")


def typed(command: str) -> Html:
    """Returns a command on its own line, to be copied."""
    return Html(f'<code class="typed">{plain(command, longest=2000)}</code>')


def details(summary: str, *parts: Html) -> Html:
    """Returns what is shown when it is asked for; print shows the summary."""
    return markup("<details><summary>{}</summary>{}</details>", summary, parts)


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
