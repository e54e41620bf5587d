"""Which groups a batch keeps (DAPO, arXiv 2503.14476; SPEAR, 2509.22601), and what a response's length costs (DAPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import group_range, group_sums


def informative_groups(metric_B: Tensor, group_id_B: Tensor) -> Tensor:
    """True [B] where the group's metric varies, or where the group has one response (DAPO Eq. 11).

    Code compared: PRIME-RL/Entropy-Mechanism-of-RL recipe/dapo, which keeps a group iff the population standard
    deviation of the metric is above 0 or its size is 1. Here "varies" is exact: largest above smallest value, so that
    no rounding of a mean makes equal values look different. A group with an undefined (nan) metric is not kept.
    """
    values = metric_B.float() if not metric_B.is_floating_point() else metric_B
    low, high = group_range(values, group_id_B)
    _, sizes, _ = group_sums(values, group_id_B)
    return (high > low) | (sizes == 1)


def overlong_reward(
    lengths_B: Tensor, max_length: float, buffer: float, factor: float = 1.0, floor: bool = True
) -> Tensor:
    """Soft punishment [B] of responses that come close to the length limit (DAPO Eq. 13).

        excess = |y| - (max_length - buffer)
        R = -factor * min(max(excess / buffer, 0), 1)

    Without `floor` the punishment keeps growing beyond `max_length`, as in verl's DAPORewardManager.
    Raises ValueError unless 0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must lie in (0, max_length] = (0, {max_length}], not {buffer}")
    lengths = lengths_B if lengths_B.is_floating_point() else lengths_B.to(torch.get_default_dtype())
    share = ((lengths - (max_length - buffer)) / buffer).clamp_min(0.0)
    return -factor * (share.clamp_max(1.0) if floor else share)


def group_moments(reward_B: Tensor, group_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sample standard deviation [G] of each group's rewards, and the group of every row [B]; groups in the
    order of their ids. A group of one has standard deviation 0."""
    sums, sizes, index = group_sums(reward_B, group_id_B)
    mean = sums / sizes
    spread = (group_sums((reward_B - mean).square(), group_id_B)[0] / (sizes - 1).clamp_min(1)).sqrt()
    # one value per group: all rows of a group carry the same
    groups = int(index.max()) + 1 if len(index) else 0
    by_group = torch.zeros(2, groups, dtype=reward_B.dtype, device=reward_B.device)
    by_group[:, index] = torch.stack([mean, spread])
    return by_group[0], by_group[1], index


def varied_groups(reward_B: Tensor, group_id_B: Tensor, share: float) -> Tensor:
    """True [B] on the rows of the floor(share N) groups, at least one, whose rewards vary most; of equals the first."""
    _, spread, index = group_moments(reward_B, group_id_B)
    kept = torch.zeros_like(spread, dtype=torch.bool)
    kept[spread.nan_to_num(-1.0).argsort(descending=True, stable=True)[: max(int(share * len(spread)), 1)]] = True
    return kept[index]
