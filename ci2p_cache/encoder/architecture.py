"""CompressAI's architectures: which there are, and how a file's tensors become a model of one.

Importing compressai takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ci2p_cache.encoder.weights import Metric, WeightsFile
from ci2p_cache.errors import UsageError, WeightsError

if TYPE_CHECKING:
    from compressai.models import CompressionModel

__all__ = ["build_model", "check_choice", "has_factorized_prior", "new_model", "value_tensors"]

# Tables for the entropy coder, and the goal of a training loss: they change no y, y_hat or x_hat,
# and are there or not depending on who saved the file.
_DERIVED = ("_quantized_cdf", "_offset", "_cdf_length", "scale_table", "target")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NUM_SHOWN = 3


def check_choice(arch: str, quality: int, metric: str) -> None:
    """Refuses what CompressAI's zoo does not have.

    Raises:
        UsageError: arch, quality or metric is unknown.
    """
    from compressai.zoo.image import cfgs, model_urls

    if arch not in model_urls:
        raise UsageError(f"`arch` is {arch!r}; wanted one of {', '.join(model_urls)}")
    if quality not in cfgs[arch]:
        raise UsageError(f"`quality` is {quality}; {arch} has {_span(cfgs[arch])}")
    if metric not in get_args(Metric):
        raise UsageError(f"`metric` is {metric!r}; wanted one of {', '.join(get_args(Metric))}")


def has_factorized_prior(model: CompressionModel) -> bool:
    """Whether y itself is coded with fixed medians, so that symbols exist without a hyperprior."""
    from compressai.models import FactorizedPrior

    return isinstance(model, FactorizedPrior)


def value_tensors(model: CompressionModel) -> dict[str, Tensor]:
    """Gives the parameters and buffers that change a value, by their name in the state dict."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not _is_derived(name)}


def build_model(file: WeightsFile, arch: str, quality: int) -> CompressionModel:
    """Builds CompressAI's model of `arch` and `quality` with the weights of a file.

    Key names of older CompressAI versions and of DataParallel are understood. Constants of the
    architecture (bounds, pedestals) come from the file where it has them, else from CompressAI.
    Float16 and bfloat16 tensors become float32, which is exact.

    Args:
        file: The tensors.
        arch: A zoo name that `check_choice` accepts.
        quality: A quality that the arch has; it fixes N and M.

    Returns:
        The float32 model on the CPU, its entropy coder's tables not yet made (`update()`).

    Raises:
        WeightsError: the file does not fit; says which keys and shapes, and what it does fit.
    """
    state = _canonical(file)
    model = new_model(arch, quality)
    misfit = _misfit(state, model)
    if misfit:
        raise WeightsError(
            f"weights file {file.path} does not fit {arch} quality {quality} "
            f"{_sizes(arch, quality)}: {misfit}. {_looks_like(state)}"
        )
    for name, tensor in state.items():
        if tensor.dtype not in _FLOATS or not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"weights file {file.path}: {name!r} is {tensor.dtype} or holds values that are "
                "not finite; wanted finite float32, float16 or bfloat16"
            )
    model.load_state_dict({**model.state_dict(), **state})
    return model


def _canonical(file: WeightsFile) -> dict[str, Any]:
    """Returns the file's state dict under today's names, without derived tables."""
    from compressai.models.utils import remap_old_keys
    from compressai.zoo.pretrained import load_pretrained

    try:
        state = remap_old_keys("entropy_bottleneck", load_pretrained(dict(file.tensors)))
    except IndexError as error:
        raise WeightsError(
            f"weights file {file.path} has keys that no CompressAI version writes"
        ) from error
    if len(state) != len(file.tensors):
        raise WeightsError(f"weights file {file.path} has the same tensor under two names")
    return {name: value for name, value in state.items() if not _is_derived(name)}


def _is_derived(name: str) -> bool:
    return name.rpartition(".")[2] in _DERIVED


def new_model(arch: str, quality: int) -> CompressionModel:
    """Builds CompressAI's model with drawn weights; torch's global generator stays as it was."""
    from compressai.zoo.image import cfgs, model_architectures

    with torch.random.fork_rng(devices=[]):
        return model_architectures[arch](*cfgs[arch][quality])


def _misfit(state: Mapping[str, Any], model: CompressionModel) -> str:
    """Says how a state dict differs from what a model wants; empty where it fits."""
    wanted = value_tensors(model)
    required = {name for name, _ in model.named_parameters()}
    reshaped = [
        f"{name!r} is {_described(state[name])}, wanted {tuple(tensor.shape)}"
        for name, tensor in sorted(wanted.items(), key=lambda item: _by_interest(item[0]))
        if name in state and not _has_shape(state[name], tensor.shape)
    ]
    findings = (
        ("missing", [repr(name) for name in sorted(required - set(state), key=_by_interest)]),
        ("unexpected", [repr(name) for name in sorted(set(state) - set(wanted), key=_by_interest)]),
        ("of another shape", reshaped),
    )
    return "; ".join(
        f"{len(names)} keys {what} ({_few(names)})" for what, names in findings if names
    )


def _by_interest(name: str) -> tuple[bool, str]:
    """Sorts g_a's tensors to the front: few names are shown, and those tell most."""
    return not name.startswith("g_a."), name


def _has_shape(value: Any, shape: torch.Size) -> bool:
    """Whether a value is an ordinary CPU tensor of that shape; a foreign file may hold others."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.device.type == "cpu" and value.shape == shape


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _few(names: list[str]) -> str:
    rest = len(names) - _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _looks_like(state: Mapping[str, Any]) -> str:
    """Says which architecture and qualities a state dict does fit."""
    from compressai.zoo.image import cfgs, model_urls

    if not any(name.startswith("g_a.") for name in state):
        return "It holds no g_a, so it is no CompressAI encoder"
    for arch in model_urls:
        for sizes in dict.fromkeys(cfgs[arch].values()):
            same = [quality for quality, other in cfgs[arch].items() if other == sizes]
            if not _misfit(state, new_model(arch, same[0])):
                return f"It fits {arch} {_span(same)} {_sizes(arch, same[0])}"
    shapes = [state.get(f"g_a.{layer}.weight") for layer in (0, 6)]
    if all(isinstance(weight, Tensor) and weight.ndim == 4 for weight in shapes):
        return "Its g_a has N={}, M={}, which fits no architecture with the other keys".format(
            *(len(weight) for weight in shapes if weight is not None)
        )
    return f"It fits none of {', '.join(model_urls)}"


def _span(qualities: Iterable[int]) -> str:
    numbers = sorted(qualities)
    return f"qualities {numbers[0]} to {numbers[-1]}"


def _sizes(arch: str, quality: int) -> str:
    from compressai.zoo.image import cfgs

    sizes = cfgs[arch][quality]
    return f"(N={sizes[0]}, M={sizes[-1]})"
