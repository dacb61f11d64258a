"""From a weights file's tensors to a model of one of the zoo's architectures.

The paper's, bmshj2018-factorized, is our own `FactorizedPrior`: Balle, Minnen, Singh, Hwang and
Johnston 2018, arXiv 1802.01436. ::

    x --g_a--> y --rounding--> y_hat --g_s--> x_hat
                                 +--entropy_bottleneck--> mass of each bin --> bits

It has CompressAI's state dict, key by key, and its values, bit by bit. What only training or real
entropy coding needs is not here: compressai has it.

Shape suffixes: B batch, M latent channels, K values of a channel, r s widths of a small network, h
w latent rows and columns.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ci2p_cache.encoder.weights import Metric, WeightsFile
from ci2p_cache.encoder.zoo import ARCH, ZOO, compressai_model, require_arch
from ci2p_cache.errors import MissingDependencyError, UsageError, WeightsError
from ci2p_cache.gdn import GDN, AnalysisTransform, LowerBound

__all__ = [
    "Codec",
    "EntropyBottleneck",
    "FactorizedPrior",
    "build_codec",
    "check_choice",
    "own_model",
    "value_tensors",
]

_WIDTHS = (1, 3, 3, 3, 3, 1)
_LEAST_MASS = 1e-9
"""The paper's network, and CompressAI's bound on the mass of a bin."""


class EntropyBottleneck(nn.Module):
    """The learned distribution of each channel of y; its weights are zero until they are loaded.

    A channel's cumulative is the sigmoid of a small increasing network: appendix 6.1 of the paper.
    """

    def __init__(self, num_channels: int, *, device: str | None = None) -> None:
        super().__init__()

        def parameters(*shapes: tuple[int, int]) -> nn.ParameterList:
            return nn.ParameterList(
                torch.zeros(num_channels, *shape, device=device) for shape in shapes
            )

        self.likelihood_lower_bound = LowerBound(_LEAST_MASS, saved=True)
        self.matrices = parameters(*((s, r) for r, s in itertools.pairwise(_WIDTHS)))
        self.biases = parameters(*((s, 1) for s in _WIDTHS[1:]))
        self.factors = parameters(*((s, 1) for s in _WIDTHS[1:-1]))
        self.quantiles = nn.Parameter(torch.zeros(num_channels, 1, 3, device=device))

    def bin_mass(self, values_M1K: Tensor, width: float) -> Tensor:
        """Returns the mass of the bin of `width` around each value, at least 1e-9: (M, 1, K)."""
        lower_M1K = self._logits(values_M1K - width / 2)
        upper_M1K = self._logits(values_M1K + width / 2)
        mass_M1K: Tensor = self.likelihood_lower_bound(upper_M1K.sigmoid() - lower_M1K.sigmoid())
        return mass_M1K

    def _logits(self, values_M1K: Tensor) -> Tensor:
        """Returns the logit of the cumulative at each value."""
        logits_MrK = values_M1K
        for layer, (matrix_Msr, bias_Ms1) in enumerate(
            zip(self.matrices, self.biases, strict=True)
        ):
            logits_MrK = torch.matmul(softplus(matrix_Msr), logits_MrK) + bias_Ms1
            if layer < len(self.factors):
                gate_Mr1 = torch.tanh(self.factors[layer])
                logits_MrK = logits_MrK + gate_Mr1 * torch.tanh(logits_MrK)
        return logits_MrK


class FactorizedPrior(nn.Module):
    """g_a, g_s and the entropy model; convolutions are drawn as torch draws them.

    On the device "meta" nothing is drawn or held: load a state dict with `assign=True` then.
    Constants are on torch's default device. N is `width`, M `latent_channels`.
    """

    def __init__(self, width: int, latent_channels: int, *, device: str | None = None) -> None:
        super().__init__()
        self.M = latent_channels
        self.entropy_bottleneck = EntropyBottleneck(latent_channels, device=device)
        self.g_a = AnalysisTransform(width, latent_channels, saves_constants=True, device=device)
        self.g_s = _SynthesisTransform(latent_channels, width, device=device)


class _SynthesisTransform(nn.Sequential):
    """Turns y_hat (B, M, h, w) into images (B, 3, 16 h, 16 w): g_s, the mirror of g_a."""

    def __init__(self, latent_channels: int, width: int, *, device: str | None) -> None:
        channels = (latent_channels, width, width, width, 3)
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            parts.append(
                nn.ConvTranspose2d(
                    before, after, 5, stride=2, padding=2, output_padding=1, device=device
                )
            )
            parts.append(GDN(after, inverse=True, saves_constants=True, device=device))
        super().__init__(*parts[:-1])


if TYPE_CHECKING:
    from compressai.models import CompressionModel


Codec: TypeAlias = Union[FactorizedPrior, "CompressionModel"]
"""What has g_a, g_s and M: our own model of ARCH, compressai's of another architecture."""

