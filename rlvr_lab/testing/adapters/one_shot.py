"""Replays one_shot.json: scores and rankings of accuracy histories, and the assembled loss with its gradient."""

from __future__ import annotations

from typing import Any

from ...core.advantages import group_advantage
from ...core.entropy import token_statistics
from ...core.losses import clipped_surrogate, kl_estimate
from ...core.reduce import reduce
from ...methods import one_shot
from ..golden import Case, Replay, Rule, gradient

KL_KINDS = {"low_var_kl": "k3", "kl": "k1", "abs": "abs", "mse": "k2"}


def _scores(case: Case) -> Replay:
    history = {key: [float(x) for x in values] for key, values in case.inputs["accuracy_history"].items()}
    variance, impact = one_shot.variance_scores(history), one_shot.impact_scores(history)
    return Replay(
        {
            "std": {key: value**0.5 for key, value in variance.items()},
            "variance": variance,
            "ranking": one_shot.ranking(variance),
            "lim": impact,
            "lim_ranking": one_shot.ranking(impact),
        }
    )


def _loss(case: Case) -> Replay:
    logits, mask, p = case.leaf("logits"), case.mask("response_mask"), case.params
    logprob, entropy = token_statistics(logits, case.ids("tokens"), p.get("temperature", 1.0))
    reward, group = case.tensor("sequence_reward"), case.ids("group_index")
    advantage = group_advantage(reward, group, "sample", 1e-6, "raw")[:, None] * mask
    clip = p["cliprange"]
    surrogate = clipped_surrogate(logprob, case.tensor("old_log_prob"), advantage, 1 - clip, 1 + clip)
    kind: Any = KL_KINDS[p.get("kl_loss_type", "low_var_kl")]
    kl = kl_estimate(logprob, case.tensor("ref_log_prob"), kind, kind == "k3")
    policy, mean, penalty = (reduce(x, mask, "token_mean") for x in (surrogate.loss, entropy, kl))
    total = p["pg_loss_coeff"] * policy - p["entropy_coeff"] * mean + p["kl_loss_coef"] * penalty
    outputs = {
        "advantages": advantage,
        "log_prob": logprob,
        "entropy": entropy,
        "pg_loss": policy,
        "entropy_mean": mean,
        "kl_loss": penalty,
        "total_loss": total,
    }
    return Replay(outputs, gradient(total, logits))


RULES = [
    Rule("one_shot", {"accuracy_history"}, {"std", "ranking"}, _scores),
    Rule("one_shot", {"logits", "tokens", "old_log_prob", "ref_log_prob", "sequence_reward"}, {"total_loss"}, _loss,
         params={"pg_loss_coeff", "entropy_coeff", "kl_loss_coef"}),
]  # fmt: skip
