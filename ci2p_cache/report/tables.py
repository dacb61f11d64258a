"""`run_table`: what several runs reached, as a table for a paper, a README or a spreadsheet.

It has a row for each run, or one for each configuration: the runs that differ in their seed alone.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import describe
from ci2p_cache.errors import CacheError, InputDataError, ManifestError
from ci2p_cache.outputs import check_output, write_whole
from ci2p_cache.record import read_json
from ci2p_cache.report.compared import SeedGroup, few_names, seed_groups
from ci2p_cache.report.data import RunData, cache_of, is_encoded_again, read_paths
from ci2p_cache.report.elements import visible
from ci2p_cache.runs.files import best_epoch_of

__all__ = ["TableFormat", "run_table", "write_table"]

TableFormat = Literal["markdown", "csv", "latex"]

_SUFFIXES: dict[TableFormat, str] = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}

_Interval = tuple[float | None, float | None, float | None]
"""A share, and the ends of its 95 % interval; None where they are not known."""
_Value = str | int | float | _Interval | None


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row is about."""

    run: RunData
    """The run, or the first of a configuration."""
    cache: Cache | None
    """Its cache; None where that is not found."""
    group: SeedGroup | None
    """The configuration; None of a single run."""


@dataclass(frozen=True, slots=True)
class _Column:
    """One column; a value that is not known is None."""

    name: str
    """In CSV, where a column with an interval has two more, NAME_low and NAME_high."""
    heading: str
    """Elsewhere."""
    value: Callable[[_Row], _Value]
    form: str = ",.0f"
    """How numbers are written outside CSV; shares are written as percent, without the sign."""
    has_interval: bool = False
    """Whether the values are `_Interval`s."""


_RUN = _Column("run", "Run", lambda row: row.run.name)
_MADE = (
    _Column("model", "Model", lambda row: row.run.model),
    _Column("parameters", "Parameters", lambda row: row.run.parameters),
    _Column("trained_parameters", "Trained", lambda row: row.run.trained),
    _Column("epochs", "Epochs", lambda row: int(row.run.columns["epoch"][-1])),
    _Column("dtype", "Stored as", lambda row: row.run.settings.get("fingerprint.latent.dtype")),
    _Column("codec", "Codec", lambda row: _codec(row.cache)),
)
_BYTES = _Column("bytes_per_view", "Bytes per view", lambda row: _bytes_per_view(row.cache))

_OF_RUNS = (
    _RUN,
    *_MADE,
    _Column("last_top1", "Last val top-1, % (95 % interval)",
            lambda row: _score(row.run, "last"), ".1%", has_interval=True),
    _Column("best_top1", "Best val top-1, % (95 % interval)",
            lambda row: _score(row.run, "best"), ".1%", has_interval=True),
    _BYTES,
)  # fmt: skip
"""Where each run has a row."""


def _of_group(value: Callable[[SeedGroup], _Value]) -> Callable[[_Row], _Value]:
    return lambda row: None if row.group is None else value(row.group)


_OF_CONFIGURATIONS = (
    _Column("runs", "Runs", _of_group(lambda own: few_names([run.name for run in own.runs]))),
    *_MADE,
    _Column("seeds", "Seeds", _of_group(lambda own: len(own.runs))),
    _Column("mean_top1", "Mean val top-1, %", _of_group(lambda own: own.mean), ".1%"),
    _Column("deviation_top1", "Standard deviation over seeds, points",
            _of_group(lambda own: own.deviation), ".1%"),
    _Column("over_first", "Points over the first (95 % interval over images)",
            _of_group(lambda own: _shares(own.over_first)), "+.1%", has_interval=True),
    _BYTES,
)  # fmt: skip
"""Where each configuration has one."""


def write_table(
    paths: Sequence[str | Path], out: Path, *, format: TableFormat, over_seeds: bool = False
) -> None:
    """Writes `run_table` to a file: .md, .csv or .tex. An earlier table alone is replaced.

    Raises:
        UsageError: the file has another suffix, is a folder or in a cache; or as `run_table`.
        RefusedError: another file is there.
        InputDataError, ManifestError: as `run_table`.
        ResourceError: the file cannot be written.
    """
    head = _lines([], format, _columns(over_seeds))[0].encode()
    check_output(out, what="table", suffixes=(_SUFFIXES[format],), mark=head)
    table = run_table(paths, format=format, over_seeds=over_seeds)
    write_whole(out, table.encode("utf-8"), what="table")


