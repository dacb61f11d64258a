"""What a run is made from: model and splits, and what is recorded of them and of the machine."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ci2p_cache import __version__
from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import (
    CheckpointError,
    DigestError,
    InputDataError,
    ManifestError,
    UsageError,
)
from ci2p_cache.models.baselines import EncoderViTConfig
from ci2p_cache.models.ci2p_vit import ModelConfig
from ci2p_cache.models.registry import AnyModelConfig, build_model, model_config
from ci2p_cache.training.checkpoint import read_tensors
from ci2p_cache.training.loaders import require_labels, splits_of
from ci2p_cache.training.optim import freeze_layers, parameter_layers
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "data_digest",
    "encoder_tensors",
    "model_config_for",
    "model_record",
    "require_layers",
    "run_numerics",
    "train_and_val",
]

_MODEL_RECORD_VERSION = 2


def model_config_for(
    cache: Cache, spec: TrainSpec, *, num_classes: int | None = None
) -> AnyModelConfig:
    """Returns the record of the model that reads this cache's latents, or its images.

    Args:
        cache: The cache.
        spec: Names the model.
        num_classes: Outputs; None: those of the cache.

    Raises:
        UnknownModelError: no model has the spec's name.
        UsageError: the model cannot have these settings, or takes no images of this size.
        InputDataError: the cache has no labels.
    """
    require_labels(cache)
    latent = cache.fingerprint.latent
    config = model_config(
        spec.model,
        num_classes=len(cache.classes) if num_classes is None else num_classes,
        latent_channels=latent.channels,
        pos_embed=spec.pos_embed,
        latent_size=latent.height,
        drop_path_rate=spec.drop_path,
    )
    if not spec.train_encoder:
        return config
    if not isinstance(config, ModelConfig):
        raise UsageError(
            f"`train_encoder` (--train-encoder) takes vit or vitds, of any size; `model` is "
            f"{spec.model}"
        )
    return EncoderViTConfig(
        latent=config, encoder_width=len(encoder_tensors(cache)["g_a.0.weight"])
    )


def encoder_tensors(cache: Cache) -> dict[str, Tensor]:
    """Returns what an `EncoderViT` takes over from a cache: its encoder's g_a, on CPU.

    Raises:
        UsageError: the encoder has other layers than that of bmshj2018-factorized.
        DigestError: the cache's encoder is missing or damaged.
    """
    # Only here: it counts operations too, which takes parts of torch that training does without.
    from ci2p_cache.models.complexity import tensor_shapes

    path = cache.encoder_path
    try:
        found = read_tensors(path, cache.manifest.encoder)
    except (OSError, CheckpointError, ManifestError) as error:
        raise DigestError(f"{path} is damaged: {error}", hint=cache.repair_hint) from error
    # CompressAI saves constants beside them.
    tensors = {
        name: tensor.float()
        for name, tensor in found.items()
        if name.startswith("g_a.") and not name.endswith(("bound", "pedestal"))
    }
    first, channels = tensors.get("g_a.0.weight"), cache.fingerprint.latent.channels
    wanted = {} if first is None else tensor_shapes((len(first), channels))
    shapes = {name.removeprefix("g_a."): tuple(each.shape) for name, each in tensors.items()}
    if not shapes or shapes != wanted:
        raise UsageError(
            "`train_encoder` (--train-encoder) takes encoders with the layers of "
            f"bmshj2018-factorized; that of {cache.path} is {cache.fingerprint.encoder.arch}"
        )
    return tensors


def require_layers(config: AnyModelConfig, spec: TrainSpec) -> None:
    """Raises UsageError where the spec wants layers of a model that does not have or say them.

    Built for this, and only where an option is on: better seconds than a run folder in vain.
    """
    if spec.layer_decay != 1 or spec.freeze:
        with torch.random.fork_rng(devices=[]):
            model = build_model(config)
        freeze_layers(model, spec.freeze)
        if spec.layer_decay != 1:
            parameter_layers(model)


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


def run_numerics(device: torch.device, ranks: Ranks, *, is_compiled: bool) -> dict[str, str]:
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
