"""Replays ucas.json: certainty from logits, both stages of the advantage, the clipped token mean of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.advantages import Singleton, group_advantage
from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import ucas
from ..golden import Case, Replay, Rule, gradient

RAW: Singleton = "raw"


def _statistics(case: Case) -> tuple[Tensor, Tensor]:
    """Certainty and sampled logit: from the logits where the case has some."""
    if "logits" not in case.inputs:
        return case.tensor("token_certainty"), case.tensor("token_logit")
    logits = case.tensor("logits")
    certainty = -torch.log_softmax(logits, -1).mean(-1)
    return certainty, logits.gather(-1, case.ids("token_ids")[..., None]).squeeze(-1)


def _advantage(case: Case) -> Replay:
    certainty, logit = _statistics(case)
    p, group = case.params, case.ids("group")
    mask = torch.arange(case.inputs["T"])[None] < case.ids("lengths")[:, None]
    eps, scale = p["epsilon"], "sample" if p["norm_by_std"] else "none"
    std: Any = scale
    plain = group_advantage(case.tensor("reward"), group, std, eps, RAW)
    logits = ucas.scaled_logit(logit, mask, eps)

    def shaped(confidence: ucas.Confidence) -> Tensor:
        whole = ucas.response_certainty(certainty, mask, confidence)
        scaled = ucas.scaled_certainty(whole, group, std, eps, RAW)
        value = plain * ucas.confidence_weight(plain, scaled, p["beta_pos"], p["beta_neg"])
        return ucas.token_advantage(value, logits, mask, p["token_penalty"])

    found = {
        "certainty_sum": ucas.response_certainty(certainty, mask, "sum"),
        "grpo_advantage_per_response": plain,
        "normalized_logit": logits,
        "advantage": shaped("sum"),
        "advantage_mean_certainty_variant": shaped("mean"),
    }
    return Replay(found) if "log_prob" not in case.inputs else _loss(case, found, mask)


def _loss(case: Case, found: dict[str, Any], mask: Tensor) -> Replay:
    logprob, clip = case.leaf("log_prob"), case.params["clip"]
    surrogate = clipped_surrogate(
        logprob, case.tensor("old_log_prob"), found["advantage"], 1 - clip, 1 + clip, case.params["clip_ratio_c"]
    )
    loss = reduce(surrogate.loss, mask, "token_mean")
    clipped = masked_mean((surrogate.clipped_low | surrogate.clipped_high).double(), mask)
    return Replay(found | {"loss": loss, "clipfrac": clipped}, gradient(loss, logprob))


RULES = [Rule("ucas", {"reward", "lengths", "group", "token_certainty", "token_logit", "T"}, {"advantage"}, _advantage,
              params={"beta_pos", "beta_neg", "token_penalty"})]  # fmt: skip
