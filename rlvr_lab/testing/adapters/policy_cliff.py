"""Replays policy_cliff.json: hard, soft and KL policies of a perturbed table, and two-armed ties."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ...methods import policy_cliff as pc
from ..golden import Case, Replay, Rule


def _table(case: Case) -> pc.TabularMDP:
    next_state = case.ids("next_state")
    terminal = torch.zeros(len(next_state), dtype=torch.bool)
    terminal[case.inputs["terminal_state"]] = True
    return pc.TabularMDP(next_state, case.tensor("reward_at_eps0"), terminal, case.params["gamma"])


def _cliff(case: Case) -> Replay:
    mdp = _table(case)
    alpha, gamma = case.params["alpha"], case.params["gamma"]
    truth = mdp.with_reward(mdp.reward + case.tensor("missing_reward"))
    state, action = case.inputs["perturbed_entry"]

    def policies(eps: float) -> dict[str, Any]:
        changed = mdp.perturbed(state, action, eps)
        hard, soft = pc.value_iteration(changed), pc.value_iteration(changed, alpha)
        return {
            "Q_hard": hard,
            "Q_soft": soft,
            "uniform": pc.hard_policy(hard),
            "first": pc.hard_policy(hard, "first"),
            "soft": pc.soft_policy(soft, alpha),
            "change": float((changed.reward - mdp.reward).abs().max()),
        }

    tie = policies(0.0)
    out: dict[str, list[Any]] = defaultdict(list)
    for eps in case.outputs["eps"]:  # the grid is recorded beside the results
        found = policies(eps)
        for kind in ("hard", "soft"):
            out[f"Q_{kind}_s0"].append(found[f"Q_{kind}"][0].tolist())
        out["pi_hard_uniform_s0"].append(found["uniform"][0].tolist())
        out["pi_hard_first_s0"].append(found["first"][0].tolist())
        out["pi_soft_s0"].append(found["soft"][0].tolist())
        out["J_true_hard_uniform"].append(pc.expected_return(truth, found["uniform"]))
        out["J_true_hard_first"].append(pc.expected_return(truth, found["first"]))
        out["J_true_soft"].append(pc.expected_return(truth, found["soft"]))
        out["TV_hard_vs_eps0"].append(float(pc.total_variation(found["uniform"], tie["uniform"])[0]))
        out["TV_soft_vs_eps0"].append(float(pc.total_variation(found["soft"], tie["soft"])[0]))
        out["lipschitz_bound"].append(pc.lipschitz_bound(found["change"], alpha, gamma))
        out["reward_supnorm_change"].append(found["change"])
    return Replay({"eps": case.outputs["eps"], **out})


def _bandit(case: Case) -> Replay:
    alpha, gamma = case.params["alpha"], case.params["gamma"]
    tie = pc.soft_policy(pc.value_iteration(pc.two_armed(0.0, 0.0), alpha), alpha)[0]
    out: dict[str, list[float]] = defaultdict(list)
    for delta in case.outputs["delta"]:
        bandit = pc.two_armed(-delta if case.params.get("antisymmetric") else 0.0, delta)
        policy = pc.soft_policy(pc.value_iteration(bandit, alpha), alpha)[0]
        out["pi_a2"].append(float(policy[1]))
        out["TV_vs_tie"].append(float(pc.total_variation(policy, tie)))
        out["bound"].append(pc.lipschitz_bound(delta, alpha, gamma))
    return Replay({"delta": case.outputs["delta"], **out})


RULES = [
    Rule("policy_cliff", {"next_state", "reward_at_eps0", "missing_reward"}, {"eps", "pi_soft_s0"}, _cliff),
    Rule("policy_cliff", set(), {"delta", "pi_a2"}, _bandit, params={"alpha", "gamma"}),
]
