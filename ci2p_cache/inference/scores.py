"""What is computed from predictions alone: calibration, classes, confusion. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ci2p_cache.inference.evaluation import CalibrationBin, ClassScore

__all__ = [
    "calibration_bins",
    "class_scores",
    "confusion_triples",
    "expected_calibration_error",
]

_NUM_BINS = 15
"""As in Guo et al. 2017."""

_MAX_TRIPLES = 100_000
"""What keeps an evaluation below the size that is read again."""

_Array = npt.NDArray[np.generic]


def calibration_bins(confidence: _Array, correct: _Array) -> tuple[CalibrationBin, ...]:
    """Sorts images by confidence into fifteen bins of equal width.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 2: bin m
    of M holds (m - 1) / M < confidence <= m / M.

    Args:
        confidence: Probability of the predicted class of each image, (N,), 0 < value <= 1.
        correct: Whether it was the right one, bool (N,).
    """
    edges = np.arange(_NUM_BINS + 1) / _NUM_BINS
    numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, _NUM_BINS - 1)
    samples = np.bincount(numbers, minlength=_NUM_BINS)
    sums = [np.bincount(numbers, np.asarray(values, np.float64), _NUM_BINS)
            for values in (confidence, correct)]  # fmt: skip
    return tuple(
        CalibrationBin(
            low=float(edges[m]),
            high=float(edges[m + 1]),
            samples=int(samples[m]),
            confidence=float(sums[0][m] / samples[m]) if samples[m] else None,
            accuracy=float(sums[1][m] / samples[m]) if samples[m] else None,
        )
        for m in range(_NUM_BINS)
    )


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Returns the mean of |accuracy - confidence| over the bins, weighted by their images."""
    total = sum(each.samples for each in bins)
    gaps = (
        each.samples * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    )
    return float(sum(gaps) / total)


def class_scores(
    labels: _Array, predicted: _Array, classes: Sequence[str]
) -> tuple[ClassScore, ...]:
    """Counts the images of each class, and those of them that were classified right.

    Args:
        labels: The right class of each image, int (N,).
        predicted: The class that came first, int (N,).
        classes: Names of all classes.
    """
    samples = np.bincount(labels, minlength=len(classes))
    correct = np.bincount(labels[labels == predicted], minlength=len(classes))
    return tuple(
        ClassScore(label=label, name=name, samples=int(samples[label]), correct=int(correct[label]))
        for label, name in enumerate(classes)
    )


def confusion_triples(labels: _Array, predicted: _Array) -> tuple[tuple[int, ...], ...]:
    """Counts the pairs (label, predicted label) that occur.

    Args:
        labels: The right class of each image, int (N,).
        predicted: The class that came first, int (N,).

    Returns:
        (label, predicted, count), sorted; of more than 100,000 pairs the most frequent.
    """
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[:_MAX_TRIPLES])
    return tuple((int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in kept)
