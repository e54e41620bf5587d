"""Windows of high entropy, and how difficult a prompt is for the policy (ARES, arXiv 2510.08457).

A window's entropy is the mean token entropy of a few tokens in a row (`core.entropy.window_entropy`), in nats. A window
of high entropy is an event; responses are counted by their events, prompts sorted by how often they are solved.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .advantages import group_sums

BUCKETS = ("easy", "medium", "hard")
EASY, MEDIUM, HARD = range(3)
Over = Literal["mean", "median", "group"]


def row_quantiles(values_BT: Tensor, marked_BT: Tensor, level: float) -> Tensor:
    """Quantile [B] of the marked values of each row, linearly interpolated; nan where none is marked."""
    if not values_BT.shape[1]:
        return values_BT.new_full(values_BT.shape[:1], float("nan"))
    return values_BT.masked_fill(~marked_BT, float("nan")).nanquantile(level, dim=1)


def pooled_threshold(quantile_B: Tensor, group_id_B: Tensor, over: Over = "mean") -> Tensor:
    """One threshold for each response [B] from the quantiles of single responses.

    "mean" and "median" are taken over the batch (of an even number the median lies half-way), "group" is the mean over
    the response's own group. Undefined quantiles do not count; nan where there is no other.
    """
    known = ~quantile_B.isnan()
    if over == "group":
        sums, _, _ = group_sums(quantile_B.masked_fill(~known, 0.0), group_id_B)
        return sums / group_sums(known.to(quantile_B.dtype), group_id_B)[0]
    some = quantile_B[known]
    if not len(some):
        return torch.full_like(quantile_B, float("nan"))
    return (some.mean() if over == "mean" else some.quantile(0.5)).expand(quantile_B.shape)


def window_events(window_BT: Tensor, threshold_B: Tensor, inclusive: bool = False) -> Tensor:
    """True [B, T] where a complete window lies above the response's threshold (or on it, where `inclusive`).

    An incomplete window is nan and never an event; nor is any where the threshold is nan.
    """
    limit = threshold_B[:, None]
    return window_BT >= limit if inclusive else window_BT > limit


def difficulty_buckets(correct_B: Tensor, group_id_B: Tensor) -> Tensor:
    """Bucket [B] of each response's prompt: `EASY` from 2/3 of its group right, `MEDIUM` from 1/3, else `HARD`.

    Of 8 responses: easy from 6 right, medium 3 to 5, hard up to 2, as in the paper. Whole numbers are compared.
    """
    right, size, _ = group_sums(correct_B.double(), group_id_B)
    right, size = right.round().long(), size.round().long()
    return torch.where(3 * right >= 2 * size, EASY, torch.where(3 * right >= size, MEDIUM, HARD))


def bucket_moments(values_B: Tensor, bucket_B: Tensor, weight_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance of the values of every bucket, both [3], in double precision; nan for an empty one.

    With `weight_B` both are weighted: 1 / (group size) counts every prompt alike.
    """
    values, kind = values_B.double(), bucket_B.long()
    weight = torch.ones_like(values) if weight_B is None else weight_B.double()

    def total(of: Tensor) -> Tensor:
        return torch.zeros(len(BUCKETS), dtype=of.dtype, device=of.device).index_add_(0, kind, of)

    mean = total(weight * values) / total(weight)
    distance = (values - mean[kind]).square()
    return mean, total(weight * distance) / total(weight)


def slope(x_B: Tensor, y_B: Tensor) -> float:
    """Least-squares slope of y on x; nan where x does not vary."""
    x, y = x_B.double() - x_B.double().mean(), y_B.double() - y_B.double().mean()
    spread = float(x.square().sum())
    return float((x * y).sum()) / spread if spread > 0 else float("nan")
