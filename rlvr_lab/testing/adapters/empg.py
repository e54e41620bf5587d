"""Replays empg.json: step statistics, the modulated advantage with its on-policy gradient, and Proposition 1."""

from __future__ import annotations

import torch

from ...core.advantages import group_advantage
from ...core.entropy import softmax_entropy
from ...core.losses import clipped_surrogate
from ...core.reduce import reduce
from ...methods import empg
from ..golden import Case, Replay, Rule, gradient


def _modulation(case: Case) -> Replay:
    p, mask = case.params, case.mask("mask")
    label = torch.full(mask.shape, -1)
    for row, segments in enumerate(case.inputs["step_segments"]):
        for number, (start, end) in enumerate(segments):
            label[row, start:end] = number
    steps = empg.number_steps(label, mask)
    value = group_advantage(case.tensor("reward"), case.ids("group"), "sample", p["grpo_eps"])
    mean = steps.mean(case.tensor("token_entropy"))
    done = empg.modulate(mean, value[steps.row], steps.row, p["k"], p["k_prime"], p["zeta"], eps=p["eps"])
    advantage = steps.spread(done.final)
    logprob = torch.zeros(mask.shape, dtype=case.dtype, requires_grad=True)
    on_policy = clipped_surrogate(logprob, logprob.detach(), advantage, 0.8, 1.2)
    loss = reduce(on_policy.loss, mask, "token_mean")
    found = {
        "A_traj": value,
        "H_step": mean,
        "H_norm": done.entropy,
        "g": done.scale,
        "f": done.clarity,
        "bonus": done.bonus,
        "A_mod": done.modulated,
        "A_final_step": done.final,
        "A_final_token": advantage,
    }
    return Replay(found, {"log_prob_onpolicy_token_mean": gradient(loss, logprob)})


def _proposition(case: Case) -> Replay:
    logits = case.tensor("logits")
    renyi = empg.renyi2_entropy(logits)
    return Replay(
        {
            "expected_sq_score_norm": empg.expected_squared_score(logits),
            "renyi2_entropy": renyi,
            "one_minus_exp_minus_H2": 1 - (-renyi).exp(),
            "shannon_entropy": softmax_entropy(logits),
        }
    )


RULES = [
    Rule("empg", {"token_entropy", "mask", "step_segments", "reward", "group"}, {"A_final_token"}, _modulation,
         params={"k", "k_prime", "zeta"}),
    Rule("empg", {"logits"}, {"expected_sq_score_norm", "renyi2_entropy"}, _proposition),
]  # fmt: skip
