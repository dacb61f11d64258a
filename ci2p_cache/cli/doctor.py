"""`ci2p-cache doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import ResourceError

__all__ = ["doctor"]

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def doctor(
    folder: Annotated[
        Path, typer.Argument(help="Where you will write caches; its disk is timed.")
    ] = Path(),
    json: choices.JsonOption = False,
) -> None:
    """Check whether this machine and environment are ready, and how to fix what is not.

    \b
      ci2p-cache doctor                   packages, devices, weights, this disk
      ci2p-cache doctor /scratch/shards   the same, and the disk of that folder

    A note means: it works, but slower or with less. A problem means: something will fail, exit code
    6. It changes nothing; to time the disk it writes 64 MiB and removes them.
    """
    from ci2p_cache.doctor import diagnose

    render.status("checking packages, devices, weights and the disk; some seconds ...")
    found = diagnose(folder)
    if json:
        render.print_json([each.to_dict() for each in found])
    else:
        rows = [(_MARKS[each.state], each.subject, each.found, each.advice) for each in found]
        render.print_table(("", "what", "found", "advice"), rows)
    problems = [each for each in found if each.state == "problem"]
    if problems:
        names = ", ".join(each.subject for each in problems)
        raise ResourceError(
            f"{len(problems)} of {len(found)} checks found a problem: {names}",
            hint=problems[0].advice,
        )
    if not json:
        notes = sum(each.state == "note" for each in found)
        render.heading(f"ready; {len(found)} checks, {notes} notes")
