"""Advantages from rewards: one number per response, or one per token. No gradient passes through.

Every function keeps the dtype of the rewards. Group ids may be any integers in any order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Std = Literal["sample", "population", "batch", "none"]
Singleton = Literal["zero", "raw"]
Weigh = Literal["token", "response"]


def group_sums(values_B: Tensor, group_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and size of each response's own group, both [B], and the dense group index [B]."""
    _, index = torch.unique(group_id_B, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    sums = torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add_(0, index, values_B)
    sizes = torch.zeros_like(sums).index_add_(0, index, torch.ones_like(values_B))
    return sums[index], sizes[index], index


def group_advantage(
    reward_B: Tensor, group_id_B: Tensor, std: Std = "sample", eps: float = 1e-6, singleton: Singleton = "zero"
) -> Tensor:
    """Group-relative advantage [B] (GRPO, arXiv 2402.03300; golden: volcengine/verl core_algos, huggingface/trl).

        A_i = (R_i - mean_g) / (std + eps)

    `std`: "sample" divides by G - 1 inside the root (verl, TRL), "population" by G, both within the group; "batch" is
    the sample one over all responses of the batch (TRL `scale_rewards="batch"`), still centred by group; "none" leaves
    the difference undivided (Dr. GRPO, arXiv 2503.20783). Equal rewards give 0.
    `singleton`: a group of one has no baseline. "zero" gives it advantage 0; "raw" is verl's convention, mean 0 and
    standard deviation 1, so R / (1 + eps), and R itself without a division.
    """
    sums, sizes, _ = group_sums(reward_B, group_id_B)
    alone = (sizes == 1) & (singleton == "raw")
    centred = torch.where(alone, reward_B, reward_B - sums / sizes)
    if std == "none":
        return centred
    if std == "batch":
        return centred / (_batch_std(reward_B) + eps)
    squares, _, _ = group_sums(centred.square(), group_id_B)
    freedom = sizes - 1 if std == "sample" else sizes
    spread = (squares / freedom.clamp_min(1)).sqrt()
    return centred / (spread.masked_fill(alone, 1.0) + eps)


def _batch_std(reward_B: Tensor) -> Tensor:
    """Sample standard deviation of all rewards; 0 for a single one, as in TRL."""
    squares = (reward_B - reward_B.mean()).square().sum() if len(reward_B) else reward_B.sum()
    return (squares / max(len(reward_B) - 1, 1)).sqrt()


def rloo_advantage(reward_B: Tensor, group_id_B: Tensor, singleton: Singleton = "raw") -> Tensor:
    """Leave-one-out advantage [B] (RLOO, arXiv 2402.14740; golden: volcengine/verl core_algos).

        A_i = R_i - sum_{j != i} R_j / (G - 1) = G / (G - 1) * (R_i - mean_g)

    A group of one has nobody to leave in: "raw" keeps A = R (verl), "zero" gives 0.
    """
    sums, sizes, _ = group_sums(reward_B, group_id_B)
    others = (sums - reward_B) / (sizes - 1).clamp_min(1)
    own = reward_B if singleton == "raw" else torch.zeros_like(reward_B)
    return torch.where(sizes == 1, own, reward_B - others)


def opo_advantage(reward_B: Tensor, length_B: Tensor, group_id_B: Tensor, singleton: Singleton = "raw") -> Tensor:
    """Advantage over a length-weighted baseline [B] (OPO, arXiv 2505.23585; golden: volcengine/verl core_algos).

        A_i = R_i - sum_j L_j R_j / sum_j L_j

    `length_B` counts tokens. The formula gives a group of one advantage 0 ("zero"); verl sets its baseline to 0 and
    keeps A = R ("raw"). A group without any token has no baseline; 0 is taken, which no token can feel.
    """
    length = length_B.to(reward_B.dtype)
    weighted, sizes, _ = group_sums(length * reward_B, group_id_B)
    total, _, _ = group_sums(length, group_id_B)
    baseline = weighted / total.clamp_min(1)
    if singleton == "raw":
        return torch.where(sizes == 1, reward_B, reward_B - baseline)
    return torch.where(sizes == 1, torch.zeros_like(reward_B), reward_B - baseline)


def final_token_reward(reward_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Token rewards [B, T]: the whole reward on the last marked token, 0 elsewhere. An empty row gets none."""
    position = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    last = (mask_BT * position).argmax(1, keepdim=True)
    rewards = torch.zeros(mask_BT.shape, dtype=reward_B.dtype, device=reward_B.device)
    return rewards.scatter(1, last, reward_B[:, None]).masked_fill(~mask_BT, 0.0)


def token_returns(token_reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted reward-to-go [B, T] over a prefix mask.

        G_t = sum_{s >= t} gamma^(s - t) rho_s

    Rewards outside the mask are not counted and get return 0. Give the response mask, which has no holes: the
    sum starts afresh behind an unmarked token (verl 0.9.1 carries it on; without holes there is no difference).
    """
    running = torch.zeros_like(token_reward_BT[:, 0]) if token_reward_BT.shape[1] else token_reward_BT.new_zeros(0)
    returns = []
    for t in reversed(range(token_reward_BT.shape[1])):
        running = (token_reward_BT[:, t] + gamma * running).masked_fill(~mask_BT[:, t], 0.0)
        returns.append(running)
    return torch.stack(returns[::-1], 1) if returns else token_reward_BT.clone()


def whiten(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8, weigh: Weigh = "token") -> Tensor:
    """Values [B, T] with mean 0 and variance 1 over the marked tokens of the batch, 0 outside the mask.

        w_t = (x_t - mean) / sqrt(var + eps)

    `weigh`: "token" counts every token alike, so that long responses weigh more (verl `masked_whiten`); "response"
    counts every non-empty response alike and spreads it over its tokens. The variance is unbiased in that count.
    Raises ValueError where fewer than two tokens (or responses) are marked: there is no variance then.
    """
    mask = mask_BT.to(values_BT.dtype)
    rows = mask.sum(1, keepdim=True)
    count = mask.sum() if weigh == "token" else (rows > 0).sum()
    if count < 2:
        raise ValueError(f"whitening needs at least two marked {weigh}s, not {int(count)}: the variance is undefined")
    share = mask / count if weigh == "token" else mask / (rows.clamp_min(1) * count)
    values = values_BT.masked_fill(~mask_BT, 0.0)
    centred = values - (share * values).sum()
    variance = (share * centred.square()).sum() * count / (count - 1)
    return (centred * torch.rsqrt(variance + eps)).masked_fill(~mask_BT, 0.0)


def reinforce_plus_plus(
    token_reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, eps: float = 1e-8, weigh: Weigh = "token"
) -> Tensor:
    """Whitened discounted returns [B, T] (REINFORCE++, arXiv 2501.03262; golden: volcengine/verl core_algos).

    `token_reward_BT` holds the reward on the last token plus, optionally, a KL penalty on every token.
    Raises ValueError as `whiten` does.
    """
    return whiten(token_returns(token_reward_BT, mask_BT, gamma), mask_BT, eps, weigh)


def reinforce_plus_plus_baseline(
    reward_B: Tensor,
    group_id_B: Tensor,
    mask_BT: Tensor,
    eps: float = 1e-8,
    singleton: Singleton = "raw",
    weigh: Weigh = "token",
) -> Tensor:
    """Reward minus group mean, then whitened over the batch [B, T] (REINFORCE++-baseline, arXiv 2501.03262).

    `eps` is the one of `whiten`; verl accepts an `epsilon` here and ignores it. A group of one keeps its reward (verl)
    unless `singleton` is "zero". Raises ValueError as `whiten` does.
    """
    centred = group_advantage(reward_B, group_id_B, "none", singleton=singleton)
    return whiten(centred[:, None].expand(mask_BT.shape), mask_BT, eps, weigh)


def dead_groups(reward_B: Tensor, group_id_B: Tensor) -> Tensor:
    """True [B] where every response of the group has the same reward, so that group-relative advantages vanish."""
    low, high = group_range(reward_B, group_id_B)
    return high == low


def group_range(values_B: Tensor, group_id_B: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each response's own group, both [B]; nan where a value of the group is nan."""
    _, _, index = group_sums(values_B, group_id_B)
    groups = int(index.max()) + 1 if len(index) else 0
    high = torch.full((groups,), float("-inf"), dtype=values_B.dtype, device=values_B.device)
    low = torch.full_like(high, float("inf"))
    high = high.scatter_reduce(0, index, values_B, "amax")
    low = low.scatter_reduce(0, index, values_B, "amin")
    return low[index], high[index]
