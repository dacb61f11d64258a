"""`ci2p-cache report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ci2p_cache.cli import choices, render

__all__ = ["report"]


def report(
    paths: Annotated[
        list[str], typer.Argument(help="Run folders and caches.", metavar="PATH...", readable=False)
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images measured of each cache.")] = 64,
    pictures: Annotated[
        bool, typer.Option(help="Decode latents for reconstructions, bounds and mistakes.")
    ] = True,
    json: choices.Json = False,
) -> None:
    """Write one HTML page about runs and caches, to look at, print or send.

    \b
      ci2p-cache report runs/mine                            curves, classes, mistakes
      ci2p-cache report runs/mine shards/                    and what the cache still shows
      ci2p-cache report runs/one runs/two --out both.html    the same side by side
      ci2p-cache report shards/ --no-pictures                in a second, nothing decoded

    The page is one file under 5 MB that loads nothing and runs nothing: it opens without a network.
    Of several runs the first is what the others are held against. `ci2p-cache evaluate` gives a run
    what classes, confusions, calibration, intervals and mistakes are made of: those of the best
    checkpoint on the run's own validation split, or what comes next to it. The page shows pictures
    from the cache: think before it is sent on. An earlier report is replaced, no other file.
    """
    from ci2p_cache.illustrations import LatentIllustrator
    from ci2p_cache.report.html import write_report

    illustrator = LatentIllustrator(source=source, num_samples=samples) if pictures else None
    summary = write_report(paths, out, illustrator=illustrator)
    for path in summary.skipped:
        render.notice(f"{path} is left out: no epoch of it has ended yet")
    if json:
        render.print_json(summary.to_dict())
    else:
        held = f"runs: {len(summary.runs)}, caches: {len(summary.caches)}"
        render.line(f"written: {summary.path} ({held}; {render.size(summary.bytes)})")
        render.line("next: open it in a browser")
