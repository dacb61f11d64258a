"""How runs compare: image by image, and over the seeds of one configuration.

Runs that differ in their seed alone are one configuration. Of two configurations each image counts
by the share of seeds that classify it right, so the intervals are paired: over the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ci2p_cache.report.data import RunData
from ci2p_cache.report.elements import Cell, Html, markup, percent, section, table
from ci2p_cache.runs.evaluations import Predictions
from ci2p_cache.runs.statistics import mean_and_deviation, paired_difference

__all__ = ["SeedGroup", "difference", "few_names", "seed_groups", "seed_table"]

_SEED = "seed"
_NOT_BINDING = ("init_from",)
"""Settings that say where something is."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeedGroup:
    """The runs of one configuration, one per seed."""

    runs: tuple[RunData, ...]
    """In the order in which they were given."""
    top1: tuple[float, ...]
    """Of each: what it was evaluated to, else what training recorded last; 0 to 1."""
    mean: float
    """Of these."""
    deviation: float | None
    """Their sample standard deviation; None of one run."""
    over_first: tuple[float, float, float] | None
    """Points by which it is better than the first configuration, and the 95 % interval; None where
    it is the first, or they were not evaluated on the same images."""

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds, as they are recorded."""
        return tuple(run.settings.get(_SEED, "?") for run in self.runs)


def seed_groups(runs: Sequence[RunData]) -> list[SeedGroup]:
    """Returns the configurations of some runs, in the order of their first runs.

    Empty where none of them has two seeds, or a run was not validated.
    """
    if not all(np.isfinite(_top1(run)) for run in runs):
        return []
    found: dict[Any, list[RunData]] = {}
    for run in runs:
        left_out = (_SEED, *_NOT_BINDING)
        key = tuple(sorted((k, v) for k, v in run.settings.items() if k not in left_out))
        found.setdefault(key, []).append(run)
    groups: list[SeedGroup] = []
    for own in found.values():
        top1 = tuple(_top1(run) for run in own)
        mean, deviation = mean_and_deviation(top1)
        over_first = difference(own, groups[0].runs) if groups else None
        groups.append(
            SeedGroup(
                runs=tuple(own), top1=top1, mean=mean, deviation=deviation, over_first=over_first
            )
        )
    is_seeded = any(len(set(group.seeds)) > 1 for group in groups)
    return groups if is_seeded else []


def _top1(run: RunData) -> float:
    return run.columns["val_top1"][-1] if run.evaluation is None else run.evaluation.top1


def difference(
    ours: Sequence[RunData], base: Sequence[RunData]
) -> tuple[float, float, float] | None:
    """Returns by how many points runs are better than others, and the 95 % interval of that.

    None where they did not all predict the same images with the same labels, because then the
    images differ as well as the runs.

    Args:
        ours: The runs of one configuration, of another seed each; at least one.
        base: Those of the other.
    """
    predictions = [run.predictions for run in (*ours, *base)]
    right: list[npt.NDArray[np.bool_]] = []
    for each in predictions:
        aligned = None if each is None or predictions[0] is None else _right(each, predictions[0])
        if aligned is None:
            return None
        right.append(aligned)
    shares = (np.mean(part, axis=0) for part in (right[: len(ours)], right[len(ours) :]))
    change, low, high = paired_difference(*shares)
    return 100 * change, 100 * low, 100 * high


def _right(one: Predictions, other: Predictions) -> npt.NDArray[np.bool_] | None:
    """Returns which images one classified right, by row; None where the other has other images."""
    left, right = np.argsort(one.row, kind="stable"), np.argsort(other.row, kind="stable")
    if not (
        np.array_equal(one.row[left], other.row[right])
        and np.array_equal(one.label[left], other.label[right])
        and [one.key[i] for i in left] == [other.key[i] for i in right]
    ):
        return None
    return one.correct[left]


def seed_table(runs: Sequence[RunData]) -> Html:
    """Returns the configurations of the runs over their seeds; nothing where none has several."""
    groups = seed_groups(runs)
    if not groups:
        return Html("")
    rows: list[list[Cell]] = []
    for group in groups:
        points, spread = group.over_first, group.deviation
        rows.append(
            [
                few_names([run.name for run in group.runs]),
                ", ".join(group.seeds),
                percent(group.mean),
                "-" if spread is None else f"{100 * spread:.1f}",
                ", ".join(percent(each) for each in group.top1),
                "-" if points is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points),
            ]
        )
    head = [
        "runs", "seeds", "mean top-1", "standard deviation, points", "each",
        "points over the first [95 %]",
    ]  # fmt: skip
    text = (
        "Runs that differ in their seed alone are one configuration. The standard deviation is "
        "over the seeds; the interval is over the images, each of which counts by the share of "
        "seeds that classify it right."
    )
    shown = table("Over seeds", head, rows)
    return section("Over seeds", shown, markup("<p>{}</p>", text), level=3)


def few_names(names: Sequence[str]) -> str:
    """Returns names with commas between them, of many the first eight."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest
