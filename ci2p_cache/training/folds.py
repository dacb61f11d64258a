"""Which rows a run trains from and which it validates on: the cache's splits, or folds of one.

With folds a data set that is too small for a validation split of its own is validated whole: k runs
leave out one of k parts each (Stone 1974), and every image is validated once.
"""

from __future__ import annotations

import numpy as np

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import InputDataError, command
from ci2p_cache.training.spec import TrainSpec

__all__ = ["require_labels", "splits_of"]


def require_labels(cache: Cache) -> None:
    """Refuses a cache that was encoded without labels.

    Raises:
        InputDataError: it was.
    """
    if not cache.classes:
        raise InputDataError(
            f"{cache.path} was encoded without labels (--labels none); training a classifier needs "
            "them",
            hint=command("encode", "IMAGES", "--out", "NEW_FOLDER", note="without --labels none"),
        )


def splits_of(cache: Cache, spec: TrainSpec) -> tuple[Split, Split | None]:
    """Returns the split to train from and the one to validate on, None where there is none.

    Without folds these are `train` and `val`. With folds both are `train`, restricted to some of
    its rows: of its valid rows in ascending order, each `folds`-th validates, the `fold`-th first,
    and the others train. So the fold of a row follows from the cache alone. Rows are in random
    order already unless they come from archives, so every fold holds about its share of each class.
    `val` is not touched then. Validate on view 0: the image itself, unless the views are crops.

    Args:
        cache: A complete cache.
        spec: `folds` and `fold` count.

    Raises:
        InputDataError: the cache has no labels, there is no train split, no image in it, or fewer
            of them than folds.
    """
    require_labels(cache)
    if "train" not in cache or not len(cache["train"].valid_rows):
        raise InputDataError(
            f"{cache.path} holds no image to train from; its splits are {list(cache.splits)}"
        )
    train = cache["train"]
    if not spec.folds:
        val = cache["val"] if "val" in cache and len(cache["val"].valid_rows) else None
        return train, val
    rows = train.valid_rows
    if len(rows) < spec.folds:
        raise InputDataError(
            f"split 'train' of {cache.path} holds {len(rows)} images, which `folds` {spec.folds} "
            "cannot divide",
            hint=f"take at most {len(rows)} folds",
        )
    validates = np.arange(len(rows)) % spec.folds == spec.fold
    return train.subset(rows[~validates]), train.subset(rows[validates])
