"""Many small networks trained side by side: one batch of matrices a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def stacked_mlp(runs: int, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """He-normal weights [runs, in, out] and zero biases [runs, 1, out] by turns, for layers of these sizes."""
    found: list[Tensor] = []
    for rows, columns in pairwise(sizes):
        found += [
            torch.randn(runs, rows, columns, generator=generator) * (2 / rows) ** 0.5,
            torch.zeros(runs, 1, columns),
        ]
    return found


def forward(
    layers: Sequence[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] = torch.nn.functional.relu
) -> Tensor:
    """Outputs [runs, n, out] of inputs [runs, n, in], with the activation between the layers."""
    for i in range(0, len(layers), 2):
        x = torch.baddbmm(layers[i + 1], x, layers[i])
        x = x if i + 2 == len(layers) else activation(x)
    return x


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over networks of their mean cross-entropy in nats: each gets the gradient of its own mean."""
    chosen = torch.log_softmax(logits, -1).gather(-1, labels[..., None])
    return -chosen.mean((1, 2)).sum()
