"""Replays epo.json: the released loss, the paper's regulariser, phase weights, turn-row advantages."""

from __future__ import annotations

from typing import Any

import torch

from ...core.entropy import token_statistics
from ...core.losses import clipped_surrogate
from ...core.reduce import reduce
from ...methods import epo
from ..golden import Case, Replay, Rule, gradient


def _loss(case: Case) -> Replay:
    paper, paper_grad = _paper(case)
    code, code_grad = _released(case)
    grads = {"code_total_loss": code_grad, "paper_v2_regulariser": paper_grad}
    return Replay(code | paper, grads)


def _released(case: Case) -> tuple[dict[str, Any], Any]:
    logits, mask, p = case.leaf("logits"), case.mask("response_mask"), case.params
    logprob, entropy = token_statistics(logits, case.ids("actions"))
    turn, history = case.ids("turn_index"), case.tensor("entropy_history_per_turn")
    applies = bool((turn >= p["apply_threshold_turn"]).any())
    outside, weight, inside = torch.zeros_like(entropy), None, 0.0
    if applies:
        value = entropy if p["mode"] == "token" else entropy.mean(1, keepdim=True).expand_as(entropy)
        outside = epo.corridor_indicator(value, history[turn][:, None], p["kappa_l"], p["kappa_r"])
        weight = epo.released_phase_weight(p["epoch_k"]) if p["use_epoch_weight"] else 1.0
        inside = 1 - float(outside.mean())
    matrix = outside * p["alpha"] * (weight or 0.0)
    bounds = 1 - p["clip"], 1 + p["clip"]
    surrogate = clipped_surrogate(
        logprob, case.tensor("old_log_prob"), case.tensor("advantages"), *bounds, dual_clip=p["clip_c"]
    )
    policy, mean, penalty = (reduce(x, mask, "token_mean") for x in (surrogate.loss, entropy, matrix))
    total = policy - p["lambda"] * (mean - p["smooth_coeff"] * penalty)
    grad = gradient(total, logits)
    found = {
        "code_penalty_matrix": matrix,
        "code_fraction_inside": inside,
        "code_epoch_weight": weight,
        "code_pg_loss": policy,
        "code_entropy_loss": mean,
        "code_penalty_loss": penalty,
        "code_total_loss": total,
        # the penalty has no gradient: nothing to differ by
        "code_max_abs_grad_difference_with_and_without_penalty": float(matrix.requires_grad),
    }
    return found, grad


def _paper(case: Case) -> tuple[dict[str, Any], Any]:
    logits, mask, p = case.leaf("logits"), case.mask("response_mask"), case.params
    _, entropy = token_statistics(logits, case.ids("actions"))
    reference = case.tensor("entropy_history_per_turn").mean()
    hinge = epo.corridor_hinge(entropy, reference, p["kappa_l"], p["kappa_r"])
    mean, smooth = (reduce(x, mask, "sequence_mean_of_token_mean") for x in (entropy, p["alpha"] * hinge))
    beta = epo.phase_weight(p["epoch_k"], p["K"], p["gamma"])
    term = -p["lambda"] * (mean - beta * smooth)
    found = {
        "href": reference,
        "hinge_matrix": hinge,
        "L_H": mean,
        "L_smooth": smooth,
        "beta_k": beta,
        "regulariser": term,
    }
    return {f"paper_v2_{name}": value for name, value in found.items()}, gradient(term, logits)


def _phase(case: Case) -> Replay:
    p, steps = case.params, case.inputs["k"]
    return Replay(
        {
            "code_weight": [epo.released_phase_weight(k, p["max_epochs_code"]) for k in steps],
            "paper_beta": [epo.phase_weight(k, p["K_paper"], p["gamma"]) for k in steps],
        }
    )


def _turns(case: Case) -> Replay:
    rows, p = (case.tensor("row_return"), case.ids("group_id"), case.ids("traj_id")), case.params
    return Replay(
        {
            f"advantage_cross_all_data_{over}": epo.turn_row_advantage(*rows, over, p["norm_by_std"], p["epsilon"])
            for over in (True, False)
        }
    )


RULES = [
    Rule("epo", {"logits", "actions", "response_mask", "turn_index", "entropy_history_per_turn"},
         {"code_total_loss", "paper_v2_regulariser"}, _loss, params={"lambda", "alpha"}),
    Rule("epo", {"k"}, {"code_weight", "paper_beta"}, _phase),
    Rule("epo", {"group_id", "traj_id", "row_return"}, {"advantage_cross_all_data_True"}, _turns),
]  # fmt: skip
