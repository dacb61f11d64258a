"""Which layer a parameter belongs to, counted from the input: for layer-wise learning rates.

Layer-wise decay of the learning rate is BEiT's (Bao et al. 2022, arXiv 2106.08254): layers near the
input, whose features are the most general, move the least. Layer 0 is all that is before the
blocks, then each block is a layer, and norm and head are the last.
"""

from __future__ import annotations

import re

from torch import nn

from ci2p_cache.errors import UsageError

__all__ = ["parameter_layers"]

_BLOCK = re.compile(r"(blocks|last_blocks)\.(\d+)\.")


def parameter_layers(model: nn.Module) -> dict[str, int]:
    """Returns the layer of every parameter, from 0 at the input, by its name.

    A module with timm's `group_matcher` says so itself; our own have `blocks`, a CI2P-ViTds also
    `last_blocks`, with CnnReshape in the layer of the first of these, whose tokens it makes. Either
    may be inside of `model`; what is in front of it there is layer 0.

    Raises:
        UsageError: the model is of neither kind, or something trainable follows it.
    """
    found = next(
        (
            (prefix, layers)
            for prefix, module in model.named_modules()
            if (layers := _layers_of(module)) is not None
        ),
        None,
    )
    if found is None:
        raise UsageError(
            f"`layer_decay` needs to know the layers of a model, and {type(model).__name__} does "
            "not say them: it has neither `blocks` nor timm's `group_matcher`",
            hint="leave `layer_decay` at 1",
        )
    prefix, layers = found
    inner = {f"{prefix}.{name}".lstrip("."): layer for name, layer in layers.items()}
    names = [name for name, _ in model.named_parameters()]
    places = [place for place, name in enumerate(names) if name in inner]
    behind = [name for name in names[max(places, default=0) :] if name not in inner]
    if behind:
        raise UsageError(
            f"`layer_decay` does not know the layer of {behind[0]}, which follows the model that "
            "says its own",
            hint="leave `layer_decay` at 1",
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
    depths = {"blocks": len(first), "last_blocks": len(getattr(module, "last_blocks", ()))}
    return {name: _layer(name, depths) for name in names}


def _layer(name: str, depths: dict[str, int]) -> int:
    """Returns the layer of a parameter of one of our own models."""
    block = _BLOCK.match(name)
    if block is not None:
        return 1 + int(block[2]) + (depths["blocks"] if block[1] == "last_blocks" else 0)
    if name.startswith("cnn_reshape."):
        return 1 + depths["blocks"]
    if name.startswith(("norm.", "head.")):
        return 1 + sum(depths.values())
    return 0
