"""Replays entropy_mechanism.json: Clip-Cov, KL-Cov, tabular theory, the law, the bandit covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import dynamics
from ...core.entropy import softmax_entropy
from ...core.losses import clipped_surrogate
from ...core.reduce import Reduction, masked_mean, reduce
from ...methods import entropy_mechanism as em
from ..golden import Case, Replay, Rule, gradient

REDUCTION: dict[str, Reduction] = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_of_token_mean",
    "seq-mean-token-sum": "sequence_mean_of_token_sum",
    "seq-mean-token-sum-norm": "sequence_mean_of_token_sum_over_constant",
}


def reduce_as_verl(case: Case, loss_BT: Tensor, mask_BT: Tensor, port: bool = False) -> Tensor:
    """verl's aggregation. `-norm` divides the sum over all responses by the padded length. The authors' older fork
    counts empty responses in `seq-mean-token-sum`, verl's port does not."""
    mode = case.params.get("loss_agg_mode", "token-mean")
    rows, width = mask_BT.shape
    if not mask_BT.any():
        return loss_BT.sum() * 0.0
    if mode == "seq-mean-token-sum" and not port:
        return reduce(loss_BT, mask_BT, "sequence_mean_of_token_sum_over_constant", 1.0)
    return reduce(loss_BT, mask_BT, REDUCTION[mode], width / rows)


def _token_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages"), case.mask("response_mask")


def _clip_cov(case: Case) -> Replay:
    logprob, old, advantage, mask = _token_inputs(case)
    p = case.params
    covariance = dynamics.token_covariance(logprob, advantage, mask)
    surrogate = clipped_surrogate(logprob, old, advantage, 1 - p["clip_low"], 1 + p["clip_high"])
    clipped = (surrogate.clipped_low | surrogate.clipped_high) & mask
    candidates = em.clip_cov_candidates(covariance, mask, p["clip_cov_lb"], p["clip_cov_ub"], clipped)
    number = em.clip_cov_number(int(mask.sum()), p["clip_cov_ratio"])
    drawn = torch.tensor(case.outputs.get("randperm", []), dtype=torch.long)
    selected = em.select_clip_cov(candidates, number, permutation=drawn)
    kept = ~em.place_mask(selected, mask)
    loss = reduce_as_verl(case, surrogate.loss * kept, mask)
    ported = reduce_as_verl(case, surrogate.loss * kept, mask, port=True)
    outputs = {
        "loss": loss,
        "loss_verl_port": ported,
        "pg_clipfrac": masked_mean((~kept).double(), mask).nan_to_num(0.0),
        "ppo_kl": masked_mean(old - logprob, mask).nan_to_num(0.0),
        "covariance": covariance,
        "ppo_clipped": clipped.long(),
        "candidates": candidates.nonzero(),
        "clip_num": number,
        "randperm": drawn,
        "selected": selected,
    }
    return Replay(outputs, gradient(loss, logprob))


def _settle_ties(own: Tensor, recorded: Any, covariance_BT: Tensor) -> Tensor:
    """Among tokens of equal covariance torch.topk takes any: the recorded ones, where they are as large as ours."""
    theirs = torch.tensor(recorded or [], dtype=torch.long).reshape(-1, 2)
    if theirs.shape != own.shape:
        return own
    ours, recorded_values = (covariance_BT[places[:, 0], places[:, 1]] for places in (own, theirs))
    return theirs if torch.allclose(ours, recorded_values, rtol=0, atol=1e-12) else own


