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
        "answer_entropy": sum(map(answer_entropy, answers)) / len(groups),
        "distinct_correct": sum(distinct) / len(groups),
        "behaviour_logprob": float(masked_mean(rollout.behaviour_logprob, mask)),
        "mean_tokens": float(rollout.lengths.float().mean()),
        "truncated": 1.0 - float(rollout.finished.float().mean()),
        "no_answer": sum(a is None for a in rollout.answer) / len(rollout),
        "dead_groups": float(dead_groups(rollout.reward, rollout.group_id).float().mean()),
        "tokens": float(mask.sum()),
    }


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
