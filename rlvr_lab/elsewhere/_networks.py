"""Many small networks trained side by side: one batch of matrices a layer."""

from __future__ import annotations

from collections.abc import Sequence
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


def logits(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs [runs, n, out] of inputs [runs, n, in], with ReLU between the layers."""
    for i in range(0, len(layers), 2):
        x = torch.baddbmm(layers[i + 1], x, layers[i])
        x = x if i + 2 == len(layers) else torch.relu(x)
    return x
