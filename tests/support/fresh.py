"""BatchNorm statistics as torch's own `update_bn` estimates them, to hold ours against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import ci2p_cache as cc
from ci2p_cache.models.registry import build_model
from ci2p_cache.training.inputs import model_config_for
from ci2p_cache.training.loaders import splits_of

__all__ = ["fresh_model", "statistics_of"]


def fresh_model(
    cache: cc.Cache, spec: cc.TrainSpec, weights: Mapping[str, Tensor], *, samples: int = 128
) -> nn.Module:
    """Returns a run's model with these weights, and with statistics of some of its samples.

    In whole batches of at most 64: the first of what would come after the run's last epoch, all
    where `samples` says no less.
    """
    model = build_model(model_config_for(cache, dataclasses.replace(spec, drop_path=0.0)))
    model.load_state_dict(dict(weights))
    train, _ = splits_of(cache, spec)
    size = min(spec.batch_size, 64, len(train.valid_rows))
    count = min(-(-samples // size), len(train.valid_rows) // size)
    shuffle = True if spec.order == "random" else spec.order
    with cc.LatentLoader(train, batch_size=size, seed=spec.seed, shuffle=shuffle) as loader:
        loader.set_epoch(spec.epochs)
        first = [batch.rows for batch in loader][:count]
    subset = train.subset(torch.cat(first).numpy())
    with cc.LatentLoader(subset, batch_size=size, seed=spec.seed) as loader:
        loader.set_epoch(spec.epochs)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            update_bn([batch.latents for batch in loader], model)
    return model.eval()


def statistics_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the BatchNorm means and variances among a model's tensors."""
    return {name: value for name, value in weights.items() if ".running_" in name}
