"""How far an accuracy, or the difference of two, may be off: intervals over the images.

B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1), 1979.

Of two runs, drawing n images with replacement and counting is drawing the counts of their pairs,
multinomially. So no image has to be drawn, and a million cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ci2p_cache.intervals import wilson_interval
from ci2p_cache.report.evaluations import Predictions

__all__ = ["Estimate", "accuracy", "paired_difference"]

_DRAWS, _SEED = 10_000, 0
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A share or a difference of shares, with its 95 % interval."""

    value: float
    """The value on the images at hand."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of it."""
    samples: int
    """Images."""


def accuracy(correct: npt.NDArray[np.bool_]) -> Estimate:
    """Returns the share of right predictions.

    Args:
        correct: Whether each prediction is right; at least one.
    """
    count, right = len(correct), int(correct.sum())
    low, high = wilson_interval(right, count)
    return Estimate(value=right / count, low=low, high=high, samples=count)


def paired_difference(ours: Predictions, base: Predictions) -> Estimate | None:
    """Returns the accuracy of one run less that of another on the same images.

    None where they did not predict the same images with the same labels, because then the images
    differ as well as the runs.
    """
    left, right = np.argsort(ours.row, kind="stable"), np.argsort(base.row, kind="stable")
    if not (
        np.array_equal(ours.row[left], base.row[right])
        and np.array_equal(ours.label[left], base.label[right])
        and [ours.key[i] for i in left] == [base.key[i] for i in right]
    ):
        return None
    change = ours.correct[left].astype(np.int8) - base.correct[right].astype(np.int8)
    count = len(change)
    shares = [float((change == value).mean()) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(_SEED).multinomial(count, shares, _DRAWS)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / count, _QUANTILES).tolist()
    return Estimate(value=float(change.mean()), low=low, high=high, samples=count)
