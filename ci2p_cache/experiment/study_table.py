"""The table of a study: a row per configuration, run or not, for people and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

from ci2p_cache.experiment.comparison import Configuration, Study, paired_difference
from ci2p_cache.experiment.cross_validation import Plan

__all__ = ["study_csv", "study_head", "study_rows"]


def study_head(reference: str) -> tuple[str, ...]:
    """Returns the names of the columns; `reference` names what all are compared with."""
    return (
        "configuration", "what", "accuracy", f"against {reference}", "s/epoch", "bytes/view",
        "GMAC", "command",
    )  # fmt: skip


def study_rows(
    study: Study | None, plans: Mapping[str, Plan], *, reference: str
) -> Iterator[tuple[str, ...]]:
    """Yields a row per configuration, run or not, in the order of the plans.

    Args:
        study: What was run; None: nothing was.
        plans: All configurations, by name.
        reference: Name of what the others are compared with.
    """
    base = study.find(reference) if study is not None else None
    for name, plan in plans.items():
        found = study.find(name) if study is not None else None
        if found is None:
            yield (name, plan.what, *["not run yet"] * 5, f"--only {name}")
            continue
        against = "reference" if name == reference else _against(found, base)
        size = "-" if found.bytes_per_view is None else f"{found.bytes_per_view:,.0f}"
        yield (
            name, found.what, f"{found.accuracy:.1%} of {found.samples:,}", against,
            f"{found.seconds_per_epoch:.1f}", size, f"{found.gmac:.3f}", found.command,
        )  # fmt: skip


def study_csv(study: Study, plans: Mapping[str, Plan], *, reference: str) -> bytes:
    """Returns the table of what was run as CSV; arguments as for `study_rows`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(study_head(reference))
    rows = study_rows(study, plans, reference=reference)
    writer.writerows(row for row in rows if study.find(row[0]) is not None)
    return text.getvalue().encode()


def _against(found: Configuration, base: Configuration | None) -> str:
    """Returns the difference in points, with its 95 % interval."""
    if base is None:
        return "no reference yet"
    gap = paired_difference(found.is_right(), base.is_right())
    points = [f"{100 * x:+.1f}" for x in (gap.value, gap.low, gap.high)]
    return f"{points[0]} ({points[1]} to {points[2]})"
