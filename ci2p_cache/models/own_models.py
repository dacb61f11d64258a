"""Models of the user's own: `FILE.py:NAME`, a class or function that returns a module.

::

    class Small(nn.Module):                     # in mine.py: train shards/ --model mine.py:Small
        reads = "latents"                       # or "images", float32 RGB in [0, 1]

        def __init__(self, num_classes: int, latent_channels: int) -> None: ...
        def forward(self, latents): ...         # (B, M, h, w), or (B, 3, H, W), to logits (B, K)

The record of such a model holds the name and sha256 of its file, and never where the file is. So a
run folder, which may come from a stranger, runs no code: whoever opens one names the file again,
and a file with another digest is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ci2p_cache.errors import ManifestError, RefusedError, RunMismatchError, UsageError
from ci2p_cache.imported import (
    import_file,
    naming_errors,
    needed_arguments,
    pinned_location,
    read_python,
    split_location,
)
from ci2p_cache.models.baselines import check_images
from ci2p_cache.models.ci2p_vit import check_fields
from ci2p_cache.record import Record
from ci2p_cache.specs import DOWNSAMPLING

__all__ = ["OwnCode", "OwnConfig", "OwnModel", "own_config", "with_own_code"]

_NAME = re.compile(r"[^/\\\s]+\.py:[A-Za-z_]\w*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_OFF = {"drop_path_rate": (0.0, "--drop-path 0"), "pos_embed": (False, "no --pos-embed")}
"""Settings that a model may do without -> the value that switches them off, and its option."""


@dataclass(frozen=True, slots=True)
class OwnCode:
    """The file of a model as it was read, and what in it makes the module."""

    path: Path
    """Where it was."""
    content: bytes
    """What it held, and what was run of it."""
    make: Callable[..., Any]
    """The class or function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnConfig(Record):
    """What a model of the user's own was made with; see `ModelConfig` too."""

    kind: Literal["own"] = "own"
    """How `config_from_dict` distinguishes records."""
    version: int = 1
    name: str
    """Name of the file and of what makes the model in it: `mine.py:Small`."""
    sha256: str
    """Digest of the file, 64 hex digits."""
    reads: Literal["latents", "images"]
    """What the model takes, as it says itself."""
    parameters: int
    """Its trainable parameters, counted when it was first built."""
    num_classes: int = 1000
    latent_channels: int = 192
    """M of the latents; models on images do not look at it."""
    latent_size: int = 16
    """Rows and columns of the latents; images have 16 times as many."""
    pos_embed: bool = False
    drop_path_rate: float = 0.1
    code: OwnCode | None = field(default=None, compare=False, repr=False)
    """What builds it; never in `to_dict`, so None in a record that was read from a file."""

    def __post_init__(self) -> None:
        check_fields(self, latent_channels=(1, 1), latent_size=(2, 2), parameters=(0, 1))
        if not _NAME.fullmatch(self.name) or not _SHA256.fullmatch(self.sha256):
            raise UsageError(
                f"model `name` is {self.name[:80]!r} and `sha256` {self.sha256[:80]!r}; wanted "
                "FILE.py:NAME without folders, and 64 hex digits"
            )

    @property
    def bound_name(self) -> str:
        """What binds a run folder: the name with the file's digest, and never a path."""
        return f"{self.name}#{self.sha256}"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input."""
        if self.reads == "latents":
            return (self.latent_channels, self.latent_size, self.latent_size)
        return (3, self.latent_size * DOWNSAMPLING, self.latent_size * DOWNSAMPLING)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, without the code."""
        names = [name for name in self.__dataclass_fields__ if name != "code"]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds a record written by `to_dict`; it has no code.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if "code" in data:
            raise ManifestError("OwnConfig has the unknown field `code`")
        # By name: with slots a dataclass is another class than the one that `super()` knows.
        return super(OwnConfig, cls).from_dict({**data, "code": None})


def _read(path: Path, name: str, sha256: str | None) -> tuple[OwnCode, str]:
    """Reads and imports a file; returns its code and digest. No other digest than `sha256` runs.

    Raises:
        UsageError: there is no such file or name, or importing it raises.
        RunMismatchError: the file has another digest.
    """
    content = read_python(path)
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise RunMismatchError(
            f"{path} has changed: its sha256 is {found[:12]}..., {str(sha256)[:12]}... is wanted; "
            "nothing of it was run"
        )
    make = getattr(import_file(path, content), name, None)
    if not callable(make):
        raise UsageError(f"{path} has no class or function {name!r}")
    return OwnCode(path, content, make), found


def own_config(
    name: str,
    *,
    num_classes: int,
    latent_channels: int,
    latent_size: int,
    pos_embed: bool,
    drop_path_rate: float,
) -> OwnConfig:
    """Returns the record of a model of one's own, built once and run on one batch.

    `name` is `FILE.py:NAME`, or with `#` and the sha256 that the file must have; all else is as for
    `registry.model_config`.

    Raises:
        UsageError: the file cannot be used, the model takes other arguments or takes no notice of a
            setting, does not say what it reads, or does not take or give what it has to.
        RunMismatchError: the file has another sha256 than the name says.
    """
    location = pinned_location(name)
    assert location is not None
    code, sha256 = _read(*location)
    label = f"{location[0].name}:{location[1]}"
    base = OwnConfig(
        name=label,
        sha256=sha256,
        reads="latents",
        parameters=0,
        num_classes=num_classes,
        latent_channels=latent_channels,
        latent_size=latent_size,
        pos_embed=pos_embed,
        drop_path_rate=drop_path_rate,
        code=code,
    )
    with torch.random.fork_rng(devices=[]):
        module = _made(base)
        reads = getattr(code.make, "reads", getattr(module, "reads", None))
        if reads not in ("latents", "images"):
            raise UsageError(
                f"{label} does not say what it reads: its attribute `reads` is {reads!r}; wanted "
                "'latents' or 'images'",
                hint=f"write {location[1]}.reads = 'latents' in {code.path}",
            )
        _check_weights(label, module)
        parameters = sum(each.numel() for each in module.parameters() if each.requires_grad)
        config = replace(base, reads=reads, parameters=parameters)
        _check_outputs(config, module)
    return config


