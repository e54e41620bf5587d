"""Replays agentic_aepo.json: the loss in every switch setting, branch decisions, budget split, entropies, reward."""

from __future__ import annotations

import re
from typing import Any

import torch

from ...core.losses import importance_ratio
from ...core.reduce import masked_mean
from ...methods import _branching as branching
from ...methods import agentic_aepo as aepo
from ...tasks.agents import search_reward
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl


def _loss(case: Case) -> Replay:
    logprob, old, mask, p = case.leaf("log_prob"), case.tensor("old_log_prob"), case.mask("mask"), case.params
    advantage, cap = case.tensor("advantages"), p.get("dual_clip_c", 3.0)
    if p["entropy_balanced_advantage"]:
        score = aepo.entropy_score(case.tensor("entropy"), mask)
        advantage = advantage * (1 + p.get("adv_entropy_coef", 0.2) * score)
    lower, upper = 1 - p["clip_low"], 1 + p["clip_high"]
    keep = bool(p["entropy_balanced_clipping"])
    loss = reduce_as_verl(case, aepo.balanced_surrogate(logprob, old, advantage, lower, upper, cap, keep).loss, mask)
    ratio = importance_ratio(logprob.detach(), old)
    plain, clamped = -advantage * ratio, -advantage * ratio.clamp(lower, upper)
    capped = (torch.maximum(plain, clamped) > -advantage * cap) & (advantage < 0)
    outputs = {
        "loss": loss,
        "clipfrac": masked_mean((clamped > plain).to(ratio), mask),
        "ppo_kl": masked_mean(old - logprob.detach(), mask),
        "clipfrac_lower": masked_mean(capped.to(ratio), mask),
    }
    return Replay(outputs, {"log_prob": gradient(loss, logprob)})


def _decisions(case: Case) -> Replay:
    p, uniform = case.params, case.tensor("u_uniform01")
    change = case.tensor("entropy_now") - case.tensor("entropy_initial")
    arpo = branching.arpo_score(uniform, change, p["entropy_weight"])
    streak, penalty = case.tensor("consecutive_branches"), p["penalty_per_consecutive_branch"]
    own = branching.aepo_score(uniform, change, streak, p["entropy_weight"], penalty)
    at = p["branch_probability"]
    return Replay({"arpo_prob": arpo, "arpo_branch": arpo <= at, "aepo_prob": own, "aepo_branch": own >= at})


def _split(case: Case) -> Replay:
    rows = list(zip(*(case.inputs[key] for key in ("k_total", "H_root", "H_tool_steps")), strict=True))
    beta = case.params.get("beta_code", 0.5)
    found: dict[str, Any] = {"m_code": [branching.budget_split(k, root, tool, beta) for k, root, tool in rows]}
    for key in case.outputs:
        if key.startswith("m_real_valued"):
            betas = [float(text) for text in re.findall(r"(?<=_)[\d.]+", key)]
            means = [sum(tool) / len(tool) if tool else root for _, root, tool in rows]
            found[key] = [
                [branching.expected_split(k, root, mean, beta) for (k, root, _), mean in zip(rows, means, strict=True)]
                for beta in betas
            ]
    return Replay(found)


def _entropy(case: Case) -> Replay:
    p = case.params
    segments, first = case.inputs["topk_logprobs_per_token"], p.get("first_tokens", 20)
    found = [branching.truncated_segment_entropy(segment, p["vocab_size"], first) for segment in segments]
    return Replay({"segment_entropy": found})


def _reward(case: Case) -> Replay:
    texts, truths = case.inputs["text"], case.inputs["ground_truth"]
    scores = [search_reward.search_reward(text, truth) for text, truth in zip(texts, truths, strict=True)]
    return Replay({"score": scores, "reason_is_bad_format": [score == search_reward.BAD_FORMAT for score in scores]})


SLUG = "agentic_aepo"
RULES = [
    Rule(SLUG, {"log_prob", "old_log_prob", "entropy", "advantages", "mask"}, {"loss"}, _loss,
         params={"entropy_balanced_clipping", "entropy_balanced_advantage"}),
    Rule(SLUG, {"u_uniform01", "entropy_now", "entropy_initial", "consecutive_branches"},
         {"arpo_branch", "aepo_branch"}, _decisions, params={"entropy_weight"}),
    Rule(SLUG, {"k_total", "H_root", "H_tool_steps"}, {"m_code"}, _split),
    Rule(SLUG, {"topk_logprobs_per_token"}, {"segment_entropy"}, _entropy, params={"vocab_size"}),
    Rule(SLUG, {"text", "ground_truth"}, {"score"}, _reward),
]  # fmt: skip
