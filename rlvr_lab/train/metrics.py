"""Figures of one rollout, computed once and logged every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.advantages import dead_groups
from ..core.entropy import answer_entropy, pooled_token_entropy, sequence_mean_token_entropy, top_share_entropy
from ..core.reduce import masked_mean
from ..core.rollout import Rollout

CERTAIN = 0.01
MISMATCH = (
    "mismatch", "mismatch_mean", "mismatch_kl", "importance_weight_mean", "importance_weight_truncated",
    "importance_weight_ess",
)  # fmt: skip


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Reward, lengths, entropies (nats) and group health of a graded rollout."""
    entropy, mask = rollout.statistics["token_entropy"], rollout.mask
    assert rollout.reward is not None
    assert rollout.correct is not None
    assert rollout.answer is not None
    top_mean, _ = top_share_entropy(entropy, mask)
    groups = _rows_by_group(rollout)
    answers = [[rollout.answer[i] for i in rows] for rows in groups]
    correct = rollout.correct.tolist()
    distinct = [len({rollout.answer[i] for i in rows if correct[i]}) for rows in groups]
    return {
        "reward": float(rollout.reward.mean()),
        "accuracy": float(rollout.correct.float().mean()),
        "token_entropy": float(pooled_token_entropy(entropy, mask)),
        "sequence_mean_token_entropy": float(sequence_mean_token_entropy(entropy, mask)),
        "top20_token_entropy": float(top_mean),
        "certain_tokens": float(masked_mean((entropy < CERTAIN).float(), mask)),
        **_layer_entropy(rollout),
        "answer_entropy": sum(map(answer_entropy, answers)) / len(groups),
        "distinct_correct": sum(distinct) / len(groups),
        "behaviour_logprob": float(masked_mean(rollout.behaviour_logprob, mask)),
        "mean_tokens": float(rollout.lengths.float().mean()),
        "truncated": 1.0 - float(rollout.finished.float().mean()),
        "no_answer": sum(a is None for a in rollout.answer) / len(rollout),
        "dead_groups": float(dead_groups(rollout.reward, rollout.group_id).float().mean()),
        "tokens": float(mask.sum()),
        **turn_metrics(rollout),
    }


def _layer_entropy(rollout: Rollout) -> dict[str, float]:
    """`layer_entropy`: mean token entropy, in nats, of the layer's policy that this step trains, if it does."""
    found = rollout.statistics.get("layer_entropy")
    return {} if found is None else {"layer_entropy": float(pooled_token_entropy(found, rollout.mask))}


def turn_metrics(rollout: Rollout) -> dict[str, float]:
    """Figures of episodes; nothing where the rollout has no `turn_id`.

    `turns`: turns of the policy per response; `tool_calls`: how many of them were answered. `early_token_entropy` and
    `late_token_entropy`: mean token entropy, in nats, over the first and the last third of each response's turns, of
    responses with at least two; nan where there is none. `invalid_episodes`: responses that an environment with the
    point `invalid` charges for an action that it could not read.
    """
    if rollout.turn_id is None:
        return {}
    entropy, mask = rollout.statistics["token_entropy"], rollout.mask
    spoken = _turns_with(mask, rollout.turn_id)
    answered = _turns_with(rollout.response_mask & ~rollout.action_mask, rollout.turn_id)
    count = spoken.sum(1, keepdim=True)
    place = (spoken.cumsum(1) - 1).gather(1, rollout.turn_id.clamp_min(0))
    several = mask & (rollout.turn_id >= 0) & (count >= 2)
    invalid = rollout.reward_components.get("invalid")
    told = {} if invalid is None else {"invalid_episodes": float((invalid < 0).float().mean())}
    return told | {
        "turns": float(count.float().mean()),
        "tool_calls": float((spoken & answered).sum(1).float().mean()),
        "early_token_entropy": _mean(entropy, several & (3 * place < count)),
        "late_token_entropy": _mean(entropy, several & (3 * (count - 1 - place) < count)),
    }


def _turns_with(mask_BT: Tensor, turn_BT: Tensor) -> Tensor:
    """Which turns [B, turns] of each response have a marked token; a negative turn is none."""
    width = int(turn_BT.max().clamp_min(0)) + 1 if turn_BT.numel() else 1
    marked = (mask_BT & (turn_BT >= 0)).long()
    return (
        torch.zeros(len(turn_BT), width, dtype=torch.long, device=turn_BT.device)
        .scatter_add_(1, turn_BT.clamp_min(0), marked)
        .gt(0)
    )


def _mean(values_BT: Tensor, mask_BT: Tensor) -> float:
    return float(values_BT[mask_BT].mean()) if bool(mask_BT.any()) else math.nan


def sampler_metrics(
    rollout: Rollout, step: int, vocabulary: int, importance_cap: float | None = None
) -> dict[str, float]:
    """How the sampler and the policy being trained relate.

    `mismatch` is the largest and `mismatch_mean` the mean signed difference of sampling-time minus recomputed
    log-probs, in nats; a positive mean says that the sampler reports a truncated, renormalised distribution.
    `mismatch_kl` estimates KL(sampler || policy) per token (k3, never negative). Weights pi_old / pi_behaviour, per
    token and before any cap: `importance_weight_mean`, 1 in expectation, and `importance_weight_ess`, the effective
    share of the tokens (sum w)^2 / (n sum w^2). `importance_weight_truncated` is the share of tokens above the cap of
    the method that corrects with them, nan where none does. All are nan where old log-probs are the recorded ones,
    because then nothing is compared. A token that was sampled at another temperature than the policy's on purpose
    (`Rollout.policy_temperature`) is left out: its difference is meant. `staleness` is the mean number of steps since
    the policy that sampled.
    """
    found = dict.fromkeys(MISMATCH, math.nan)
    if rollout.old_logprob is not None:
        compared = rollout.mask
        if rollout.policy_temperature is not None:
            compared = compared & rollout.behaviour_temperature.eq(rollout.policy_temperature)
        difference = (rollout.behaviour_logprob - rollout.old_logprob)[compared].double()
        if bool(difference.ne(0).any()):
            found = _mismatch(difference, importance_cap)
    return found | {
        "staleness": float((step - rollout.policy_version).float().mean()),
        "vocabulary": float(vocabulary),
    }


def _mismatch(difference: Tensor, cap: float | None) -> dict[str, float]:
    """`difference` [n]: behaviour minus old log-prob."""
    weight = (-difference).exp()
    truncated = math.nan if cap is None else float((weight > cap).double().mean())
    figures = (
        float(difference.abs().max()),
        float(difference.mean()),
        float((weight - 1 + difference).mean()),
        float(weight.mean()),
        truncated,
        float(weight.sum().square() / (len(weight) * weight.square().sum())),
    )
    return dict(zip(MISMATCH, figures, strict=True))


def _rows_by_group(rollout: Rollout) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for i, group in enumerate(torch.as_tensor(rollout.group_id).tolist()):
        rows.setdefault(group, []).append(i)
    return list(rows.values())
