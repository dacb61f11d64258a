"""The records of timm's models, `timm:<name>` and `ci2p+timm:<name>`, and which names there are.

Which names there are, and what they build, depends on the installed timm (Wightman,
https://github.com/huggingface/pytorch-image-models); `timm.list_models()` lists them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from ci2p_cache.errors import UnknownModelError, UsageError
from ci2p_cache.models.fields import (
    require_integer,
    require_name,
    require_rate,
    require_version,
)
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING, SIZE_MULTIPLE_PX

__all__ = [
    "CI2P_TIMM_PREFIX",
    "TIMM_PREFIX",
    "CI2PTimmConfig",
    "TimmConfig",
    "made_for",
    "timm_config",
]

TIMM_PREFIX = "timm:"
"""Of names of timm's classifiers on images."""
CI2P_TIMM_PREFIX = "ci2p+timm:"
"""Of names of timm's Vision Transformers on latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmConfig(Record):
    """What fixes the tensors of a timm classifier on images, for one version of timm."""

    kind: Literal["timm"] = "timm"
    """What `config_from_dict` tells records apart by."""
    version: int = 1
    """Version of this record."""
    name: str
    """`timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    """K; 0 leaves the classification head out, and the model gives pooled features."""
    image_size: int = 256
    """Side of the square image in pixels."""
    drop_path_rate: float = 0.1
    """Stochastic depth as the model takes it; 0 where it takes none."""
    mean: tuple[float, ...]
    """Of the three channels, subtracted from images in [0, 1]; timm's for this model."""
    std: tuple[float, ...]
    """Deviation of the three channels, which they are divided by; timm's for this model."""

    def __post_init__(self) -> None:
        require_version(self.version, 1)
        _require_known(self.name, TIMM_PREFIX)
        require_integer(self, "num_classes", 0)
        require_integer(self, "image_size", SIZE_MULTIPLE_PX, multiple_of=SIZE_MULTIPLE_PX)
        require_rate(self, "drop_path_rate")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"`mean` is {self.mean} and `std` {self.std}; three numbers each are wanted, those "
                "of `std` positive"
            )

    @property
    def reads(self) -> Literal["images"]:
        """What the model takes: images in [0, 1]."""
        return "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class CI2PTimmConfig(Record):
    """What fixes the tensors of a timm Vision Transformer on latents, for one version of timm."""

    kind: Literal["ci2p_timm"] = "ci2p_timm"
    """What `config_from_dict` tells records apart by."""
    version: int = 1
    """Version of this record."""
    name: str
    """`ci2p+timm:` and timm's name of the model, without a tag of pretrained weights."""
    num_classes: int = 1000
    """K; 0 leaves the classification head out, and the model gives pooled features."""
    latent_channels: int = 192
    """M; 192 is the paper's (CompressAI quality 1-5), 320 that of quality 6-8."""
    latent_size: int = 16
    """Rows and columns of the latents (16 at 256 px), even; fixes the positional embedding."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0 at the first."""

    def __post_init__(self) -> None:
        require_version(self.version, 1)
        _require_known(self.name, CI2P_TIMM_PREFIX)
        require_integer(self, "num_classes", 0)
        require_integer(self, "latent_channels", 1)
        require_integer(self, "latent_size", 2, multiple_of=2)
        require_rate(self, "drop_path_rate")

    @property
    def reads(self) -> Literal["latents"]:
        """What the model takes: dequantised latents."""
        return "latents"


def timm_config(
    name: str,
    *,
    num_classes: int,
    latent_channels: int,
    latent_size: int,
    drop_path_rate: float,
) -> TimmConfig | CI2PTimmConfig:
    """Returns the record of a timm model; arguments as for `registry.model_config`.

    Raises:
        UnknownModelError: timm has no model of that name.
        UsageError: an argument is of another type or out of range.
    """
    if name.startswith(CI2P_TIMM_PREFIX):
        return CI2PTimmConfig(
            name=name,
            num_classes=num_classes,
            latent_channels=latent_channels,
            latent_size=latent_size,
            drop_path_rate=drop_path_rate,
        )
    _require_known(name, TIMM_PREFIX)
    inputs = made_for(name)
    return TimmConfig(
        name=name,
        num_classes=num_classes,
        image_size=latent_size * DOWNSAMPLING,
        drop_path_rate=drop_path_rate,
        mean=tuple(inputs.mean),
        std=tuple(inputs.std),
    )


def made_for(name: str) -> Any:
    """Returns what timm records of a model's input: size, mean, deviation.

    Args:
        name: A name that timm knows, behind `TIMM_PREFIX`.
    """
    import timm

    return timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))


def _require_known(name: object, prefix: str) -> None:
    """Raises UnknownModelError unless timm lists the name behind the prefix.

    Only listed names reach timm, which takes others for addresses of models to fetch.
    """
    import timm

    require_name(name)
    known, timm_name = timm.list_models(), str(name).removeprefix(prefix)
    if str(name).startswith(prefix) and timm_name in known:
        return
    # Names are long: the beginning of one is nearer to short others than to itself.
    begun = [each for each in known if timm_name and each.startswith(timm_name)]
    close = begun[:3] or difflib.get_close_matches(timm_name.lower(), known, n=3, cutoff=0.5)
    raise UnknownModelError(
        f"no model is named {name!r}: timm {timm.__version__} has no {timm_name!r}"
        + (" (give it without the tag of pretrained weights)" if "." in timm_name else ""),
        hint=f"did you mean {', '.join(prefix + each for each in close)}?" if close else None,
    )
