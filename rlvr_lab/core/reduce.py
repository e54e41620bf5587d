"""From a per-token matrix [B, T] to one number: reductions with honest names.

A reduction is computed as **token weights over the whole optimizer minibatch**: `loss = sum(weights * values)`. Each
micro-batch then sums its own rows with weights it was handed, so the result does not depend on how rows are split.

| here | verl `loss_agg_mode` | TRL `loss_type` | weight of a token of response i |
|---|---|---|---|
| `token_mean` | `token-mean` | `dapo` (global count), `bnpo` (local) | 1 / (tokens of the minibatch) |
| `sequence_mean_of_token_mean` | `seq-mean-token-mean` | `grpo` | 1 / (non-empty responses x tokens of i) |
| `sequence_mean_of_token_sum` | `seq-mean-token-sum` | | 1 / (non-empty responses) |
| `sequence_mean_of_token_sum_over_constant` | `seq-mean-token-sum-norm` / B | `dr_grpo` | 1 / (responses x constant) |
| `token_sum_over_constant` | `seq-mean-token-sum-norm` | | 1 / constant |

verl's constant is `loss_scale_factor`, or else the padded length T; ours must be given, so that padding stays inert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import nearest

Reduction = Literal[
    "token_mean",
    "sequence_mean_of_token_mean",
    "sequence_mean_of_token_sum",
    "sequence_mean_of_token_sum_over_constant",
    "token_sum_over_constant",
]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
OVER_CONSTANT = ("sequence_mean_of_token_sum_over_constant", "token_sum_over_constant")


def reduction_weights(
    mask_BT: Tensor, reduction: Reduction, constant: float | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [B, T], zero outside the mask, such that the reduction of x is `(weights * x).sum()`.

    `constant` is the fixed length by which the two `..._over_constant` reductions divide (Dr. GRPO, arXiv 2503.20783:
    the maximal response length). An empty response counts in `sequence_mean_of_token_sum_over_constant` only.
    Raises ValueError where no token is left, where the constant is missing, and for an unknown name.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{reduction}'; {nearest(reduction, REDUCTIONS)}")
    if not bool(mask_BT.any()):
        raise ValueError("every token of this minibatch is masked: there is nothing to average over")
    if reduction in OVER_CONSTANT and (constant is None or constant <= 0):
        raise ValueError(f"{reduction} needs a positive constant (a length in tokens)")
    mask = mask_BT.to(dtype)
    tokens_B1 = mask.sum(1, keepdim=True)
    non_empty = (tokens_B1 > 0).sum()
    weights: dict[str, Callable[[], Tensor]] = {
        "token_mean": lambda: mask / mask.sum(),
        "sequence_mean_of_token_mean": lambda: mask / (tokens_B1.clamp_min(1) * non_empty),
        "sequence_mean_of_token_sum": lambda: mask / non_empty,
        "sequence_mean_of_token_sum_over_constant": lambda: mask / (len(mask) * (constant or 1.0)),
        "token_sum_over_constant": lambda: mask / (constant or 1.0),
    }
    return weights[reduction]()


def reduce(values_BT: Tensor, mask_BT: Tensor, reduction: Reduction, constant: float | None = None) -> Tensor:
    """Reduce a per-token matrix over the mask; masked entries are inert even where they are nan or infinite.

    Computed in the dtype of the values, and in float32 at least.
    """
    weights = reduction_weights(mask_BT, reduction, constant, torch.promote_types(values_BT.dtype, torch.float32))
    return (weights * values_BT.masked_fill(~mask_BT, 0.0)).sum()


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over marked entries; nan where none is marked, which means undefined."""
    total = mask_BT.sum()
    mean = values_BT.masked_fill(~mask_BT, 0.0).sum() / total.clamp_min(1)
    return mean.masked_fill(total == 0, float("nan"))
