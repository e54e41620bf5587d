"""Replays bapo.json: the released search and loss, and the paper's search and loss."""

from __future__ import annotations

from typing import Any

import torch

from ...core.losses import clipped_surrogate, importance_ratio
from ...core.reduce import masked_mean
from ...methods import bapo
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl


def _bapo(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask, p = case.mask("response_mask"), case.params
    ratio = importance_ratio(logprob.detach(), old)

    def released(lower: float, upper: float) -> float:
        return bapo.positive_ratio(ratio, advantage, mask, lower, upper, p["eps"])

    found = bapo.search(
        released, p["target"], (p["lo0"], p["lomax"], p["los"]), (p["hi0"], p["himax"], p["his"]), lower_first=True
    )
    surrogate = clipped_surrogate(logprob, old, advantage, found.lower, found.upper, dual_clip=p["clip_ratio_c"])
    loss = reduce_as_verl(case, surrogate.loss, mask)
    clamped = -advantage * ratio.clamp(found.lower, found.upper)
    clipped = torch.maximum(-advantage * ratio, clamped)
    beyond = clamped > -advantage * ratio
    capped = (clipped > -advantage * p["clip_ratio_c"]) & (advantage < 0)
    outputs: dict[str, Any] = {
        "initial_pos_neg_ratio": released(p["lo0"], p["hi0"]),
        "final_clip_low": found.lower,
        "final_clip_high": found.upper,
        "final_pos_neg_ratio": found.value,
        "pg_loss": loss,
        "clipfrac": masked_mean(beyond.to(ratio), mask),
        "clipfrac_lower": masked_mean(capped.to(ratio), mask),
        "ppo_kl": masked_mean(old - logprob.detach(), mask),
    }
    grads = {"code": gradient(loss, logprob)}
    q = p.get("paper_search")
    if q is not None:
        paper, grads["paper"] = _paper(case, q)
        outputs |= paper
    return Replay(outputs, grads)


def _paper(case: Case, q: dict[str, float]) -> tuple[dict[str, Any], Any]:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask = case.mask("response_mask")
    ratio = importance_ratio(logprob.detach(), old)
    lower = (q["a_minus"], q["b_minus"], q["delta2"])
    upper = (q["a_plus"], q["b_plus"], q["delta1"])
    found = []
    for weight in (old.exp() * mask, mask.to(ratio)):

        def share(lo: float, hi: float, weight: torch.Tensor = weight) -> float:
            return bapo.positive_share(ratio, advantage, weight, lo, hi)

        found.append((share(lower[0], upper[0]), bapo.search(share, q["rho0"], lower, upper)))
    (initial, weighted), (_, plain) = found
    surrogate = clipped_surrogate(logprob, old, advantage, weighted.lower, weighted.upper)
    loss = reduce_as_verl(case, surrogate.loss, mask)
    outputs = {
        "paper_initial_share": initial,
        "paper_final_low": weighted.lower,
        "paper_final_high": weighted.upper,
        "paper_final_share": weighted.value,
        "paper_n_search_steps": weighted.steps,
        "paper_loss_token_mean": loss,
        "paper_unweighted_final_low_high_share": [plain.lower, plain.upper, plain.value],
    }
    return outputs, gradient(loss, logprob)


RULES = [
    Rule("bapo", {"old_log_prob", "log_prob", "advantages", "response_mask"},
         {"final_clip_low", "final_clip_high", "pg_loss"}, _bapo, params={"lo0", "hi0", "target"}),
]  # fmt: skip
