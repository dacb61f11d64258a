"""The optimiser, its schedule, the layers that it knows, and the average of the weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ci2p_cache.errors import CheckpointError, UsageError
from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "WeightAverage",
    "decay_at",
    "freeze_layers",
    "load_optimizer_tensors",
    "lr_at",
    "make_optimizer",
    "optimizer_tensors",
    "parameter_layers",
    "set_lr",
]

_LEAVE = {"layer_decay": "leave `layer_decay` at 1", "freeze": "leave out `freeze` (--freeze)"}
_BLOCK = re.compile(r"(blocks|last_blocks)\.(\d+)\.")


def parameter_layers(
    model: nn.Module, *, wanted_by: Literal["layer_decay", "freeze"] = "layer_decay"
) -> dict[str, int]:
    """Returns the layer of every parameter, from 0 at the input, by its name.

    Layer-wise decay of the learning rate is BEiT's (Bao et al. 2022, arXiv 2106.08254): layers near
    the input, whose features are the most general, move the least. Layer 0 is all that is before
    the blocks, then each block is a layer, and norm and head are the last.

    A module with timm's `group_matcher` says so itself; our own have `blocks`, a CI2P-ViTds also
    `last_blocks`, with CnnReshape in the layer of the first of these, whose tokens it makes. Either
    may be inside of `model`; what is in front of it there is layer 0.

    Raises:
        UsageError: the model is of neither kind, or something trainable follows it.
    """
    known = ((prefix, _layers_of(module)) for prefix, module in model.named_modules())
    prefix, layers = next((each for each in known if each[1] is not None), ("", None))
    if layers is None:
        raise UsageError(
            f"`{wanted_by}` needs to know the layers of a model, and {type(model).__name__} does "
            "not say them: it has neither `blocks` nor timm's `group_matcher`",
            hint=_LEAVE[wanted_by],
        )
    inner = {f"{prefix}.{name}".lstrip("."): layer for name, layer in layers.items()}
    names = [name for name, _ in model.named_parameters()]
    places = [place for place, name in enumerate(names) if name in inner]
    behind = [name for name in names[max(places, default=0) :] if name not in inner]
    if behind:
        raise UsageError(
            f"`{wanted_by}` does not know the layer of {behind[0]}, which follows the model that "
            "says its own",
            hint=_LEAVE[wanted_by],
        )
    return {name: inner.get(name, 0) for name in names}


def _layers_of(module: nn.Module) -> dict[str, int] | None:
    """Returns the layers of a module that knows them, None where it does not."""
    names = [name for name, _ in module.named_parameters()]
    matcher = getattr(module, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        found: dict[str, int] = group_parameters(module, matcher(coarse=False), reverse=True)
        last = max(found.values())
        return {name: found.get(name, last) for name in names}
    first = getattr(module, "blocks", None)
    if not isinstance(first, nn.Sequential) or not hasattr(module, "head"):
        return None
    num_first, num_last = len(first), len(getattr(module, "last_blocks", ()))
    layers = dict.fromkeys(names, 0)
    for name in names:
        if block := _BLOCK.match(name):
            layers[name] = 1 + int(block[2]) + (num_first if block[1] == "last_blocks" else 0)
        elif name.startswith("cnn_reshape."):
            layers[name] = 1 + num_first
        elif name.startswith(("norm.", "head.")):
            layers[name] = 1 + num_first + num_last
    return layers


def freeze_layers(model: nn.Module, count: int) -> None:
    """Keeps the weights of the first layers as they are: as many as `count`, from the input.

    BatchNorm in them still normalises by its batches, and its statistics are estimated from the new
    samples, as in the layers that are trained.

    Raises:
        UsageError: the model does not say its layers, or nothing but the last one would be left.
    """
    if not count:
        return
    layers = parameter_layers(model, wanted_by="freeze")
    last = max(layers.values())
    if count > last:
        raise UsageError(
            f"`freeze` (--freeze) is {count}; the model has {last + 1} layers, the last of which "
            f"is trained: wanted at most {last}, which trains norm and head alone"
        )
    for name, parameter in model.named_parameters():
        if layers[name] < count:
            parameter.requires_grad_(False)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_LR_SCALE = "lr_scale"
"""timm's name for the factor that a group of parameters puts on the learning rate."""


