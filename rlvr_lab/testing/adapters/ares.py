"""Replays ares.json: the released reward, count, buckets, KL weights and loss; the paper's reward and windowed KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.entropy import window_entropy
from ...core.losses import clipped_surrogate, kl_estimate
from ...core.reduce import masked_mean, reduce
from ...core.windows import (
    BUCKETS,
    bucket_moments,
    difficulty_buckets,
    pooled_threshold,
    row_quantiles,
    window_events,
)
from ...methods import _ares_code as code
from ...methods import ares
from ..golden import Case, Replay, Rule, gradient


def _buckets(names: list[str]) -> Tensor:
    return torch.tensor([BUCKETS.index(name) for name in names])


def _by_name(values: Any) -> dict[str, Any]:
    return dict(zip(BUCKETS, values, strict=True))


def _listed(by_name: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(by_name.get(name, math.nan) for name in BUCKETS)


def _grid(case: Case) -> Replay:
    p, correct = case.params, case.mask("correct")
    fraction, kappa, temperature, cap = (_listed(p[name]) for name in ("margin_frac", "kappa", "temp", "cap_scale"))
    grid = code.Grid(fraction, kappa, temperature, cap, p["min_margin"])
    bucket = _buckets(case.inputs["difficulty"])
    value = code.grid_reward(case.tensor("n_he"), case.tensor("target"), case.tensor("alpha"), correct, bucket, grid)
    return Replay({"entropy_reward": value, "overall": correct.to(value) + value})


def _count(case: Case) -> Replay:
    p, ids, logprob = case.params, case.inputs["topk_token_ids"], case.inputs["topk_logprobs"]
    window, level = p["window"], p["percentile"] / 100
    words = [i for i, text in enumerate(p["vocab_text"]) if text in p["trigger_words"]]
    found: dict[str, list[Any]] = {
        "mean_entropy_tail_corrected": [], "window_percentile_per_sequence": [], "n_he": [],
        "n_trigger_below_threshold": [], "soft_cost": [],
    }  # fmt: skip
    for row_ids, row_logprob in zip(ids, logprob, strict=True):
        head, bare = code.head_entropies(torch.tensor(row_logprob, dtype=case.dtype))
        mask = torch.ones(1, len(head), dtype=torch.bool)
        windows = window_entropy(head[None], mask, window, offset=1)
        trigger = torch.isin(torch.tensor([[top[0] for top in row_ids]]), torch.tensor(words))
        limit = windows.new_tensor([p["threshold_used"]])
        event = window_events(windows, limit, inclusive=True) & trigger
        below = trigger & (windows < limit)
        quantile = row_quantiles(code.filled_windows(bare[None], mask, window), mask, level)
        row: tuple[Any, ...] = (
            head.mean(),
            quantile[0],
            int(event.sum()),
            int(below.sum()),
            (windows - limit)[event].sum(),
        )
        for name, value in zip(found, row, strict=True):
            found[name].append(value if isinstance(value, int) else float(value))
    quantiles = torch.tensor(found["window_percentile_per_sequence"], dtype=case.dtype)
    median = pooled_threshold(quantiles, torch.zeros(len(quantiles), dtype=torch.long), "median")[0]
    return Replay(found | {"median_over_batch": median})


def _bucket(case: Case) -> Replay:
    p, group = case.params, case.ids("prompt_id")
    bucket = difficulty_buckets(case.mask("correct"), group)
    size = torch.bincount(group).double()
    mean = bucket_moments(case.tensor("n_he"), bucket, 1 / size[group])[0].tolist()
    target = code.rounded_targets(mean)
    before = _listed(case.inputs["alpha_before"])
    after = code.moved_strengths(before, mean, target, p["alpha_lr"], p["alpha_min"], p["alpha_max"])
    names = dict.fromkeys(case.inputs["prompt_id"])
    return Replay(
        {
            "difficulty": {name: BUCKETS[int(bucket[group == i][0])] for i, name in enumerate(names)},
            "target": _by_name(target),
            "alpha_after": _by_name(after),
        }
    )


def _controller(case: Case) -> Replay:
    p = case.params
    control = code.BucketKLController(
        p["kl_target"], p["interval"], p["log_lr"], p["err_clip"], p["ema_decay"], p["deadzone"], p["beta_init"],
        p["beta_min"], p["beta_max"],
    )  # fmt: skip
    after = []
    for step in case.inputs["steps"]:
        control.update(torch.tensor(step["seq_mean_kl"], dtype=case.dtype), _buckets(step["difficulty"]))
        after.append(_by_name(list(control.beta)))
    return Replay({"beta_after_each_step": after, "kl_ema_final": _by_name(control.mean)})


def _loss(case: Case) -> Replay:
    p, logprob, mask = case.params, case.leaf("log_prob"), case.mask("mask")
    old, reference, advantage = (case.tensor(name) for name in ("old_log_prob", "ref_log_prob", "advantages"))
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    surrogate = clipped_surrogate(logprob, old, advantage, *bounds, dual_clip=p["clip_dual"])
    mean = "token_mean" if p["loss_avg_mode"] == "token" else "sequence_mean_of_token_mean"
    policy = reduce(surrogate.loss, mask, mean)  # type: ignore[arg-type]
    beta = case.tensor("beta_per_sequence").reshape(-1, 1)
    kl = reduce(beta * kl_estimate(logprob, reference, "k3"), mask, mean)  # type: ignore[arg-type]
    total = policy + p["kl_coef"] * kl
    # what the release calls high is either bound of the ratio, and low is the dual clip
    bound = surrogate.clipped_high | surrogate.clipped_low
    dual = (advantage < 0) & (surrogate.ratio > p["clip_dual"])
    return Replay(
        {
            "pg_loss": policy,
            "kl_loss": kl,
            "total": total,
            "clipfrac_high": masked_mean(bound.to(old), mask),
            "clipfrac_low": masked_mean(dual.to(old), mask),
        },
        gradient(total, logprob),
    )


def _paper_reward(case: Case) -> Replay:
    bucket, correct, count = _buckets(case.inputs["difficulty"]), case.mask("correct"), case.tensor("n_he")
    targets = _listed(case.inputs["lagged_target"])
    mean, variance = bucket_moments(count, bucket)
    triples = zip(mean.tolist(), targets, variance.tolist(), strict=True)
    strengths = [ares.multiplier(m, t, v, case.params["eps"]) for m, t, v in triples]
    target, strength = (count.new_tensor(some)[bucket] for some in (targets, strengths))
    value = correct.to(count) + ares.shaping(count, target, strength, correct, bucket)
    return Replay({"lambda": _by_name(strengths), "reward": value})


def _paper_kl(case: Case) -> Replay:
    p, logprob, mask = case.params, case.leaf("log_prob"), case.mask("mask")
    entropy = case.tensor("entropy")
    group = torch.zeros(len(entropy), dtype=torch.long)
    level = p.get("quantile", 0.95)
    tau = pooled_threshold(row_quantiles(entropy, mask, level), group)
    windows = window_entropy(entropy, mask, p["window"])
    event = window_events(windows, tau * p["threshold_scale"])
    beta = ares.relaxed_weights(entropy.new_tensor(p["beta_d_per_sequence"]), event, p["rho"])
    kl = reduce(beta * kl_estimate(logprob, case.tensor("ref_log_prob"), "k3", False), mask, p.get("reduction", MEAN))
    found = {
        "tau_high": tau[0],
        "window_entropy": windows,
        "valid_window_start": event.to(entropy),
        "beta_it": beta,
        "kl_loss": kl,
    }
    return Replay(found, gradient(kl, logprob))


MEAN = "sequence_mean_of_token_mean"
RULES = [
    Rule("ares", {"difficulty", "correct", "n_he", "target", "alpha"}, {"entropy_reward", "overall"}, _grid),
    Rule("ares", {"topk_token_ids", "topk_logprobs"}, {"n_he", "soft_cost"}, _count, params={"window", "percentile"}),
    Rule("ares", {"prompt_id", "correct", "n_he", "alpha_before"}, {"difficulty", "target", "alpha_after"}, _bucket),
    Rule("ares", {"steps"}, {"beta_after_each_step"}, _controller, params={"interval", "kl_target"}),
    Rule("ares", {"log_prob", "old_log_prob", "ref_log_prob", "beta_per_sequence"}, {"pg_loss", "kl_loss", "total"},
         _loss),
    Rule("ares", {"difficulty", "correct", "n_he", "lagged_target"}, {"lambda", "reward"}, _paper_reward),
    Rule("ares", {"entropy", "log_prob", "ref_log_prob"}, {"tau_high", "beta_it", "kl_loss"}, _paper_kl,
         params={"window", "rho"}),
]  # fmt: skip
