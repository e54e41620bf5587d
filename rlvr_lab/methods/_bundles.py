"""Bundles of questions: which responses are added up to one score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bundles:
    """Slots of all bundles. `score` and `bundle` [N] per slot, `index` [B] the slot that each response is in."""

    score: Tensor
    bundle: Tensor
    index: Tensor

    @property
    def members(self) -> Tensor:
        """Responses in each slot [N]."""
        return torch.bincount(self.index, minlength=len(self.score)).to(self.score.dtype)


def slots(key_B: Tensor, group_id_B: Tensor) -> Tensor:
    """Rank [B] of each response within its group by `key_B`; equal keys keep the order of the rows."""
    order = key_B.argsort(stable=True)
    order = order[group_id_B[order].argsort(stable=True)]
    _, sizes = torch.unique_consecutive(group_id_B[order], return_counts=True)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank


def consecutive_bundles(group_id_B: Tensor, size: int) -> Tensor:
    """Bundle number [B]: `size` groups in the order of their ids make one; the last may be smaller."""
    index: Tensor = torch.unique(group_id_B, return_inverse=True)[1]
    return index // size


def form_bundles(reward_B: Tensor, bundle_B: Tensor, slot_B: Tensor) -> Bundles:
    """Add up the rewards of each bundle's slots."""
    _, dense = torch.unique(bundle_B, return_inverse=True)
    width = int(slot_B.max()) + 1
    pairs, index = torch.unique(dense * width + slot_B, return_inverse=True)
    score = torch.zeros(len(pairs), dtype=reward_B.dtype, device=reward_B.device).index_add_(0, index, reward_B)
    return Bundles(score, pairs // width, index)
