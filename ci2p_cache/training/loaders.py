"""Which rows and which loaders give a run its batches, and whether a given loader fits the run.

With folds a data set that is too small for a separate validation split is validated whole: k runs
leave out one of k parts each (Stone 1974), and every image is validated once.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import InputDataError, UsageError, command
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.pixels import OnlineLoader, PixelLoader, require_crops
from ci2p_cache.loader.resident import Resident, ResidentLoader, choose_resident
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec

__all__ = ["loader_name", "make_loaders", "require_labels", "splits_of"]


def require_labels(cache: Cache) -> None:
    """Refuses a cache that was encoded without labels, by InputDataError."""
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


def loader_name(
    config: AnyModelConfig,
    spec: TrainSpec,
    train: Split,
    *,
    given: BatchLoader | None,
    resident: Resident,
) -> str:
    """Returns the kind of the loader that a run is bound to, its own or the one `given`.

    Raises:
        UsageError: the given loader hands out latents and the model reads images, or the reverse;
            images stay in memory; or the spec's `fresh_views` has no crops to cut, or another
            loader.
    """
    kind = _own_kind(config.reads, spec)
    if resident == "yes" and kind is not LatentLoader:
        raise UsageError(
            "`resident` is yes, which keeps latents in memory; this run reads the images",
            hint="leave it out (train: without --resident)",
        )
    if spec.fresh_views:
        require_crops(train)
    if given is None:
        return kind.__name__
    if spec.fresh_views:
        raise UsageError("`fresh_views` has a loader of its own; leave out the one given")
    if isinstance(given, PixelLoader) != (config.reads == "images"):
        raise UsageError(
            f"{config.name} reads {config.reads}, which {type(given).__name__} does not hand out",
            hint="leave the loader (train: --from-images) out; models on images always read the "
            "images that the cache was made of",
        )
    return type(given).__name__


def _own_kind(reads: Literal["latents", "images"], spec: TrainSpec) -> type[BatchLoader]:
    """Returns the kind of loader that a run makes for its training split."""
    if reads == "images":
        return PixelLoader
    return OnlineLoader if spec.fresh_views else LatentLoader


def make_loaders(
    splits: tuple[Split, Split | None],
    spec: TrainSpec,
    device: torch.device,
    *,
    reads: Literal["latents", "images"],
    threads: int | None,
    resident: Resident,
    given: BatchLoader | None,
    ranks: Ranks,
    observer: TrainObserver,
) -> tuple[BatchLoader, BatchLoader | None]:
    """Returns the loaders of the train and the val split; the caller closes those not `given`.

    Where the model reads images, both decode those that the cache was made of.

    Raises:
        UsageError: the given loader has another seed, batch size, split, device or rank.
        ResourceError: the split does not fit in memory.
        SourceError: the images are not there any more.
    """
    train, val = splits

    def made(kind: type[BatchLoader], split: Split, **options: Any) -> BatchLoader:
        return kind(
            split,
            batch_size=spec.batch_size,
            device=device,
            threads=threads or ranks.num_threads,
            recycle=True,
            rank=ranks.rank,
            world_size=ranks.world_size,
            **options,
        )

    if given is None:
        kind = _own_kind(reads, spec)
        if kind is LatentLoader:
            stays, reason = choose_resident(train, device, resident)
            kind = ResidentLoader if stays else kind
            if reason:
                observer.notice(reason)
        shuffle = True if spec.order == "random" else spec.order
        fresh = {"views": "fresh"} if spec.fresh_views else {}
        given = made(kind, train, seed=spec.seed, shuffle=shuffle, **fresh)
    has = (given.seed, given.batch_size, given.split.name, given.split.cache.path)
    wanted = (spec.seed, spec.batch_size, train.name, train.cache.path)
    if has != wanted or given.device.type != device.type:
        raise UsageError(
            f"the given loader has (seed, batch size, split, cache) {has} on {given.device}; "
            f"the run wants {wanted} on {device}"
        )
    if not np.array_equal(given.split.valid_rows, train.valid_rows):
        raise UsageError(
            f"the given loader reads {len(given.split.valid_rows)} rows, which are not the "
            f"{len(train.valid_rows)} that the run trains from (`folds` {spec.folds}, `fold` "
            f"{spec.fold})"
        )
    if (given.rank, given.world_size) != (ranks.rank, ranks.world_size):
        raise UsageError(
            f"the given loader is for rank {given.rank} of {given.world_size}; this is rank "
            f"{ranks.rank} of {ranks.world_size}"
        )
    if val is None:
        return given, None
    if spec.folds and val.cache.fingerprint.views.kind == "crops":
        observer.notice(
            "the folds validate on the first crop of each image, not on the image itself: the "
            "cache holds nothing else of the train split. Compare such runs only with each other."
        )
    own = LatentLoader if reads == "latents" else PixelLoader
    return given, made(own, val, shuffle=False, views=0)
