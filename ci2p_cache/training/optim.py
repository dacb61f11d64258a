"""The optimiser and its schedule; the learning rate is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ci2p_cache.errors import CheckpointError
from ci2p_cache.training.layers import parameter_layers
from ci2p_cache.training.spec import TrainSpec

__all__ = ["load_optimizer_tensors", "lr_at", "make_optimizer", "optimizer_tensors", "set_lr"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_LR_SCALE = "lr_scale"
"""timm's name for the factor that a group of parameters puts on the learning rate."""


def make_optimizer(model: nn.Module, spec: TrainSpec) -> Optimizer:
    """Returns Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Both run torch's fused kernels, which alone take a flag on the device that says "skip this
    step". Parameters of one dimension (biases, norms) do not decay unless the spec says so. With
    `layer_decay` d a layer's learning rate is d to the number of layers above it times that of the
    last, as `parameter_layers` counts them.

    Raises:
        UsageError: `layer_decay` is not 1 and the model does not say its layers.
    """
    layers: dict[str, int] = {}
    if spec.layer_decay != 1:
        layers = parameter_layers(model)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
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
