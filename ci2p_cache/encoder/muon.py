"""Muon for convolutions: momentum whose matrix is made nearly orthogonal before it is applied.

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for hidden layers in
neural networks", 2024, kellerjordan.github.io/posts/muon. All directions of a layer move equally
fast, also those whose gradients are small. The scale that gives its updates the size of Adam's,
so that both take the same learning rate, is that of Liu et al., "Muon is scalable for LLM
training", 2025, arXiv 2502.16982.

torch.optim.Muon takes matrices only; a kernel (A, B, k, k) is one of A rows here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon"]

_MOMENTUM = 0.95
"""The authors'."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The authors' quintic; five rounds bring singular values to about 0.7-1.2."""
_ROUNDS = 5
_ADAM_RMS = 0.2
"""Root mean square of an update at learning rate 1; Liu et al."""


class Muon(torch.optim.Optimizer):
    """The optimiser; its state is `exp_avg`, the averaged gradient of each parameter.

    Args:
        parameters: Kernels of convolutions, each of at least two dimensions.
        lr: Learning rate, on Adam's scale.
        dtype: Arithmetic of the orthogonalisation, float32 or bfloat16. The authors' bfloat16 is
            enough; a CPU without such instructions takes 20 times as long for it as for float32.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is run
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - _MOMENTUM)
                # Nesterov's: the mean as it would be if the same gradient came once more.
                ahead = parameter.grad.lerp(mean, _MOMENTUM).flatten(1)
                scale = _ADAM_RMS * max(ahead.shape) ** 0.5
                update = _orthogonal(ahead, self._dtype).view(parameter.shape)
                parameter.add_(update, alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Gives a matrix of the same singular vectors and singular values near 1, float32."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-12)).to(dtype)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x if wide is matrix else x.T).to(matrix.dtype)
    return result.contiguous()
