"""What the first epochs say about a run that does not learn, before hours are spent on it."""

from __future__ import annotations

import math

from ci2p_cache.training.records import EpochRecord

__all__ = ["early_notice"]

_WARM_STEPS = 100
"""Steps after which a run that has learned nothing is worth a word; before, it is warm-up."""
_SIGMAS = 3
"""Standard deviations of guessing within which an accuracy counts as that of guessing."""


def early_notice(record: EpochRecord, *, steps: int, num_classes: int, num_val: int) -> str | None:
    """Returns a sentence for the user where an early epoch has learned nothing, None otherwise.

    Args:
        record: The epoch that has ended.
        steps: Steps of all epochs so far, this one included.
        num_classes: K.
        num_val: Validation images, 0 for none.
    """
    if num_classes < 2 or not record.images:
        return None
    guessing = math.log(num_classes)
    is_warm_now = steps - steps // record.epoch < _WARM_STEPS <= steps
    if is_warm_now and record.loss >= guessing:
        return (
            f"nothing was learned in {steps} steps: the training loss of epoch {record.epoch} is "
            f"{record.loss:.3f}, guessing among {num_classes} classes gives {guessing:.3f}. "
            "A lower learning rate or a longer warm-up may help; so may a look at the labels."
        )
    if record.top1 is None or not num_val or not is_warm_now:
        return None
    # Of a few validation images nothing can be told: even what training reaches may be luck there.
    learns = record.train_top1 > _highest_guess(num_classes, min(record.images, num_val))
    if not learns or record.top1 > _highest_guess(num_classes, num_val):
        return None
    return (
        f"validation ({record.top1:.1%} of {num_val:,}) cannot be told from guessing while "
        f"training is ahead of it ({record.train_top1:.1%}), after {steps} steps. "
        "See whether both splits have the same classes and kind of images."
    )


def _highest_guess(num_classes: int, images: int) -> float:
    """Returns the share of hits that guessing stays below nearly always, 0 to 1."""
    chance = 1 / num_classes
    return chance + _SIGMAS * math.sqrt(chance * (1 - chance) / images)
