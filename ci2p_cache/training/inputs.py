"""What a run is made from: device, splits, loaders, and what is recorded of them."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from ci2p_cache import __version__
from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import InputDataError, UsageError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.pixels import PixelLoader
from ci2p_cache.loader.resident import Resident, ResidentLoader, choose_resident
from ci2p_cache.models.registry import AnyModelConfig, build_model, model_config
from ci2p_cache.training.folds import splits_of
from ci2p_cache.training.layers import parameter_layers
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "data_digest",
    "loader_name",
    "make_loaders",
    "model_config_for",
    "model_record",
    "numerics",
    "require_layers",
    "train_and_val",
]

_MODEL_RECORD_VERSION = 2


def model_config_for(cache: Cache, spec: TrainSpec) -> AnyModelConfig:
    """Returns the record of the model that reads this cache's latents, or its images.

    Raises:
        UnknownModelError: no model has the spec's name.
        UsageError: the model cannot have these settings, or takes no images of this size.
    """
    latent = cache.fingerprint.latent
    return model_config(
        spec.model,
        num_classes=len(cache.classes),
        latent_channels=latent.channels,
        pos_embed=spec.pos_embed,
        latent_size=latent.height,
        drop_path_rate=spec.drop_path,
    )


def loader_name(config: AnyModelConfig, given: BatchLoader | None) -> str:
    """Returns the kind of the loader that a run is bound to.

    Args:
        config: The model.
        given: The caller's loader of training batches; None: the run makes its own.

    Raises:
        UsageError: the given loader hands out latents and the model reads images, or the reverse.
    """
    if given is None:
        return (LatentLoader if config.reads == "latents" else PixelLoader).__name__
    if isinstance(given, PixelLoader) != (config.reads == "images"):
        raise UsageError(
            f"{config.name} reads {config.reads}, which {type(given).__name__} does not hand out",
            hint="leave the loader (train: --online) out; models on images always read the images "
            "that the cache was made of",
        )
    return type(given).__name__


def require_layers(config: AnyModelConfig, spec: TrainSpec) -> None:
    """Raises UsageError where the spec wants layers of a model that does not say them.

    Built for this, and only where `layer_decay` is on: better seconds than a run folder in vain.
    """
    if spec.layer_decay != 1:
        with torch.random.fork_rng(devices=[]):
            parameter_layers(build_model(config))


def train_and_val(cache: Cache, spec: TrainSpec, ranks: Ranks) -> tuple[Split, Split | None]:
    """Returns the splits to train from and to validate on, the latter None where there is none.

    Raises:
        InputDataError: there is no train split, no image in it, fewer than there are folds, or an
            image without a label.
        UsageError: the batch size leaves one image that BatchNorm could not normalise.
    """
    train, val = splits_of(cache, spec)
    for split in (train, val):
        if split is not None:
            _check_labels(split, len(cache.classes))
    # PatchReshape or CnnReshape halves 2x2 to 1x1, which leaves BatchNorm one value per channel.
    num_samples = len(train.valid_rows)
    if train.latent.height == 2 and 1 in _part_sizes(num_samples, spec, ranks.world_size):
        raise UsageError(
            f"`batch_size` {spec.batch_size} leaves {num_samples} images with a part of one image, "
            f"which BatchNorm cannot normalise at 32 px ({ranks.world_size} ranks, `accumulate` "
            f"{spec.accumulate}); choose another"
        )
    return train, val


def _part_sizes(num_samples: int, spec: TrainSpec, world_size: int) -> set[int]:
    """Returns the sizes of the parts that go through the model at once, on any rank."""
    sizes = {min(num_samples, spec.batch_size), num_samples % spec.batch_size}
    for parts in (world_size, spec.accumulate):
        # Slices are of one size but for the last one, see `rank_slice`.
        shares = {size: -(-size // parts) for size in sizes - {0}}
        sizes = {part for size, share in shares.items() for part in (share, size % share)}
    return sizes - {0}


def _check_labels(split: Split, num_classes: int) -> None:
    labels = split.labels[split.valid_rows]
    unknown = int(((labels < 0) | (labels >= num_classes)).sum())
    if unknown:
        raise InputDataError(
            f"{unknown} of {len(labels)} images of split {split.name!r} of {split.cache.path} have "
            "no label; training needs them all"
        )


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
        UsageError: the given loader has another seed, batch size, split, device or rank, or images
            are to be kept in memory.
        ResourceError: the split is to be kept in memory, where it does not fit.
        SourceError: the images are not there any more.
    """
    train, val = splits
    threads = threads or ranks.num_threads
    if given is None:
        given = _train_kind(train, device, reads, resident, observer)(
            train,
            batch_size=spec.batch_size,
            seed=spec.seed,
            device=device,
            shuffle=True if spec.order == "random" else spec.order,
            threads=threads,
            recycle=True,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
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
    return given, (LatentLoader if reads == "latents" else PixelLoader)(
        val,
        batch_size=spec.batch_size,
        device=device,
        shuffle=False,
        views=0,
        threads=threads,
        recycle=True,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _train_kind(
    train: Split,
    device: torch.device,
    reads: Literal["latents", "images"],
    resident: Resident,
    observer: TrainObserver,
) -> type[BatchLoader]:
    """Returns the kind of the loader of training batches, and tells why it is that."""
    if reads == "images":
        if resident == "yes":
            raise UsageError(
                "`resident` is yes, which keeps latents in memory; the model reads images",
                hint="leave it out (train: without --resident)",
            )
        return PixelLoader
    stays, reason = choose_resident(train, device, resident)
    if reason:
        observer.notice(reason)
    return ResidentLoader if stays else LatentLoader


def data_digest(cache: Cache) -> str:
    """Returns a sha256 over which samples the cache holds, in order, with labels and validity.

    The fingerprint says how latents were made, not of what: two caches may share it. Paths and
    names of the folder are left out, so a cache may move.
    """
    digest = hashlib.sha256(cache.manifest.plan.sha256.encode())
    for name, split in sorted(cache.items()):
        digest.update(f"{name} {split.num_rows}\n".encode())
        digest.update(split.labels.tobytes())
        digest.update(split.valid.tobytes())
    return digest.hexdigest()


def model_record(
    cache: Cache, config: AnyModelConfig, encoder: FileRecord | None = None
) -> dict[str, Any]:
    """Returns `model.json`: what rebuilds the model and makes what it reads, weights apart.

    Args:
        cache: The cache that is trained from.
        config: The model.
        encoder: The encoder's copy in the run folder; None where the model reads images. Version 1
            of the record did not have it.
    """
    return {
        "version": _MODEL_RECORD_VERSION,
        "software": f"ci2p-cache {__version__}",
        "model": config.to_dict(),
        "fingerprint": cache.fingerprint.to_dict(),
        "scale": cache.manifest.scale,
        "offset": list(cache.manifest.offset),
        "classes": list(cache.classes),
        "class_titles": list(cache.class_titles),
        "encoder": None if encoder is None else encoder.to_dict(),
    }


def numerics(device: torch.device, ranks: Ranks, *, is_compiled: bool) -> dict[str, str]:
    """Returns what may change the last bits of a run without changing what it computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name if ranks.world_size == 1 else f"{ranks.world_size} x {name}",
        "cpu_threads": str(torch.get_num_threads()),
        "compiled": "yes" if is_compiled else "no",
        "ci2p-cache": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": version("timm"),
    }
