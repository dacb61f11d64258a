"""How sure a comparison is: intervals of an accuracy, of a difference, and over seeds.

How far a difference may be off is an interval over the images: B. Efron, "Bootstrap methods:
another look at the jackknife", Annals of Statistics 7 (1), 1979. To draw N images with replacement
and add up what each is worth is to draw how often each worth occurs, multinomially. So no image has
to be drawn, and a million cost nothing.

Shape suffixes: S seeds, N images.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import UsageError

__all__ = ["mean_and_deviation", "paired_difference", "wilson_interval"]

_DRAWS, _SEED = 10_000, 0
"""With so many draws the ends of an interval stay within a few hundredths of it."""

_QUANTILES = (0.025, 0.975)

_Z = 1.959963984540054
"""Of a normal distribution 95 % are within so many standard deviations."""


def wilson_interval(correct: int, samples: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share (Wilson 1927), 0 <= low < high <= 1.

    A bootstrap of none right, or of all, has no width; this one has, however few images there are.

    Args:
        correct: Images classified right, 0 <= correct <= samples.
        samples: All images, at least 1.
    """
    share, z2 = correct / samples, _Z**2 / samples
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * sqrt(share * (1 - share) / samples + z2 / samples / 4)
    # Rounding would leave 1e-17 at the ends.
    low = 0.0 if correct == 0 else middle - half
    return low, 1.0 if correct == samples else middle + half


def paired_difference(
    ours: npt.NDArray[Any], theirs: npt.NDArray[Any]
) -> tuple[float, float, float]:
    """Compares two models image by image, by a percentile bootstrap over the images.

    The interval covers the choice of the images, not that of the seeds: compare the difference with
    what `mean_and_deviation` gives over seeds, too.

    Args:
        ours: What the one classified right: bool (N,), or shares (N,) of its seeds, 0 to 1.
        theirs: The same of the other, in the same order.

    Returns:
        Accuracy of the one less that of the other, -1 to 1, and the ends of its 95 % interval.

    Raises:
        UsageError: they are not of the same images.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise UsageError(f"the compared predictions are of {ours.shape} and {theirs.shape} images")
    gain_N = ours.astype(np.float64) - theirs
    worths, counts = np.unique(gain_N, return_counts=True)
    drawn = np.random.default_rng(_SEED).multinomial(len(gain_N), counts / len(gain_N), _DRAWS)
    low, high = np.quantile(drawn @ worths / len(gain_N), _QUANTILES).tolist()
    return float(gain_N.mean()), low, high


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean of what some seeds reached, and their sample standard deviation.

    Args:
        values: One per seed, at least one; of one alone the deviation is None, because not known.
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