def run_table(paths: Sequence[str | Path], *, format: TableFormat, over_seeds: bool = False) -> str:
    """Returns a table with a row for each run; what is not known is a dash, in CSV empty.

    Top-1 is the evaluation's where the last and the best checkpoint were evaluated on the run's own
    validation split, with the 95 % interval; else it is what training recorded, without one.

    Args:
        paths: Run folders; and caches, where the runs' own are not where they were.
        format: What it is written in. CSV has shares from 0 to 1, the others percent.
        over_seeds: A row for each configuration instead, as the HTML page has them: runs that
            differ in their seed alone, and how they compare with those of the first row.

    Raises:
        UsageError: nothing is given, too much, or one thing twice.
        InputDataError: there is no run among the paths, or a run is damaged or has no epoch yet;
            or, over seeds, none has a second seed, or one was not validated.
        ManifestError: a cache is damaged.
    """
    runs, caches, skipped = read_paths(paths)
    if not runs or skipped:
        what = f"{skipped[0]} has no epoch yet" if skipped else "no run folder is given"
        raise InputDataError(f"{what}; the table has a row for each run")
    shown: list[tuple[RunData, SeedGroup | None]] = [(run, None) for run in runs]
    if over_seeds:
        shown = [(own.runs[0], own) for own in seed_groups(runs)]
    if not shown:
        raise InputDataError(
            f"no two of the {len(runs)} runs differ in their seed alone, or one was not validated"
        )
    columns = _columns(over_seeds)
    rows = []
    for run, group in shown:
        # Caches of one fingerprint may differ in codec and size: its own comes first.
        row = _Row(run, cache_of(run, ()) or cache_of(run, caches), group)
        rows.append([column.value(row) for column in columns])
    return "\n".join(_lines(rows, format, columns)) + "\n"


def _columns(over_seeds: bool) -> tuple[_Column, ...]:
    return _OF_CONFIGURATIONS if over_seeds else _OF_RUNS


def _lines(
    rows: Sequence[Sequence[_Value]], format: TableFormat, columns: Sequence[_Column]
) -> list[str]:
    """Returns the lines of a table; with no rows, those before the first, the heading alone."""
    if format == "csv":
        return _csv_lines(rows, columns)
    escape = _markdown if format == "markdown" else _latex
    forms = [column.form for column in columns]
    table = [[escape(column.heading) for column in columns]]
    for row in rows:
        cells = zip(row, forms, strict=True)
        table.append([escape(v) if isinstance(v, str) else _shown(v, form) for v, form in cells])
    if format == "latex":
        lines = [f"{' & '.join(row)} \\\\" for row in table]
        if not rows:
            return lines
        kinds = "".join("r" if _is_number(i, rows) else "l" for i in range(len(columns)))
        begin, end = rf"\begin{{tabular}}{{{kinds}}}", r"\end{tabular}"
        return [begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", end]
    lines = [f"| {' | '.join(row)} |" for row in table]
    rule = ["---:" if _is_number(i, rows) else "---" for i in range(len(columns))]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def _is_number(column: int, rows: Sequence[Sequence[_Value]]) -> bool:
    return not any(isinstance(row[column], str) for row in rows)


def _csv_lines(rows: Sequence[Sequence[_Value]], columns: Sequence[_Column]) -> list[str]:
    names: list[str] = []
    for column in columns:
        ends = [f"{column.name}_low", f"{column.name}_high"] if column.has_interval else []
        names += [column.name, *ends]
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells: list[object] = []
        for value in row:
            cells += value if isinstance(value, tuple) else [value]
        writer.writerow([_csv(each) if isinstance(each, str) else each for each in cells])
    return sink.getvalue().splitlines()


def _csv(text: str) -> str:
    """Returns a text that a spreadsheet shows: after = + - @ it would compute a formula."""
    return f"'{visible(text)}" if text.startswith(("=", "+", "-", "@")) else visible(text)


def _shown(value: float | _Interval | None, form: str) -> str:
    known = value if isinstance(value, tuple) else (value,)
    shown = [format(each, form).rstrip("%") for each in known if each is not None]
    return f"{shown[0]} [{', '.join(shown[1:])}]" if shown[1:] else "".join(shown) or "-"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", visible(text))


def _latex(text: str) -> str:
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
             "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
             # Behind the end of a row these would be its argument.
             "[": "{[}", "*": "{*}"}  # fmt: skip
    escaped = re.sub(r"[\\~^<>|\[*#$%&_{}]", lambda m: named.get(m[0], rf"\{m[0]}"), visible(text))
    # Two hyphens would become a dash, ?` a Spanish question mark.
    return re.sub(r"(?<=[-'`,?!])(?=[-'`,])", "{}", escaped)


def _codec(cache: Cache | None) -> str | None:
    if cache is None:
        return None
    layout = cache.manifest.layout
    return layout.codec if layout.has_zarr else layout.format


def _bytes_per_view(cache: Cache | None) -> float | None:
    try:
        return None if cache is None else describe(cache).bytes_per_view
    except CacheError:
        return None


def _shares(points: tuple[float, float, float] | None) -> _Interval:
    return (None,) * 3 if points is None else (points[0] / 100, points[1] / 100, points[2] / 100)


def _score(run: RunData, which: Literal["last", "best"]) -> _Interval:
    """Returns top-1 of the last or the best epoch, with its interval if that was evaluated."""
    try:
        checkpoint = read_json(run.path / "checkpoints" / "last.json").get(which)
    except (OSError, ManifestError):
        checkpoint = None
    for path, each in run.evaluations.items():
        is_val = each.is_own_data and each.split == "val" and not is_encoded_again(path)
        if is_val and each.checkpoint == checkpoint:
            return each.top1, each.top1_low, each.top1_high
    best = best_epoch_of(run.columns)
    if best is None:
        return None, None, None
    return (best[1] if which == "best" else run.columns["val_top1"][-1]), None, None
