"""How far an accuracy may be off, for the images that it was measured on."""

from __future__ import annotations

from math import sqrt

__all__ = ["wilson_interval"]

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