# Tables for the entropy coder, and the goal of a training loss: they change no y, y_hat or x_hat,
# and are there or not depending on who saved the file.
_DERIVED = ("_quantized_cdf", "_offset", "_cdf_length", "scale_table", "target")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NUM_SHOWN = 3

# What earlier versions of CompressAI call the entropy model's parameters: _matrices.0, _matrix0.
_OLD_NAME = re.compile(r"entropy_bottleneck\._(matri(?:x|ces\.)|bias(?:es\.)?|factor(?:s\.)?)(\d)")
_NEW_NAMES = {"m": "matrices", "b": "biases", "f": "factors"}


def check_choice(arch: str, quality: int, metric: str) -> None:
    """Refuses what CompressAI's zoo does not have.

    Raises:
        UsageError: arch, quality or metric is unknown.
    """
    if arch not in ZOO:
        raise UsageError(f"`arch` is {arch!r}; wanted one of {', '.join(ZOO)}")
    if not 1 <= quality <= len(ZOO[arch]):
        raise UsageError(f"`quality` is {quality}; {arch} has qualities 1 to {len(ZOO[arch])}")
    if metric not in get_args(Metric):
        raise UsageError(f"`metric` is {metric!r}; wanted one of {', '.join(get_args(Metric))}")


def value_tensors(model: Codec) -> dict[str, Tensor]:
    """Returns the parameters and buffers that change a value, by their name in the state dict."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not _is_derived(name)}


def build_codec(file: WeightsFile, arch: str, quality: int) -> Codec:
    """Builds the model of an `arch` and `quality` of the zoo with the weights of a file.

    Key names of older CompressAI versions and of DataParallel are understood. Constants of the
    architecture (bounds, pedestals) come from the file where it has them, else from CompressAI.
    Float16 and bfloat16 tensors become float32, which is exact.

    Returns:
        The float32 model on the CPU, with copies of the tensors; compressai's has its entropy
        coder's tables not yet made (`update()`).

    Raises:
        WeightsError: the file does not fit; says which keys and shapes, and what it does fit.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
    """
    require_arch(arch)
    state = _canonical(file)
    model = _unfilled(arch, quality)
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
    if arch == ARCH:
        return own_model(quality, state)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def own_model(quality: int, tensors: Mapping[str, Tensor]) -> FactorizedPrior:
    """Builds our own model of ARCH on the CPU, in float32, from copies of all its weights.

    Constants that are missing are CompressAI's.
    """
    model = _unfilled(ARCH, quality)
    # A copy, because the file behind a tensor that safetensors maps into memory may change.
    copies = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    model.load_state_dict({**model.state_dict(), **copies}, assign=True)
    assert isinstance(model, FactorizedPrior)
    return model


def _unfilled(arch: str, quality: int) -> Codec:
    """Builds a model of the right shapes: our own without weights, compressai's with drawn ones."""
    if arch != ARCH:
        return compressai_model(arch, quality)
    width, latent_channels = ZOO[ARCH][quality - 1]
    return FactorizedPrior(width, latent_channels, device="meta")


