"""Replays copo.json: local and global advantages, consistency entropy, gate, and the blended loss with its gradient."""

from __future__ import annotations

from typing import Any

import torch

from ...core.advantages import group_advantage, group_sums
from ...core.reduce import Reduction, reduce
from ...methods import copo
from ..golden import Case, Replay, Rule, gradient

REDUCTIONS: dict[str, Reduction] = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_of_token_mean",
    "seq-mean-token-sum": "sequence_mean_of_token_sum",
}
INSIDE_LOG = 1e-8
BITS: copo.LogBase = "bits"


def _loss(case: Case) -> Replay:
    p, reward, group = case.params, case.tensor("reward"), case.ids("group")
    eps = p["epsilon"]
    local = group_advantage(reward, group, "sample", eps, "raw")
    answers = copo.answer_ids(case.inputs["answer"])
    entropy = copo.consistency_entropy(answers, group, BITS, INSIDE_LOG, case.dtype)
    sums, size, _ = group_sums(reward, group)
    value = sums / size
    if p.get("reward_coef"):
        value = value * copo.consistency_coefficient(entropy, size, BITS)
    among = copo.global_advantage(value, group, eps)
    gate = p["global_flg"]
    weight, soft = (
        copo.local_weight(entropy, reward, local, group, name, p["k"], p["b"]) for name in (gate, "only-soft")
    )
    found: dict[str, Any] = {
        "local_advantage": local,
        "global_advantage": among,
        "consistency_entropy_bits": entropy,
        "global_reward": value,
        # the flags without a blend leave the recorded weight as it was and do not read it
        "local_weight": soft if gate in ("only-global", "no-global") else weight,
    }
    logprob = case.leaf("log_prob")
    mask = torch.arange(logprob.shape[1])[None] < case.ids("lengths")[:, None]
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    coefficient = p.get("global_loss_coef", 1.0) if gate == "only-soft-with-coef" else 1.0
    own, other, share = (x[:, None].expand_as(logprob) for x in (local, among, weight))
    old = case.tensor("old_log_prob")
    surrogate = copo.blended_surrogate(logprob, old, own, other, share, *bounds, p["clip_ratio_c"], coefficient)
    loss = reduce(surrogate.loss, mask, REDUCTIONS[p["loss_agg"]])
    return Replay(found | {"loss": loss}, {"log_prob": gradient(loss, logprob)})


RULES = [
    Rule("copo", {"reward", "answer", "group", "log_prob", "old_log_prob", "lengths"},
         {"global_advantage", "local_weight", "loss"}, _loss, params={"global_flg", "k", "b"}),
]  # fmt: skip
