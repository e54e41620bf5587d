"""Replays entropy_guided_attention.json: row entropies, the released sum and the mean over queries, gradients."""

from __future__ import annotations

import math

import torch

from ...methods import entropy_guided_attention as ega
from ..golden import Case, Replay, Rule, gradient


def _loss(case: Case) -> Replay:
    p = case.params
    scores, theta = case.leaf("attention_scores"), case.leaf("reg_threshold_weights")
    keys = scores.shape[-1]
    masked = scores.masked_fill(torch.ones(keys, keys).triu(1).bool(), -math.inf) if p.get("causal", True) else scores
    attentions = list(masked.softmax(-1))
    # the released code rounds this one constant to float32, and the margin made of it
    e_max = torch.tensor(float(p.get("context_size") or keys), dtype=torch.float32).log()
    losses = {
        name: ega.attention_entropy_loss(attentions, theta, p["tolerance_margin_factor"], name, e_max)
        for name in ("official_sum", "query_mean")
    }
    official = p["loss_coeff"] * losses["official_sum"]
    found = {
        "entropy_per_layer": torch.stack([ega.attention_entropy(a) for a in attentions]),
        "mean_entropy_per_layer_head": ega.head_entropies(attentions),
        "loss_official": official,
        "loss_over_coeff": losses["official_sum"],
        "loss_query_mean_variant": p["loss_coeff"] * losses["query_mean"],
    }
    grads = {"attention_scores": gradient(official, scores), "reg_threshold_weights": gradient(official, theta)}
    return Replay(found, grads)


RULES = [
    Rule("entropy_guided_attention", {"attention_scores", "reg_threshold_weights"}, {"loss_official"}, _loss,
         params={"loss_coeff", "tolerance_margin_factor"}),
]  # fmt: skip
