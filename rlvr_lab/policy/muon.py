"""Muon in float32 for many small matrices at once.

torch.optim.Muon orthogonalises one matrix at a time in bfloat16, which processors without bfloat16 units emulate: nine
times slower than the forward and backward pass of the tiny lab. Here matrices of equal shape are stacked, and the
iteration runs in their own precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# coefficients of the quintic iteration and the 0.2 of the AdamW-matched scale are those of torch.optim.Muon
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, eps: float = 1e-7) -> Tensor:
    """Approximate polar factor of each matrix of a stack [N, m, n] by five Newton-Schulz iterations."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    out: Tensor = x.mT if matrices.shape[-2] > matrices.shape[-1] else x
    return out


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that the update's size matches AdamW's: 0.2 sqrt(max(m, n)).

    Takes two-dimensional parameters only. Same update as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` up to
    that class's bfloat16 rounding.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for p in parameters:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            assert p.grad is not None  # the caller leaves out parameters without one
            buffer.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(buffer, group["momentum"]))
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for p, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)
