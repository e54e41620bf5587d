"""Settings of ARES, and what it reads from a rollout with them: difficulty, threshold, events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_range, group_sums
from ..core.entropy import window_entropy
from ..core.rollout import Rollout
from ..core.windows import (
    Over,
    bucket_moments,
    difficulty_buckets,
    pooled_threshold,
    row_quantiles,
    window_events,
)
from ..errors import UserError
from ._ares_code import filled_windows
from ._draws import StepDraws
from ._settings import check, check_choice

Count = Literal["window", "trigger", "semantic"]
ThetaOf = Literal["token", "window", "filled"]
Shaping = Literal["main", "code", "none", "appendix"]
TRIGGER, HEAD, BARE = "ares.trigger", "ares.head", "ares.bare"
"""Of the release's count: 1 where the likeliest token is a trigger word, and two entropies of the ten likeliest."""


@dataclass(frozen=True)
class ARESConfig:
    """Settings: `target_decay` and `theta_decay` weigh what was before in the averages over steps; 0 is the last value.
    `largest` bounds lambda; null does not."""

    window: int = 4
    quantile: float = 0.95
    count: Count = "window"
    trigger_words: Sequence[str] = ()
    theta_of: ThetaOf = "token"
    theta_over: Over = "mean"
    theta_decay: float = 0.0
    inclusive: bool = False
    reward: Shaping = "main"
    order: Literal["difficulty_first", "released"] = "difficulty_first"
    target: Literal["lagged", "batch"] = "lagged"
    target_decay: float = 0.0
    largest: float | None = 1.0
    eps: float = 1e-6
    kl: Literal["none", "windows", "buckets"] = "windows"
    coefficient: float = 0.01
    rho: float = 0.5
    beta_easy: float = 1.0
    beta_medium: float = 1.0
    beta_hard: float = 1.0
    kl_target: float = 0.01
    kl_interval: int = 100
    limit: bool = False
    filter: Literal["accuracy", "reward", "none"] = "accuracy"
    max_batches: int = 20
    control: Literal["none", "permuted"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("window", "kl_interval", "max_batches"):
            check(getattr(self, name) >= 1, f"ares.{name}", "be at least 1", getattr(self, name))
        for name in ("theta_decay", "target_decay"):
            check(0 <= getattr(self, name) < 1, f"ares.{name}", "lie in [0, 1)", getattr(self, name))
        for name in ("coefficient", "beta_easy", "beta_medium", "beta_hard"):
            check(getattr(self, name) >= 0, f"ares.{name}", "not be negative", getattr(self, name))
        check(0 < self.quantile < 1, "ares.quantile", "lie between 0 and 1", self.quantile)
        check(0 < self.rho <= 1, "ares.rho", "lie in (0, 1]", self.rho)
        check(self.eps > 0, "ares.eps", "be positive", self.eps)
        check(self.kl_target > 0, "ares.kl_target", "be positive", self.kl_target)
        check(self.largest is None or self.largest >= 0, "ares.largest", "not be negative, or null", self.largest)
        listed = isinstance(self.trigger_words, (list, tuple))
        words = listed and all(isinstance(word, str) and word for word in self.trigger_words)
        check(words, "ares.trigger_words", "be a list of texts", self.trigger_words)

    def _check_choices(self) -> None:
        if self.reward == "appendix":
            raise UserError(
                "methods.ares.reward 'appendix' has no form: the paper does not state S_d, phi, b and Z of its "
                "Algorithm 1; choose main or code (theta_over: group and inclusive: true are the appendix's events)"
            )
        check_choice(self.count, get_args(Count), "ares.count")
        check_choice(self.theta_of, get_args(ThetaOf), "ares.theta_of")
        check_choice(self.theta_over, get_args(Over), "ares.theta_over")
        check_choice(self.reward, ("main", "code", "none"), "ares.reward")
        check_choice(self.order, ("difficulty_first", "released"), "ares.order")
        check_choice(self.target, ("lagged", "batch"), "ares.target")
        check_choice(self.kl, ("none", "windows", "buckets"), "ares.kl")
        check_choice(self.filter, ("accuracy", "reward", "none"), "ares.filter")
        check_choice(self.control, ("none", "permuted"), "ares.control")
        grouped = self.theta_over == "group" and self.theta_decay > 0
        check(not grouped, "ares.theta_decay", "be 0 where theta_over is group", self.theta_decay)


@dataclass(frozen=True)
class Seen:
    """What one generation batch showed. Per response [B]: bucket, number of events, threshold, weight in the means;
    events [B, T]; mean and variance of the number of events by bucket, nan for an empty one."""

    ids: Tensor
    bucket: Tensor
    event: Tensor
    count: Tensor
    theta: Tensor
    weight: Tensor
    mean: list[float]
    variance: list[float]


def look(rollout: Rollout, config: ARESConfig, words: Sequence[int], theta: float | None, draws: StepDraws) -> Seen:
    """Difficulty first, then events, then the means of the buckets. `theta` is the threshold of earlier steps."""
    bucket = difficulty_buckets(rollout.require("correct", by="ares"), rollout.group_id)
    if config.control == "permuted":
        bucket = permuted_labels(bucket, rollout, draws)
    threshold = _threshold(rollout, config, theta)
    event = _events(rollout, config, words, threshold) & rollout.mask
    count = event.sum(1).double()
    # the release takes means over prompts, the paper over responses
    weight = 1 / group_sums(torch.ones_like(count), rollout.group_id)[1]
    weight = weight if config.reward == "code" else torch.ones_like(count)
    mean, variance = bucket_moments(count, bucket, weight)
    return Seen(rollout.response_ids, bucket, event, count, threshold, weight, mean.tolist(), variance.tolist())


def _threshold(rollout: Rollout, c: ARESConfig, before: float | None) -> Tensor:
    mask = rollout.mask
    entropy = rollout.require(BARE if c.count == "trigger" else "token_entropy", by="ares").detach()
    if c.theta_of == "window":
        entropy = window_entropy(entropy, mask, c.window, offset=int(c.count == "trigger"))
        mask = mask & ~entropy.isnan()
    elif c.theta_of == "filled":
        entropy = filled_windows(entropy, mask, c.window)
    own = pooled_threshold(row_quantiles(entropy, mask, c.quantile), rollout.group_id, c.theta_over)
    if before is None or not c.theta_decay:
        return own
    blended = c.theta_decay * before + (1 - c.theta_decay) * own
    return torch.where(own.isnan(), before, blended)


def _events(rollout: Rollout, c: ARESConfig, words: Sequence[int], theta_B: Tensor) -> Tensor:
    entropy = rollout.require(HEAD if c.count == "trigger" else "token_entropy", by="ares").detach()
    if c.count == "semantic":
        word = torch.isin(rollout.response_ids, rollout.response_ids.new_tensor(list(words)))
        return word & (entropy >= theta_B[:, None])
    following = c.count == "trigger"
    event = window_events(window_entropy(entropy, rollout.mask, c.window, int(following)), theta_B, c.inclusive)
    return event & rollout.require(TRIGGER, by="ares").bool() if following else event


def permuted_labels(bucket_B: Tensor, rollout: Rollout, draws: StepDraws) -> Tensor:
    """Every prompt with the label of another one [B], dealt anew in each step whatever the order of the rows."""
    key = torch.stack([rollout.prompt_id, rollout.group_id])
    _, group = torch.unique(key, dim=1, return_inverse=True)
    drawn, _ = group_range(draws.per_response(rollout).double(), group)
    label = bucket_B.new_zeros(int(group.max()) + 1).scatter(0, group, bucket_B)
    order = drawn.new_zeros(len(label)).scatter(0, group, drawn).argsort()
    return torch.empty_like(label).scatter(0, order, label)[group]
