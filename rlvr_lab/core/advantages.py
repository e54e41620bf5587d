"""Advantages from group rewards. One number per response; no gradient passes through."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Std = Literal["sample", "population", "none"]


def group_sums(values_B: Tensor, group_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and size of each response's own group, both [B], and the dense group index [B]."""
    _, index = torch.unique(group_id_B, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    sums = torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add_(0, index, values_B)
    sizes = torch.zeros_like(sums).index_add_(0, index, torch.ones_like(values_B))
    return sums[index], sizes[index], index


def group_advantage(reward_B: Tensor, group_id_B: Tensor, std: Std = "sample", eps: float = 1e-6) -> Tensor:
    """Group-relative advantage [B] (GRPO, arXiv 2402.03300; golden: volcengine/verl core_algos).

        A_i = (R_i - mean_g) / (std_g + eps)

    `std`: "sample" divides by G - 1 inside the root (verl, TRL), "population" by G, "none" leaves the difference
    undivided (Dr. GRPO, arXiv 2503.20783). A group of one has no baseline: its advantage is 0 here. (verl instead
    returns the raw reward, R / (1 + eps).) Equal rewards give 0.
    """
    sums, sizes, _ = group_sums(reward_B, group_id_B)
    centred = reward_B - sums / sizes
    if std == "none":
        return centred
    squares, _, _ = group_sums(centred.square(), group_id_B)
    freedom = sizes - 1 if std == "sample" else sizes
    spread = (squares / freedom.clamp_min(1)).sqrt()
    return centred / (spread + eps)


def dead_groups(reward_B: Tensor, group_id_B: Tensor) -> Tensor:
    """True [B] where every response of the group has the same reward, so that group-relative advantages vanish."""
    _, _, index = group_sums(reward_B, group_id_B)
    groups = int(index.max()) + 1 if len(index) else 0
    high = torch.full((groups,), float("-inf"), dtype=reward_B.dtype, device=reward_B.device)
    low = torch.full_like(high, float("inf"))
    high = high.scatter_reduce(0, index, reward_B, "amax")
    low = low.scatter_reduce(0, index, reward_B, "amin")
    return (high == low)[index]
