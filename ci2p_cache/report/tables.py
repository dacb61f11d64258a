"""`run_table`: what several runs reached, as a table for a paper, a README or a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import describe
from ci2p_cache.errors import CacheError, InputDataError, ManifestError
from ci2p_cache.outputs import check_output, write_whole
from ci2p_cache.record import read_json
from ci2p_cache.report.data import RunData, cache_of, is_encoded_again, read_paths
from ci2p_cache.report.elements import visible
from ci2p_cache.runs.files import best_epoch_of

__all__ = ["TableFormat", "run_table", "write_table"]

TableFormat = Literal["markdown", "csv", "latex"]

_SUFFIXES: dict[TableFormat, str] = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}

_Score = tuple[float | None, float | None, float | None]
"""A share, and the ends of its 95 % interval; None where they are not known."""
_Value = str | int | float | _Score | None

_COLUMNS: tuple[tuple[str, str, Callable[[RunData, Cache | None], _Value]], ...] = (
    ("run", "Run", lambda run, _: run.name),
    ("model", "Model", lambda run, _: run.model),
    ("parameters", "Parameters", lambda run, _: run.parameters),
    ("trained_parameters", "Trained", lambda run, _: run.trained),
    ("epochs", "Epochs", lambda run, _: int(run.columns["epoch"][-1])),
    ("dtype", "Stored as", lambda run, _: run.settings.get("fingerprint.latent.dtype")),
    ("codec", "Codec", lambda _, cache: _codec(cache)),
    ("last_top1", "Last val top-1, % (95 % interval)", lambda run, _: _score(run, "last")),
    ("best_top1", "Best val top-1, % (95 % interval)", lambda run, _: _score(run, "best")),
    ("bytes_per_view", "Bytes per view", lambda _, cache: _bytes_per_view(cache)),
)  # fmt: skip
"""(name in CSV, heading elsewhere, value) of each column, in their order."""


def write_table(paths: Sequence[str | Path], out: Path, *, format: TableFormat) -> None:
    """Writes `run_table` to a file: .md, .csv or .tex. An earlier table alone is replaced.

    Raises:
        UsageError: the file has another suffix, is a folder or in a cache; or as `run_table`.
        RefusedError: another file is there.
        InputDataError, ManifestError: as `run_table`.
        ResourceError: the file cannot be written.
    """
    head = _lines([], format)[0].encode()
    check_output(out, what="table", suffixes=(_SUFFIXES[format],), mark=head)
    write_whole(out, run_table(paths, format=format).encode("utf-8"), what="table")


def run_table(paths: Sequence[str | Path], *, format: TableFormat) -> str:
    """Returns a table with a row for each run; what is not known is a dash, in CSV empty.

    Top-1 is the evaluation's where the last and the best checkpoint were evaluated on the run's own
    validation split, with the 95 % interval; else it is what training recorded, without one.

    Args:
        paths: Run folders; and caches, where the runs' own are not where they were.
        format: What it is written in. CSV has shares from 0 to 1, the others percent.

    Raises:
        UsageError: nothing is given, too much, or one thing twice.
        InputDataError: there is no run among the paths, or a run is damaged or has no epoch yet.
        ManifestError: a cache is damaged.
    """
    runs, caches, skipped = read_paths(paths)
    if not runs or skipped:
        what = f"{skipped[0]} has no epoch yet" if skipped else "no run folder is given"
        raise InputDataError(f"{what}; the table has a row for each run")
    rows = []
    for run in runs:
        # Caches of one fingerprint may differ in codec and size: its own comes first.
        cache = cache_of(run, ()) or cache_of(run, caches)
        rows.append([value(run, cache) for _, _, value in _COLUMNS])
    return "\n".join(_lines(rows, format)) + "\n"


def _lines(rows: Sequence[Sequence[_Value]], format: TableFormat) -> list[str]:
    """Returns the lines of a table; with no rows, those before the first, the heading alone."""
    if format == "csv":
        return _csv_lines(rows)
    escape = _markdown if format == "markdown" else _latex
    table = [[escape(heading) for _, heading, _ in _COLUMNS]]
    table += [[escape(v) if isinstance(v, str) else _shown(v) for v in row] for row in rows]
    if format == "latex":
        lines = [f"{' & '.join(row)} \\\\" for row in table]
        if not rows:
            return lines
        kinds = "".join("r" if _is_number(i, rows) else "l" for i in range(len(_COLUMNS)))
        begin, end = rf"\begin{{tabular}}{{{kinds}}}", r"\end{tabular}"
        return [begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", end]
    lines = [f"| {' | '.join(row)} |" for row in table]
    rule = ["---:" if _is_number(i, rows) else "---" for i in range(len(_COLUMNS))]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def _is_number(column: int, rows: Sequence[Sequence[_Value]]) -> bool:
    return not any(isinstance(row[column], str) for row in rows)


def _csv_lines(rows: Sequence[Sequence[_Value]]) -> list[str]:
    names: list[str] = []
    for name, _, _ in _COLUMNS:
        names += [name, f"{name}_low", f"{name}_high"] if name.endswith("top1") else [name]
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


def _shown(value: float | _Score | None) -> str:
    if isinstance(value, tuple):
        top1, low, high = value
        if low is None or high is None:
            return "-" if top1 is None else f"{100 * top1:.1f}"
        return f"{100 * (top1 or 0):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return "-" if value is None else f"{value:,.0f}"


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


def _score(run: RunData, which: Literal["last", "best"]) -> _Score:
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
