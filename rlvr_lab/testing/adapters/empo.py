"""Replays empo.json: rewards, advantages and entropies of TRL and verl from answers; the sequence-level loss."""

from __future__ import annotations

import torch

from ...core.advantages import group_advantage
from ...core.entropy import cluster
from ...core.losses import gspo_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import empo
from ..golden import Case, Replay, Rule, gradient


def _rewards(case: Case) -> Replay:
    p, answers = case.params, case.inputs["answers"]
    size = p.get("G", len(answers))
    group = torch.arange(len(answers)) // size
    ids = []
    for start in range(0, len(answers), size):
        found = cluster([answer or None for answer in answers[start : start + size]])
        ids += [-1 if number is None else number for number in found]
    cluster_id, freedom = torch.tensor(ids), "sample" if p.get("std_ddof", 1) else "population"
    entropy = empo.semantic_entropies(cluster_id, group, "separate")
    uniform = empo.group_sizes(group).log()
    inside = empo.open_gate(entropy, None, uniform)
    trl = torch.where(inside, empo.cluster_rewards(cluster_id, group), 0.0)
    verl = empo.cluster_rewards(cluster_id, group, unreadable=None)
    advantage = {
        name: group_advantage(reward, group, freedom, p[f"{name}_std_eps"])  # type: ignore[arg-type]
        for name, reward in (("trl", trl), ("verl", verl))
    }
    thresholds = {
        key: int(key.rsplit("_", 1)[1]) / 100 for key in case.outputs if key.startswith("thresholded_reward_")
    }
    return Replay(
        {
            "trl_reward": trl,
            "verl_reward": verl,
            "trl_advantage": advantage["trl"],
            "verl_advantage": advantage["verl"],
            "semantic_entropy_trl": entropy[::size],
            "semantic_entropy_verl": entropy[::size],
            "voting_reward": empo.cluster_rewards(cluster_id, group, "voting", None),
        }
        | {
            key: empo.cluster_rewards(cluster_id, group, unreadable=None, least_majority=least)
            for key, least in thresholds.items()
        }
    )


def _loss(case: Case) -> Replay:
    logprob, old, p = case.leaf("log_prob"), case.tensor("old_log_prob"), case.params
    mask = torch.arange(logprob.shape[1])[None] < case.ids("lengths")[:, None]
    lower, upper = (torch.full_like(old, bound) for bound in (1 - p["clip_low"], 1 + p["clip_high"]))
    surrogate = gspo_surrogate(logprob, old, case.tensor("advantage"), mask, lower, upper, 10.0)
    loss = reduce(surrogate.loss, mask, "sequence_mean_of_token_mean")
    clipped = (surrogate.clipped_low | surrogate.clipped_high).to(old)
    by_row = clipped.masked_fill(~mask, 0).sum(1) / mask.sum(1)
    return Replay({"loss": loss, "clipfrac": masked_mean(by_row, mask.any(1))}, gradient(loss, logprob))


RULES = [
    Rule("empo", {"answers"}, {"trl_reward", "verl_reward"}, _rewards),
    Rule("empo", {"log_prob", "old_log_prob", "advantage", "lengths"}, {"loss", "clipfrac"}, _loss,
         params={"clip_low", "clip_high"}),
]  # fmt: skip
