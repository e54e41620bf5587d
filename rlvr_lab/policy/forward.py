"""One forward pass of a policy over recorded responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.entropy import token_statistics
from ..core.rollout import Rollout


def response_statistics(model: Any, rollout: Rollout, want_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy [B, T] of the recorded response tokens, at each row's behaviour temperature.

    Differentiable. Right padding needs no attention mask under causal attention; left padding of prompts does. Rows
    must share one temperature. Entries outside the mask are finite but mean nothing.
    """
    inputs = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    extra: dict[str, Tensor] = {}
    if not bool(rollout.prompt_mask.all()):
        # right padding is attended to by nobody that counts, and full rows keep position ids simple
        mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.response_mask)], 1)
        extra = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    t = rollout.response_ids.shape[1]
    # the logits at position i predict token i + 1: keep those of the last prompt token up to the last but one
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=t + 1, **extra).logits[:, :-1]
    temperature = _one_temperature(rollout)
    if want_entropy:
        return token_statistics(logits, rollout.response_ids, temperature)
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    return log_p.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1), None


def _one_temperature(rollout: Rollout) -> float:
    values = rollout.behaviour_temperature[rollout.mask]
    if not len(values):
        return 1.0
    first = float(values[0])
    if not bool((values == first).all()):
        raise ValueError("rows of different behaviour temperatures in one forward pass")
    return first if first > 0 else 1.0


@torch.no_grad()
def score(model: Any, rollout: Rollout, rows: int) -> Rollout:
    """Record `old_logprob` and `token_entropy` of the current policy, `rows` responses at a time, longest first."""
    b, t = rollout.response_ids.shape
    logprob = torch.zeros(b, t, device=rollout.response_ids.device)
    entropy = torch.zeros_like(logprob)
    for index in torch.split(rollout.lengths.argsort(descending=True), rows):
        part = rollout.rows(index)
        values, entropies = response_statistics(model, part)
        width = part.response_ids.shape[1]
        logprob[index, :width] = values.masked_fill(~part.mask, 0.0)
        if entropies is not None:
            entropy[index, :width] = entropies.masked_fill(~part.mask, 0.0)
    return rollout.with_(old_logprob=logprob).with_statistics(token_entropy=entropy)
