"""Replays riskpo.json: the released estimator with all its switches, the quantile tracker, the sequence-level loss."""

from __future__ import annotations

import torch

from ...core.losses import gspo_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import riskpo
from ...methods._bundles import form_bundles, slots
from ..golden import Case, Replay, Rule, gradient


def _advantage(case: Case) -> Replay:
    p, reward, question = case.params, case.tensor("reward"), case.ids("question")
    found = form_bundles(reward, case.ids("bundle"), slots(torch.zeros_like(reward), question))
    levels, eps = (p["quantile_down"], p["quantile_up"]), p["epsilon"]
    low, high = riskpo.own_quantiles(found, levels)
    if p.get("use_q_track_mode") == "track" and p.get("q_track_down") is not None:
        low, high = (torch.full_like(found.score, p[f"q_track_{end}"]) for end in ("down", "up"))
    seeking = bool(p.get("risk_seeking_upper_tail"))
    functional: riskpo.Functional = "averse" if p["use_mixing_risk_measure"] else "seeking" if seeking else "body"
    weight = p["w_mix"] if functional == "averse" else p.get("upper_weight", p["w_mix"])
    value = riskpo.risk_advantage(
        found.score, low, high, levels, functional, "levels", weight, p["natural_baseline_adv"], eps
    )
    if p["norm_adv_by_std_in_grpo"]:
        value = riskpo.divide_by_bundle_std(value, found, -1.0, eps)  # the release has no floor
    advantage = riskpo.assign_credit(value, found, reward, question, p["credit_assign_mode"], eps)
    labels = list(dict.fromkeys(case.inputs["bundle"]))
    scores = {label: found.score[found.bundle == number] for number, label in enumerate(labels)}
    return Replay({"advantage_per_response": advantage, "bundle_scores": scores})


def _tracker(case: Case) -> Replay:
    levels = torch.tensor(case.params["alpha_list"], dtype=case.dtype)
    quantiles, after = None, []
    for scores in case.inputs["bundle_scores_per_step"]:
        score = torch.tensor(scores, dtype=case.dtype)
        quantiles = (
            score.quantile(levels) if quantiles is None
            else riskpo.track(quantiles, levels, score, case.params["lr_q"])
        )  # fmt: skip
        after.append(quantiles)
    return Replay({"q_after_step": torch.stack(after)})


def _loss(case: Case) -> Replay:
    logprob, advantage = case.leaf("log_prob"), case.tensor("advantage")
    mask = torch.arange(logprob.shape[1])[None] < case.ids("lengths")[:, None]
    bounds = 1 - case.params["clip"], 1 + case.params["clip"]
    found = gspo_surrogate(logprob, case.tensor("old_log_prob"), advantage, mask, *bounds, log_limit=None)
    loss = reduce(found.loss, mask, "sequence_mean_of_token_mean")
    clipped = masked_mean((found.clipped_low | found.clipped_high).to(case.dtype), mask)
    return Replay({"loss": loss, "clipfrac": clipped}, {"log_prob": gradient(loss, logprob)})


RULES = [
    Rule("riskpo", {"reward", "question", "bundle"}, {"advantage_per_response"}, _advantage),
    Rule("riskpo", {"bundle_scores_per_step"}, {"q_after_step"}, _tracker, params={"alpha_list", "lr_q"}),
    Rule("riskpo", {"log_prob", "old_log_prob", "advantage", "lengths"}, {"loss", "clipfrac"}, _loss,
         params={"clip"}),
]  # fmt: skip
