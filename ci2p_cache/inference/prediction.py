"""`Prediction`: what a model says of one picture, and how logits become the classes it names.

Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ci2p_cache.record import Record

__all__ = ["Guess", "Prediction", "likeliest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess(Record):
    """One class that a picture may show."""

    label: int
    """Index into the model's classes."""
    name: str
    """Name of the class."""
    title: str
    """Its name for people."""
    probability: float
    """Softmax of the logits, 0 to 1."""
    logit: float
    """What the model gave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction(Record):
    """What the model says of one picture, or why it says nothing."""

    path: str
    """The file as it was named or found; bytes that are not UTF-8 are shown as \\xNN."""
    guesses: tuple[Guess, ...] = ()
    """The likeliest classes first; of equal ones the lower label. Empty where there is an error."""
    error: str | None = None
    """Why the picture could not be read; None where all is well."""


def likeliest(
    logits_BK: Tensor, classes: Sequence[str], titles: Sequence[str], *, top: int
) -> Iterator[tuple[Guess, ...]]:
    """Yields the likeliest classes of each picture of a batch, the likeliest first.

    Args:
        logits_BK: What the model gave, float32 (B, K), on any device.
        classes: Names of the K classes.
        titles: Their names for people.
        top: Number of classes for each picture, all where there are fewer.
    """
    logits_BK = logits_BK.cpu()
    shares_BK = logits_BK.softmax(dim=1)
    # Stable: of equal logits the lower label comes first.
    order_BK = logits_BK.argsort(dim=1, descending=True, stable=True)[:, :top]
    for logits, shares, order in zip(logits_BK, shares_BK, order_BK, strict=True):
        yield tuple(
            Guess(
                label=label,
                name=classes[label],
                title=titles[label],
                probability=float(shares[label]),
                logit=float(logits[label]),
            )
            for label in order.tolist()
        )
