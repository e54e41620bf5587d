"""Replays arbitrary_entropy.json: the release's exchange of rows and loss, the entropy law, DCPO."""

from __future__ import annotations

import torch

from ...core.advantages import group_advantage
from ...core.dynamics import exact_change
from ...core.entropy import softmax_entropy
from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import arbitrary_entropy as ae
from ..golden import Case, Replay, Rule, gradient


def _step(case: Case) -> Replay:
    logprob, old, p = case.leaf("mixed_log_prob"), case.tensor("mixed_old_log_prob"), case.params
    entropy, target = p["entropy_prev_step"], p["entropy_target_H0"]
    main, extra = (
        group_advantage(case.tensor(f"{name}_scores"), case.ids(f"{name}_group_id"), "sample", 1e-6, "raw")
        for name in ("main", "extra")
    )
    chosen = (extra > p["adv_threshold"]).nonzero().squeeze(1)
    number = ae.replacement_number(len(chosen), p["reinforce_sample_num"], entropy, target)
    mask = torch.cat([case.mask("extra_response_mask")[chosen[:number]], case.mask("main_response_mask")[number:]])
    value = torch.cat([torch.ones_like(main[:number]), main[number:]])[:, None]
    # the release masks the group advantages and leaves the ones of the exchanged rows at every position
    places = mask | (torch.arange(len(mask)) < number)[:, None]
    advantage = value * places
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    surrogate = clipped_surrogate(logprob, old, advantage, *bounds, dual_clip=p["clip_dual"])
    loss = reduce(surrogate.loss, mask, "token_mean")
    ratio = surrogate.ratio.detach()
    beyond = -advantage * ratio < -advantage * ratio.clamp(*bounds)
    higher = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(*bounds))
    capped = (higher > -advantage * p["clip_dual"]) & (advantage < 0)
    outputs = {
        "temperature_used": ae.control_temperature(entropy, target, p["T_high"], p["T_low"]),
        "main_advantages_first_token": main,
        "extra_advantages_first_token": extra,
        "selected_extra_rows": chosen,
        "num_replaced": number,
        "mixed_advantages": advantage,
        "mixed_response_mask": mask.long(),
        "pg_loss": loss,
        "clipfrac_higher": masked_mean(beyond.to(ratio), mask),
        "clipfrac_lower": masked_mean(capped.to(ratio), mask),
        "ppo_kl": masked_mean(old - logprob.detach(), mask),
        "entropy_estimate_logged": -masked_mean(logprob.detach(), mask),
    }
    return Replay(outputs, gradient(loss, logprob))


def _law(case: Case) -> Replay:
    logits, temperature, eta = case.tensor("logits"), case.params["temperature"], case.params["eta"]
    direction = ae.reinforce_direction(logits, temperature)
    exact, first = ae.entropy_drift(logits, temperature)
    return Replay(
        {
            "pi": torch.softmax(logits, -1),
            "pi_T": torch.softmax(logits / temperature, -1),
            "entropy": softmax_entropy(logits),
            "expected_reinforce_grad_logits": direction,
            "dH_deta_exact": exact,
            "dH_deta_first_order_in_T_minus_1": first,
            "finite_difference_dH_deta": exact_change(logits, eta * direction) / eta,
        }
    )


def _dcpo(case: Case) -> Replay:
    share, mixed = ae.dcpo_advantage(
        case.tensor("advantages"),
        case.mask("bool_reward"),
        case.tensor("old_log_prob"),
        case.tensor("old_log_prob_T"),
        case.params["entropy_prev_step"],
        case.params["entropy_target_H0"],
    )
    return Replay({"alpha_final": share, "mixed_advantages": mixed})


RULES = [
    Rule("arbitrary_entropy", {"main_scores", "extra_scores", "mixed_log_prob", "mixed_old_log_prob"},
         {"mixed_advantages", "pg_loss"}, _step, params={"entropy_target_H0", "T_high", "T_low"}),
    Rule("arbitrary_entropy", {"logits"}, {"pi_T", "dH_deta_exact"}, _law, params={"temperature", "eta"}),
    Rule("arbitrary_entropy", {"advantages", "bool_reward", "old_log_prob_T"}, {"alpha_final"}, _dcpo),
]  # fmt: skip
