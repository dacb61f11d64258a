"""What people see: the only module that prints. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from ci2p_cache.errors import CacheError, size

# rich takes a fifth of what `--help` and a completion take, and neither needs it: it is imported
# where something is shown.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "ProgressLine",
    "duration",
    "fail",
    "heading",
    "line",
    "notice",
    "print_json",
    "print_table",
    "size",
    "status",
]

_MAX_TEXT = 20_000
_MAX_CELL = 500
"""Characters shown of one text or table cell; names from a stranger's cache may have megabytes."""

_FIRST_SECONDS, _LOG_SECONDS = 5.0, 30.0
"""Between two lines of progress where the output is no terminal: in the first minute, and later."""

_BAR_COLUMNS = 70
"""Width of a terminal from which on a bar fits beside what it stands for."""


@cache
def _out() -> Console:
    from rich.console import Console

    # A file or another program has no right margin.
    width = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, emoji=False, soft_wrap=True, width=width)


@cache
def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def duration(seconds: float | None) -> str:
    """Formats a number of seconds; "?" where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _clean(text: str, *, longest: int = _MAX_TEXT, keep: str = "") -> str:
    """Returns text that a terminal only shows: names in a cache may come from a stranger.

    Control and direction characters, and bytes that are not text, become escapes; rich's markup is
    taken literally.

    Args:
        text: What to show.
        longest: Characters shown at most.
        keep: Characters that stay although they do not print.
    """
    from rich.markup import escape

    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text):,} characters)"
    if not text.isprintable():
        text = "".join(
            char
            if char.isprintable() or char in keep
            else char.encode("unicode_escape").decode("ascii")
            for char in text
        )
    return escape(text)


def line(text: str = "") -> None:
    """Prints a line of the result, on stdout."""
    _out().print(_clean(text))


def heading(text: str) -> None:
    """Prints a heading of the result, on stdout."""
    _out().print(f"[bold]{_clean(text)}[/bold]")


def notice(text: str) -> None:
    """Prints something the user should know, on stderr."""
    _err().print(f"[yellow]note:[/yellow] {_clean(text)}")


def status(text: str) -> None:
    """Prints a line about what is going on, on stderr."""
    _err().print(_clean(text))


def print_json(data: Any) -> None:
    """Prints one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """Prints a table on stdout; numbers are set flush right."""
    from rich.table import Table

    table = Table(title=_clean(title) or None, title_justify="left", box=None, pad_edge=False)
    rows = [list(row) for row in rows]
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        right = bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)
        table.add_column(_clean(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(
            *(
                f"{cell:,}" if isinstance(cell, int) else _clean(str(cell), longest=_MAX_CELL)
                for cell in row
            )
        )
    _out().print(table)


def fail(error: CacheError) -> None:
    """Prints an error and how to continue, on stderr."""
    _err().print(f"[bold red]error:[/bold red] {_clean(str(error), keep=chr(10))}")
    if error.hint:
        _err().print(f"[bold]try:[/bold]   {_clean(error.hint, keep=chr(10))}")


class ProgressLine:
    """A progress bar on a terminal; elsewhere a plain line now and then.

    rich's own bar writes a single line at the very end where the output is not a terminal.

    Args:
        label: What is going on, for example "encode".
        unit: What is counted, for example "images".
    """

    def __init__(self, label: str, *, unit: str) -> None:
        self._label = label
        self._unit = unit
        self._bar: Progress | None = None
        self._started = time.monotonic()
        # What takes a second or less, a refusal for one, shows no progress.
        self._next = self._started + 1
        if _err().is_terminal:
            from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

            columns: tuple[ProgressColumn, ...] = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            if _err().width < _BAR_COLUMNS:
                columns = (TextColumn("{task.description} {task.fields[text]}"),)
            self._bar = Progress(*columns, console=_err(), transient=True)
            self._task = self._bar.add_task(_clean(label), total=None, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, *, detail: str = "", eta: float | None = None) -> None:
        """Shows how far it is."""
        counts = f"{done:,}/{total:,} {self._unit}".rstrip()
        left = f"{duration(eta)} left" if eta is not None else ""
        # What matters most comes first: a narrow terminal cuts off the end.
        text = _clean(", ".join(filter(None, [counts, left, detail])))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif (now := time.monotonic()) >= self._next:
            self._next = now + (_FIRST_SECONDS if now < self._started + 60 else _LOG_SECONDS)
            _err().print(f"{_clean(self._label)}: {text}")