def _kl_cov(case: Case) -> Replay:
    logprob, old, advantage, mask = _token_inputs(case)
    covariance = dynamics.token_covariance(logprob, advantage, mask)
    outputs: dict[str, Any] = {"mean_abs_log_ratio": masked_mean((logprob - old).abs(), mask).nan_to_num(0.0)}
    losses = []
    fraction = case.params.get("kl_cov_ratio", case.params.get("k_percent", 0.0) / 100)
    percent = case.params.get("k_percent", 100 * fraction)
    for suffix, k in (("", percent), ("_verl_port", fraction)):
        selected = em.select_kl_cov(covariance, mask, em.kl_cov_number(int(mask.sum()), k, percent=not suffix))
        selected = _settle_ties(selected, case.outputs.get(f"selected{suffix}"), covariance)
        chosen = em.place_mask(selected, mask)
        per_token = em.kl_cov_loss(logprob, old, advantage, chosen, case.params["ppo_kl_coef"]).loss
        losses.append(reduce_as_verl(case, per_token, mask, port=bool(suffix)))
        found = {"loss": losses[-1], "selected": selected, "num_selected": len(selected)}
        outputs |= {key + suffix: value for key, value in found.items()}
    return Replay(outputs, gradient(losses[0], logprob))


def _theory(case: Case) -> Replay:
    logits, q, eta = case.tensor("logits"), case.tensor("q_values"), case.params["eta"]
    log_p, p = torch.log_softmax(logits, -1), torch.softmax(logits, -1)
    advantage = dynamics.natural_gradient_step(logits, q, 1.0)
    steps = {
        "pg": dynamics.policy_gradient_step(logits, q, eta),
        "npg": dynamics.natural_gradient_step(logits, q, eta),
    }
    outputs = {
        "probs": p,
        "entropy": softmax_entropy(logits),
        "advantage": advantage,
        "cov_logp_pA": dynamics.policy_covariance(logits, log_p, p * advantage),
        "cov_logp_A": dynamics.policy_covariance(logits, log_p, advantage),
        "entropy_grad_wrt_logits": dynamics.entropy_gradient(logits),
    }
    for name, step in steps.items():
        outputs[f"dlogits_{name}"] = step
        outputs[f"first_order_dH_{name}"] = dynamics.first_order_change(logits, step)
        outputs[f"exact_dH_{name}"] = dynamics.exact_change(logits, step)
    return Replay(outputs)


def _law(case: Case) -> Replay:
    fit = dynamics.fit_law(case.inputs["entropy"], case.inputs["performance"])
    outputs = {"a": fit.a, "b": fit.b, "ceiling_at_H0": fit.ceiling, "rmse": fit.rmse, "r2": fit.r2}
    for key in case.outputs:
        if key.startswith("dR_dH_at_H_"):
            outputs[key] = fit.slope(float(key.removeprefix("dR_dH_at_H_").replace("_", ".")))
    return Replay(outputs)


def _bandit(case: Case) -> Replay:
    found = dynamics.bandit_covariance(
        case.tensor("log_prob"), case.mask("response_mask"), case.tensor("rewards"), case.ids("group")
    )
    columns = (found.mean_logprob, found.cov_logprob_advantage, found.cov_logprob_weighted_advantage)
    names = ("mean_len_norm_logp", "cov_logp_A", "cov_logp_expLogp_A")
    groups = [dict(zip(names, values, strict=True)) for values in zip(*(c.tolist() for c in columns), strict=True)]
    means = {"mean_cov_logp_A": found.mean_cov, "mean_cov_logp_pA": found.mean_cov_weighted}
    return Replay({"groups": groups, **means})


TOKENS = {"log_prob", "old_log_prob", "advantages", "response_mask"}
RULES = [
    Rule("entropy_mechanism", TOKENS, {"loss"}, _clip_cov, params={"clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"}),
    Rule("entropy_mechanism", TOKENS, {"loss"}, _kl_cov, params={"ppo_kl_coef"}),
    Rule("entropy_mechanism", {"logits", "q_values"}, {"entropy"}, _theory, params={"eta"}),
    Rule("entropy_mechanism", {"entropy", "performance"}, {"a", "b"}, _law),
    Rule("entropy_mechanism", {"log_prob", "response_mask", "rewards", "group"}, {"groups"}, _bandit),
]
