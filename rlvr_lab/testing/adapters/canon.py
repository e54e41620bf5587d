"""Replays canon.json: the estimators on entropy, length and place, schedules, Dr. GRPO beside them, the full loss."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ...core.advantages import group_advantage
from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import canon
from ..golden import Case, Replay, Rule, gradient

COSINE: dict[str, canon.Schedule] = {
    "cosine_with_restart_group": "cosine_intra_first",
    "cosine_with_restart_r_group": "cosine_inter_first",
}


def _mask(case: Case) -> Tensor:
    return torch.arange(case.inputs["T"])[None] < case.ids("lengths")[:, None]


def _mean_entropy(case: Case) -> Tensor:
    mask = _mask(case)
    return case.tensor("entropy").masked_fill(~mask, 0.0).sum(1) / mask.sum(1)


def _weight(case: Case) -> float:
    """mu: the recorded one, or that of the function's schedule."""
    p, name = case.params, case.function
    if "_annel_" in name:
        return canon.mixing_weight("accuracy_intra_first", 1.0, float(case.tensor("reward").mean()), p["step"])
    schedule = next((value for key, value in COSINE.items() if key in name), None)
    if schedule:
        return canon.mixing_weight(schedule, 1.0, 0.0, p["step"])
    return float(p.get("_lambda", p.get("lambda", 1.0)))


def _value(case: Case) -> Tensor:
    """Advantage of every response [B], not yet over the length."""
    p, name, group = case.params, case.function, case.ids("group")
    reward = case.tensor("reward")
    if "dr_grpo" in name:
        return group_advantage(reward, group, "none", singleton="raw")
    by_length, by_place = "length" in name, "random" in name
    metric = case.tensor("lengths") if by_length else _mean_entropy(case)
    if by_place:
        metric = torch.arange(len(reward), dtype=reward.dtype)
    high = canon.high_half(metric, group)
    if by_place:  # this one knows neither mu nor alpha
        return canon.canon_advantage(reward, high, group)
    half = get_args(canon.Half)[int(by_length)]
    return canon.canon_advantage(reward, high, group, _weight(case), p.get("alpha", 1.0), p.get("beta", 0.0), half)


def _advantage(case: Case) -> Replay:
    value = _value(case) / case.params["max_length"]
    whole = value[:, None] * _mask(case)
    found = {"advantage_per_response": value, "advantage_full_sum": whole.sum(), "mean_entropy": _mean_entropy(case)}
    return Replay(found)


def _schedule(case: Case) -> Replay:
    p: Any = case.params
    period = (p["total_epochs"] - p["warmup_epochs"]) / p["cycles"]
    values = [canon.cosine_weight(s, p["warmup_epochs"], period, p["min_lr"], p["max_lr"]) for s in case.inputs["step"]]
    return Replay({"value": values})


def _loss(case: Case) -> Replay:
    p, mask, logprob = case.params, _mask(case), case.leaf("log_prob")
    advantage = (_value(case)[:, None] / p["max_length"]).expand(logprob.shape)
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    surrogate = clipped_surrogate(logprob, case.tensor("old_log_prob"), advantage, *bounds, p["clip_ratio_c"])
    loss = reduce(surrogate.loss, mask, "sequence_mean_of_token_sum")
    beyond = torch.where(advantage < 0, surrogate.ratio < bounds[0], surrogate.ratio > bounds[1]) & advantage.ne(0)
    return Replay({"loss": loss, "clipfrac": masked_mean(beyond.double(), mask)}, gradient(loss, logprob))


ROWS = {"reward", "lengths", "entropy", "group", "T"}
RULES = [
    Rule("canon", ROWS, {"advantage_per_response"}, _advantage, params={"max_length"}),
    Rule("canon", {"step"}, {"value"}, _schedule, params={"warmup_epochs", "cycles", "min_lr", "max_lr"}),
    Rule("canon", ROWS | {"log_prob", "old_log_prob"}, {"loss", "clipfrac"}, _loss, params={"max_length"}),
]
