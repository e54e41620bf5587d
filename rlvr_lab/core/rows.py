"""Rows of a rollout: an order that does not depend on how they arrived, and joining several rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .rollout import _PER_TOKEN, Rollout


def canonical_order(rollout: Rollout) -> Tensor:
    """Row indices [B] sorted by content: problem, group, tokens. The same responses in any order give one sequence.

    A random choice over the rows of a minibatch draws its numbers in this order, so that shuffling the minibatch
    does not change what is chosen. Rows of equal content are interchangeable. Padding plays no part.
    """
    ids = rollout.response_ids.masked_fill(~rollout.response_mask, -1) + 1
    position = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    # wrapping 64-bit arithmetic as a hash; the odd multipliers are those of splitmix64
    mixed = (ids + position * 0x2545F4914F6CDD1D) * -0x4B47D0C5A1A6E3B5
    mixed = ((mixed ^ (mixed >> 29)) * -0x6B2FB644ECCEEE15) * ids.ne(0)
    key = mixed.sum(1)
    # the least important key first: each sort is stable
    order = key.argsort(stable=True)
    for column in (rollout.group_id, rollout.prompt_id):
        order = order[column[order].argsort(stable=True)]
    return order


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one, padded to the longest. Groups stay apart: later ones get new ids.

    Raises ValueError for no rollout, or where a field is present in one and absent in another.
    """
    if not rollouts:
        raise ValueError("there is no rollout to join")
    shifted, first_free = [], 0
    for rollout in rollouts:
        shifted.append(rollout.with_(group_id=rollout.group_id + first_free))
        first_free = int(shifted[-1].group_id.max()) + 1 if len(rollout) else first_free
    joined: dict[str, Any] = {}
    for f in fields(Rollout):
        values = [getattr(r, f.name) for r in shifted]
        if any((v is None) != (values[0] is None) for v in values):
            raise ValueError(f"'{f.name}' is present in one rollout and absent in another")
        joined[f.name] = _join(f.name, values)
    return Rollout(**joined)


def with_replayed(
    rollout: Rollout, advantage_BT: Tensor, replayed: Rollout, replayed_advantage_bT: Tensor
) -> tuple[Rollout, Tensor]:
    """New responses and earlier ones as one rollout, flagged by `replayed`, with the advantage of both.

    The ratio of an earlier response is taken against the log-probs stored when it was sampled. Raises ValueError where
    a field or a statistic is present in one and absent in the other.
    """
    device = rollout.response_ids.device
    old = replayed.with_(old_logprob=replayed.behaviour_logprob).to(device)
    flags = [torch.full((len(part),), flag, device=device) for part, flag in ((rollout, False), (old, True))]
    joined = concatenate([part.with_(replayed=flag) for part, flag in zip((rollout, old), flags, strict=True)])
    return joined, torch.cat(_pad_right([advantage_BT, replayed_advantage_bT.to(advantage_BT)]))


def _join(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if name in _PER_TOKEN:
            return torch.cat(_pad_right(values))
        return torch.cat(_pad_left(values) if name in ("prompt_ids", "prompt_mask") else values)
    if isinstance(first, tuple):
        return tuple(entry for value in values for entry in value)
    if isinstance(first, dict) or hasattr(first, "keys"):
        if any(set(v) != set(first) for v in values):
            raise ValueError(f"'{name}' has different entries: {sorted({k for v in values for k in v})}")
        pad = _pad_right if name == "statistics" else list
        return {key: torch.cat(pad([v[key] for v in values])) for key in first}
    if any(value != first for value in values):
        raise ValueError(f"'{name}' differs between the rollouts: {values}")
    return first


def _pad_right(values: Sequence[Tensor]) -> list[Tensor]:
    width = max(v.shape[1] for v in values)
    return [torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in values]


def _pad_left(values: Sequence[Tensor]) -> list[Tensor]:
    width = max(v.shape[1] for v in values)
    return [torch.nn.functional.pad(v, (width - v.shape[1], 0)) for v in values]


def tool_calls(rollout: Rollout) -> Tensor:
    """Times [B] that the policy was told something in answer: changes from a sampled token to one that it was told,
    within the response. In an environment each is the end of one turn that a tool or the world answered."""
    said, told = rollout.mask[:, :-1], rollout.response_mask[:, 1:] & ~rollout.action_mask[:, 1:]
    return (said & told).sum(1)
