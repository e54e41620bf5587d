"""Replays steer.json: weights, loss and gradient of the released code, and the theorem's form."""

from __future__ import annotations

from ...core.dynamics import change_theorem, clip_indicator
from ...core.losses import clipped_surrogate, importance_ratio
from ...core.reduce import masked_mean
from ...methods import steer
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl


def _steer(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    entropy, mask, p = case.tensor("entropy"), case.mask("response_mask"), case.params
    now = logprob.detach()
    change = steer.released_change(now, old, entropy, advantage)
    if p["linear"]:
        weight = steer.linear_weights(change, mask, p["token_weight_min"], p["token_weight_max"])
    else:
        weight = steer.exponential_weights(change, mask, p["token_weight_min"], floor=0.02)
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    surrogate = clipped_surrogate(logprob, old, advantage, *bounds, dual_clip=p["clip_ratio_c"])
    loss = reduce_as_verl(case, weight * surrogate.loss, mask)
    ratio = importance_ratio(now, old)
    beyond = -advantage * ratio.clamp(*bounds) > -advantage * ratio
    capped = (advantage < 0) & (-advantage * p["clip_ratio_c"] < -advantage * ratio.clamp(min=bounds[0]))
    outputs = {
        "token_weights": weight,
        "loss": loss,
        "pg_clipfrac": masked_mean(beyond.to(now), mask),
        "pg_clipfrac_lower": masked_mean(capped.to(now), mask),
        "pg_clipfrac_low": masked_mean((beyond & (advantage < 0)).to(now), mask),
        "pg_clipfrac_high": masked_mean((beyond & (advantage > 0)).to(now), mask),
        "ppo_kl": masked_mean(old - now, mask),
        "omega_code_signed_before_abs": change,
    }
    coefficient = clip_indicator(ratio, advantage, *bounds) * ratio * advantage
    theorem = change_theorem(coefficient, now, entropy)
    weights = steer.exponential_weights(theorem, mask, p["token_weight_min"])
    return Replay(outputs | {"theorem_form": {"omega_thm": theorem, "weights_thm": weights}}, gradient(loss, logprob))


RULES = [
    Rule("steer", {"log_prob", "old_log_prob", "advantages", "entropy", "response_mask"}, {"token_weights"}, _steer),
]
