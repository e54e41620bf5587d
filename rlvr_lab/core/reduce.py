"""From a per-token matrix [B, T] to one number: reductions with honest names.

A reduction is computed as **token weights over the whole optimizer minibatch**: `loss = sum(weights * values)`. Each
micro-batch then sums its own rows with weights it was handed, so the result does not depend on how rows are split.

| here | verl `loss_agg_mode` | TRL `loss_type` | weight of a token of response i |
|---|---|---|---|
| `token_mean` | `token-mean` | `dapo` (global count), `bnpo` (local) | 1 / (tokens of the minibatch) |
| `sequence_mean_of_token_mean` | `seq-mean-token-mean` | `grpo` | 1 / (non-empty responses x tokens of i) |
| `sequence_mean_of_token_sum` | `seq-mean-token-sum` | | 1 / (non-empty responses) |
| `sequence_mean_of_token_sum_over_constant` | `seq-mean-token-sum-norm` / B | `dr_grpo` | 1 / (responses x constant) |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

Reduction = Literal[
    "token_mean",
    "sequence_mean_of_token_mean",
    "sequence_mean_of_token_sum",
    "sequence_mean_of_token_sum_over_constant",
]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def reduction_weights(mask_BT: Tensor, reduction: Reduction, constant: float | None = None) -> Tensor:
    """Weights [B, T], zero outside the mask, such that the reduction of x is `(weights * x).sum()`.

    `constant` is the fixed length by which `sequence_mean_of_token_sum_over_constant` divides (Dr. GRPO, arXiv
    2503.20783: the maximal response length). An empty response counts in that reduction only.
    Raises ValueError where no token is left, or where the constant is missing.
    """
    mask = mask_BT.float()
    if not bool(mask_BT.any()):
        raise ValueError("every token of this minibatch is masked: there is nothing to average over")
    tokens_B1 = mask.sum(1, keepdim=True)
    non_empty = (tokens_B1 > 0).sum()
    if reduction == "sequence_mean_of_token_sum_over_constant":
        if constant is None or constant <= 0:
            raise ValueError("sequence_mean_of_token_sum_over_constant needs a positive constant (a length in tokens)")
        return mask / (len(mask) * constant)
    weights: dict[str, Callable[[], Tensor]] = {
        "token_mean": lambda: mask / mask.sum(),
        "sequence_mean_of_token_mean": lambda: mask / (tokens_B1.clamp_min(1) * non_empty),
        "sequence_mean_of_token_sum": lambda: mask / non_empty,
    }
    if reduction not in weights:
        raise ValueError(f"unknown reduction '{reduction}'; there are {', '.join(REDUCTIONS)}")
    return weights[reduction]()


def reduce(values_BT: Tensor, mask_BT: Tensor, reduction: Reduction, constant: float | None = None) -> Tensor:
    """Reduce a per-token matrix over the mask; masked entries are inert even where they are nan or infinite."""
    weights = reduction_weights(mask_BT, reduction, constant)
    return (weights * values_BT.masked_fill(~mask_BT, 0.0)).sum()


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over marked entries; nan where none is marked, which means undefined."""
    total = mask_BT.sum()
    mean = values_BT.masked_fill(~mask_BT, 0.0).sum() / total.clamp_min(1)
    return mean.masked_fill(total == 0, float("nan"))