def _made(config: OwnConfig) -> nn.Module:
    """Calls what makes the model, with those of the record's settings that it takes."""
    code = config.code
    if code is None:
        raise RefusedError(
            f"{config.name} is a model of somebody's own; its code runs only if you name its file"
        )
    settings = {
        "num_classes": config.num_classes,
        "latent_channels": config.latent_channels,
        "latent_size": config.latent_size,
        "image_size": config.latent_size * DOWNSAMPLING,
        "pos_embed": config.pos_embed,
        "drop_path_rate": config.drop_path_rate,
    }
    taken = inspect.signature(code.make).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        settings = {name: value for name, value in settings.items() if name in taken}
    if unknown := [name for name in needed_arguments(code.make) if name not in settings]:
        raise UsageError(
            f"{config.name} wants the arguments {', '.join(unknown)}; it may take num_classes, "
            "latent_channels, latent_size, image_size, pos_embed and drop_path_rate"
        )
    for name, (off, option) in _OFF.items():
        if getattr(config, name) != off and name not in settings:
            raise UsageError(
                f"{config.name} has no argument `{name}`, and {getattr(config, name)} is asked for",
                hint=f"set it to {off} (train: {option}), or add the argument",
            )
    with naming_errors(config.name, code.path):
        module = code.make(**settings)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{config.name} returns {type(module).__name__}; wanted a torch.nn.Module")
    return module


def _check_weights(name: str, module: nn.Module) -> None:
    """Raises UsageError unless the weights can be trained and saved as all others are."""
    others = {str(each.dtype) for each in module.parameters()} - {"torch.float32"}
    if others:
        raise UsageError(f"{name} has parameters of {', '.join(sorted(others))}; wanted float32")
    if not any(each.requires_grad for each in module.parameters()):
        raise UsageError(f"{name} has no trainable parameter")
    places: dict[int, str] = {}
    for key, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} has {key} in its state_dict; only tensors can be saved")
        other = places.setdefault(value.data_ptr(), key) if value.numel() else key
        if other != key:
            raise UsageError(f"{name} has {key} and {other} in one memory; checkpoints keep each")


def _check_outputs(config: OwnConfig, module: nn.Module) -> None:
    """Raises UsageError unless the module takes two inputs in eval mode, and gives their logits."""
    # As many as BatchNorm needs, so a model without eval mode passes too.
    inputs = torch.rand(2, *config.input_shape)
    takes = f"{config.reads} {tuple(inputs.shape)}"
    assert config.code is not None
    with naming_errors(f"{config.name} on {takes}", config.code.path):
        logits = module.eval()(inputs)
    wanted = f"(2, {config.num_classes or 'D'})"
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"{config.name} gives {type(logits).__name__} for {takes}; wanted a tensor {wanted}"
        )
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != 2 or config.num_classes not in (0, shape[1]):
        raise UsageError(f"{config.name} gives {shape} for {takes}; wanted logits {wanted}")
    if logits.dtype != torch.float32:
        raise UsageError(f"{config.name} gives {logits.dtype} for {takes}; wanted float32")
    if not logits.isfinite().all():
        raise UsageError(f"{config.name} gives logits that are not finite for {takes}")
    if not logits.requires_grad:
        raise UsageError(f"{config.name} gives logits without gradients for {takes}")


class OwnModel(nn.Module):
    """A model of the user's own, which refuses inputs of another shape than it was made for.

    Raises:
        RefusedError: the record was read from a file, and the model's code was not named.
        UsageError: the code raises, or returns no module.
    """

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _made(config)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits (B, K), or features (B, D) where K is 0.

        Raises:
            UsageError: the inputs have another shape.
        """
        config, shape = self.config, tuple(inputs.shape)
        if config.reads == "images":
            check_images(inputs, name=config.name, size=config.input_shape[1])
        elif shape[1:] != config.input_shape:
            wanted = ", ".join(map(str, config.input_shape))
            raise UsageError(f"{config.name} reads latents (batch, {wanted}), got {shape}")
        return self.model(inputs)  # type: ignore[no-any-return]  # modules' calls are untyped


def with_own_code(config: Any, named: str | Path | None, *, run: Path, copy: Path) -> Any:
    """Returns the record of a run's model, with its code where it is one of the user's own.

    Args:
        config: Of any model.
        named: The file that the user names for this run, `FILE.py` or `FILE.py:NAME`; None: none.
        run: The run folder, for messages.
        copy: The file that the run was started with, as the run folder keeps it; never read here.

    Raises:
        RefusedError: it is a model of the user's own, and `named` is None.
        RunMismatchError: the file has another sha256 than the run's.
        UsageError: a file is named for another model, or cannot be used.
    """
    if not isinstance(config, OwnConfig):
        if named is not None:
            raise UsageError(f"{run} has the model {config.name}; it needs no file for it")
        return config
    if named is None:
        raise RefusedError(
            f"{run} has a model of its own, {config.name}; its code runs only if you name the file",
            hint=f"repeat the command with --model FILE.py; {copy} is a copy, to be read first",
        )
    path, name = split_location(str(named))
    function = config.name.rpartition(":")[2]
    if name not in (None, function):
        raise UsageError(f"{run} has the model {config.name}; {str(named)!r} was named for it")
    code, _ = _read(path, function, config.sha256)
    return replace(config, code=code)