def _canonical(file: WeightsFile) -> dict[str, Any]:
    """Returns the file's state dict under today's names, without derived tables."""
    state: dict[str, Any] = {}
    for name, value in file.tensors.items():
        today = name.removeprefix("module.").replace(".downsample.", ".skip.")
        if old := _OLD_NAME.fullmatch(today):
            today = f"entropy_bottleneck.{_NEW_NAMES[old[1][0]]}.{old[2]}"
        state[today] = value
    if any(re.match(r"entropy_bottleneck(?!\.)", name) for name in state):
        raise WeightsError(f"weights file {file.path} has keys that no CompressAI version writes")
    if len(state) != len(file.tensors):
        raise WeightsError(f"weights file {file.path} has the same tensor under two names")
    return {name: value for name, value in state.items() if not _is_derived(name)}


def _is_derived(name: str) -> bool:
    return name.rpartition(".")[2] in _DERIVED


def _misfit(state: Mapping[str, Any], model: Codec) -> str:
    """Says how a state dict differs from what a model wants; empty where it fits."""
    wanted = value_tensors(model)
    required = {name for name, _ in model.named_parameters()}
    reshaped = {
        name: f"{name!r} is {_described(state[name])}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and not _has_shape(state[name], tensor.shape)
    }
    findings: list[str] = []
    for what, names in (
        ("missing", required - set(state)),
        ("unexpected", set(state) - set(wanted)),
        ("of another shape", set(reshaped)),
    ):
        # Few are shown, and g_a's tensors say most.
        ordered = sorted(names, key=lambda name: (not name.startswith("g_a."), name))
        shown = ", ".join(reshaped.get(name, repr(name)) for name in ordered[:_NUM_SHOWN])
        if len(names) > _NUM_SHOWN:
            shown += f" and {len(names) - _NUM_SHOWN} more"
        findings += [f"{len(names)} keys {what} ({shown})"] if names else []
    return "; ".join(findings)


def _has_shape(value: Any, shape: torch.Size) -> bool:
    """Whether a value is an ordinary CPU tensor of that shape; a foreign file may hold others."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.device.type == "cpu" and value.shape == shape


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _looks_like(state: Mapping[str, Any]) -> str:
    """Says which architecture and qualities a state dict does fit."""
    if not any(name.startswith("g_a.") for name in state):
        return "It holds no g_a, so it is no CompressAI encoder"
    first = [value for name, value in state.items() if name.startswith("g_a.0.")]
    widths = {
        kernel.shape[0] for kernel in first if isinstance(kernel, Tensor) and kernel.ndim == 4
    }
    # All but ARCH have one; to build these takes seconds, and compressai.
    hyperprior = any(name.startswith("h_a.") for name in state)
    try:
        for arch in ZOO if hyperprior else (ARCH,):
            require_arch(arch)
            for sizes in dict.fromkeys(ZOO[arch]):
                same = [quality for quality, other in enumerate(ZOO[arch], 1) if other == sizes]
                if sizes[0] in widths and not _misfit(state, _unfilled(arch, same[0])):
                    span = f"qualities {same[0]} to {same[-1]}"
                    return f"It fits {arch} {span} {_sizes(arch, same[0])}"
    except MissingDependencyError:
        return f"It has a hyperprior (h_a), and {ARCH} has none"
    shapes = [state.get(f"g_a.{layer}.weight") for layer in (0, 6)]
    if all(isinstance(weight, Tensor) and weight.ndim == 4 for weight in shapes):
        return "Its g_a has N={}, M={}, which fits no architecture with the other keys".format(
            *(len(weight) for weight in shapes if weight is not None)
        )
    return f"It fits none of {', '.join(ZOO)}"


def _sizes(arch: str, quality: int) -> str:
    sizes = ZOO[arch][quality - 1]
    return f"(N={sizes[0]:d}, M={sizes[-1]:d})"
