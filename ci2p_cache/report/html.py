"""`write_report`: runs and caches as one HTML file that needs nothing but itself.

::

    run folders, caches --read--> sections --assemble--> report.html
    illustrator --decoded pictures--^

The page holds no script and loads nothing; its content policy forbids both. The same inputs give
the same bytes: no date but that of a run's file, no random names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

from ci2p_cache import __version__
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import UsageError, command
from ci2p_cache.outputs import check_output, write_whole
from ci2p_cache.record import Record
from ci2p_cache.report.cache_page import cache_section
from ci2p_cache.report.data import RunData, cache_of, read_paths
from ci2p_cache.report.elements import Html, markup, notice, plain
from ci2p_cache.report.run_page import comparison_section, run_section

if TYPE_CHECKING:
    from ci2p_cache.pictures.reconstructions import LatentIllustrator

__all__ = ["MAX_BYTES", "ReportSummary", "write_report"]

MAX_BYTES = 5_000_000
"""Largest report: people mail it and open it on a phone."""

_DETAILED_RUNS = 12
"""So many runs have their own sections; the others are in the comparison only."""
_ALL_MISTAKES, _RUN_MISTAKES = 84, (4, 14)
"""Mistakes shown of all runs together, and the least and most of one."""
_FEW_CACHES, _SHOWN_OF_FEW, _SHOWN_OF_MANY = 2, 3, 1
"""Up to so many caches show three reconstructions of each group, more show one."""

_MARK = b"<title>ci2p-cache: "
"""Marks our own page, so that it may be replaced."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSummary(Record):
    """What a report holds."""

    path: str
    """The file."""
    bytes: int
    """Its size."""
    runs: tuple[str, ...]
    """Names of its runs."""
    caches: tuple[str, ...]
    """Its caches."""
    skipped: tuple[str, ...]
    """Paths of runs that have no finished epoch yet, and so are not in it."""


def write_report(
    paths: Sequence[str | Path], out: str | Path, *, illustrator: LatentIllustrator | None = None
) -> ReportSummary:
    """Writes one self-contained HTML page about runs and caches.

    Args:
        paths: Run folders and caches, also behind a URL; several runs are compared with the
            first one. Runs without a finished epoch are left out, and
            the page says so.
        out: The file to write, .html, .htm or without a suffix. Of the files that may be there
            only an earlier report is replaced, as a whole.
        illustrator: Decodes latents for reconstructions, bounds and mistakes; None leaves these
            out, and the page says so.

    Returns:
        What it holds.

    Raises:
        UsageError: nothing is given, too much, or one thing twice; the page would be larger than
            5 MB; or `out` has another suffix, is a folder, or is in a cache.
        RefusedError: `out` is a file other than a report.
        InputDataError: a path is neither a run folder nor a cache, or no run has an epoch yet and
            no cache is given.
        ManifestError, ShardError: a cache is damaged where its counts are read.
        SourceError: the illustrator was given a source that cannot be opened.
        ResourceError: the file cannot be written.
    """
    check_output(Path(out), what="report", suffixes=("", ".htm", ".html"), mark=_MARK)
    runs, caches, skipped = read_paths(paths)
    contents: list[Html] = []
    sections = [
        notice(f"Run {path.resolve().name} is left out: it has no epoch yet.") for path in skipped
    ]

    def add(anchor: str, title: str, content: Html) -> None:
        contents.append(markup('<li><a href="#{}">{}</a></li>', anchor, title))
        sections.append(content)

    if len(runs) > 1:
        add("compared", "Comparison", comparison_section(runs, anchor="compared"))
    detailed = runs[:_DETAILED_RUNS]
    fewest, most = _RUN_MISTAKES
    for number, run in enumerate(detailed):
        content = run_section(
            run,
            anchor=f"run-{number}",
            cache=cache_of(run, caches),
            illustrator=illustrator,
            num_mistakes=min(max(_ALL_MISTAKES // len(detailed), fewest), most),
        )
        add(f"run-{number}", f"Run {run.name}", content)
    if len(runs) > len(detailed):
        text = (
            f"Only the first {len(detailed)} of {len(runs)} runs have a section of their own; the "
            "others stand in the comparison."
        )
        sections.append(notice(text, command("report", runs[len(detailed)].path)))
    num_shown = _SHOWN_OF_FEW if len(caches) <= _FEW_CACHES else _SHOWN_OF_MANY
    for number, cache in enumerate(caches):
        anchor = f"cache-{number}"
        content = cache_section(cache, anchor=anchor, illustrator=illustrator, num_shown=num_shown)
        add(anchor, f"Cache {cache.path.resolve().name}", content)
    page = _page(_title(runs, caches), contents, sections).encode("utf-8")
    if len(page) > MAX_BYTES:
        raise UsageError(
            f"the report would have {len(page):,} bytes; at most {MAX_BYTES:,} are written",
            hint="give fewer paths",
        )
    write_whole(Path(out), page, what="report")
    return ReportSummary(
        path=str(out),
        bytes=len(page),
        runs=tuple(run.name for run in runs),
        caches=tuple(str(cache.path) for cache in caches),
        skipped=tuple(map(str, skipped)),
    )


def _title(runs: Sequence[RunData], caches: Sequence[Cache]) -> str:
    names = [run.name for run in runs] + [cache.path.resolve().name for cache in caches]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"ci2p-cache: {', '.join(names[:3])}{rest}"


def _page(title: str, contents: Sequence[Html], sections: Sequence[Html]) -> str:
    style = package_files("ci2p_cache.report").joinpath("style.css").read_text("utf-8")
    body = markup(
        '<body><header><h1>{}</h1><nav aria-label="Contents"><ul>{}</ul></nav></header>'
        f"<main>{{}}</main><footer>Written by ci2p-cache {__version__} from run folders and "
        "caches. The same input gives the same page. The page loads nothing from the network."
        "</footer></body>",
        title, contents, sections,
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{plain(title)}</title>\n<style>\n{style}</style>\n</head>\n{body.text}\n</html>\n"
    )
