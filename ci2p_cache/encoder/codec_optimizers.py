"""What moves a codec's parameters: Muon or Adam for the loss, and an Adam of the quantiles' own.

Where gradients come from, and when a step is made, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ci2p_cache.encoder.codec_spec import CodecSpec
from ci2p_cache.encoder.muon import Muon

__all__ = ["CodecOptimizers"]


class CodecOptimizers:
    """The optimisers of a bmshj2018-factorized codec.

    Args:
        parameters: All parameters of the model, by their names in it.
        spec: Learning rates, the kind, and where gradients are clipped.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: CodecSpec) -> None:
        # Kernels with a side of 3 colours are no mixing of features; Adam suits them better.
        kernels = {n for n, p in parameters.items() if p.ndim == 4 and 3 not in p.shape[:2]}
        by_muon = sorted(kernels) if spec.optimizer == "muon" else []
        rest = sorted(n for n in parameters if n not in by_muon and not _is_quantile(n))
        entropy = [parameters[n] for n in rest if n.startswith("entropy_bottleneck.")]
        others = [parameters[n] for n in rest if not n.startswith("entropy_bottleneck.")]
        groups: list[dict[str, Any]] = [
            {"params": others, "lr": spec.lr},
            {"params": entropy, "lr": spec.entropy_lr},
        ]
        quantiles = [p for name, p in parameters.items() if _is_quantile(name)]
        self._of_quantiles = torch.optim.Adam(quantiles, lr=spec.aux_lr)
        self._of_loss: list[Optimizer] = [torch.optim.Adam(groups)]
        if by_muon:
            dtype = getattr(torch, spec.precision)
            muon = Muon([parameters[n] for n in by_muon], lr=spec.lr, dtype=dtype)
            self._of_loss.append(muon)
        self._groups = [group for o in self._of_loss for group in o.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        self._trained = [p for name, p in parameters.items() if not _is_quantile(name)]
        self._clip_norm = spec.clip_norm

    def scale_lr(self, share: float) -> None:
        """Sets every learning rate of the loss to a share of its peak."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * share

    def clip_gradients(self) -> Tensor:
        """Clips the gradients of the loss; returns their L2 norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self._trained, self._clip_norm)

    def step(self) -> None:
        """Moves all but the quantiles."""
        for optimizer in self._of_loss:
            optimizer.step()

    def step_quantiles(self) -> None:
        """Moves the quantiles."""
        self._of_quantiles.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Gives an optimiser's state of a parameter, made as its first step would if missing."""
        for optimizer in (*self._of_loss, self._of_quantiles):
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                moments: dict[str, Tensor] = optimizer.state[parameter]
                if not moments:
                    moments["exp_avg"] = torch.zeros_like(parameter)
                    if isinstance(optimizer, torch.optim.Adam):
                        moments["step"] = torch.tensor(0.0)
                        moments["exp_avg_sq"] = torch.zeros_like(parameter)
                return moments
        raise AssertionError("every parameter has an optimiser")


def _is_quantile(name: str) -> bool:
    return name.endswith(".quantiles")