def make_optimizer(model: nn.Module, spec: TrainSpec) -> Optimizer:
    """Returns Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Both run torch's fused kernels, which alone take a flag on the device that says "skip this
    step". Parameters of one dimension (biases, norms) do not decay unless the spec says so. With
    `layer_decay` d a layer's learning rate is d to the number of layers above it times that of the
    last, as `parameter_layers` counts them. Parameters that take no gradients are left out.

    Raises:
        UsageError: `layer_decay` is not 1 and the model does not say its layers.
    """
    layers = parameter_layers(model) if spec.layer_decay != 1 else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 or spec.decay_norm_and_bias
        groups.setdefault((layers.get(name, last), decays), []).append(parameter)
    kind = AdamW if spec.optimizer == "adamw" else Adam
    return kind(
        [
            {
                "params": groups[layer, decays],
                "weight_decay": spec.decay if decays else 0.0,
                _LR_SCALE: spec.layer_decay ** (last - layer),
            }
            # Those that decay first, within a layer.
            for layer, decays in sorted(groups, key=lambda group: (group[0], not group[1]))
        ],
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        fused=True,
    )


def lr_at(step: int, *, spec: TrainSpec, steps_per_epoch: int) -> float:
    """Returns the learning rate of an optimiser step, counted from 0 over all epochs.

    Linear up to `lr` over the warm-up, then a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)
    that the last step ends at `min_lr`.
    """
    warmup = round(spec.num_warmup_epochs * steps_per_epoch)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    last = spec.epochs * steps_per_epoch - 1
    progress = (step - warmup) / max(last - warmup, 1)
    return spec.min_lr + (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of the last layer; those below it get their share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_LR_SCALE]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's state as named tensors, `exp_avg/<parameter>` and so on."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave; parameters that it does not name start fresh.

    Raises:
        CheckpointError: a name or shape does not fit the model.
    """
    wanted: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if f"step/{name}" in tensors:
            # The fused kernels pair memory, not indices: moments must be as their parameter does.
            moments = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.empty_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.empty_like(parameter, memory_format=torch.preserve_format),
            }
            optimizer.state[parameter] = moments
            wanted |= {f"{moment}/{name}": tensor for moment, tensor in moments.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        odd = sorted(set(shapes.items()) ^ {(n, tuple(t.shape)) for n, t in wanted.items()})
        raise CheckpointError(f"the optimiser's tensors do not fit the model, for example {odd[0]}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of a step, counted from 0 over all epochs: min(decay, (1 + t) / (10 + t)).

    The rise of TensorFlow's `ExponentialMovingAverage`: without it the average of a short run, or
    of the first epochs, is mostly the random weights that it started from.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """A model whose floating-point parameters and buffers are the averages of another's.

    Polyak and Juditsky 1992; in the form that TensorFlow and timm made usual for image models.
    `timm.utils.ModelEmaV3` does the same but cannot leave out a step by a flag on the device, which
    is how a step that was not finite leaves everything as it was. BatchNorm's running statistics
    are averaged like weights until `BatchNormStatistics` replaces them; other buffers (counts,
    tables) are copied. Nothing waits for the device.

    Args:
        model: On its device, with the weights to start from; copied. Not compiled yet.
        decay: Share of the average that a step keeps, 0 < decay < 1, see `decay_at`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._averages: list[Tensor] = []
        self._followed: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def follow(self, model: nn.Module) -> None:
        """Takes the averages of this model from now on: the one it was copied from.

        Call it again whenever the model's tensors are replaced by others.
        """
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        pairs = list(zip(ours, theirs, strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._followed = [value for average, value in pairs if average.is_floating_point()]
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int, is_finite: Tensor) -> None:
        """Moves the averages towards the weights after a step, counted from 0 over all epochs.

        Where `is_finite`, a scalar on the device, is False nothing changes.
        """
        moved = (1 - decay_at(step, self._decay)) * is_finite.to(torch.float32)
        differences = torch._foreach_sub(self._followed, self._averages)
        torch._foreach_mul_(differences, moved)
        torch._foreach_add_(self._averages, differences)
        for average, value in self._copies:
            average.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the averages under the names of the model's `state_dict`."""
        return dict(self.module.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave.

        Raises:
            RuntimeError: a name or shape does not fit the model.
        """
        self.module.load_state_dict(dict(tensors))
