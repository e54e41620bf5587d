r"""CANON: compare a response with the other half of its group, split by entropy or length (arXiv 2509.23962).

The G responses of a prompt are sorted by a metric; the first floor(G / 2) are the low half, the rest the high one, with
mean rewards m_- and m_+.

    A_inter = R - (mean of the other half),     A_intra = R - (mean of the own half)
    A = mu A_inter + (1 - mu) A_intra                              no division by a standard deviation

For equal halves A = A_DrGRPO + (2 mu - 1) s (m_+ - m_-) / 2 with s = +1 in the high and -1 in the low half: a bonus for
the half that scored better, Dr. GRPO itself at mu = 1/2, and a bonus for the worse half below [inferred, exact]. In
A_inter one half's rewards may be scaled by alpha, its own and its mean alike, and beta is added in the high and
subtracted in the low half; beta stands in no paper and no released configuration, and counts in A_inter here
[inferred]. Equal rewards give 0 if alpha = 1. A group of one has both means 0 and counts as high, so that A = R.

Shapes: R, metric [B]; A constant over the tokens of a response [B, T]. Metric: the mean over valid tokens of the token
entropy (nats, old policy, training temperature), the number of valid tokens, or any other field or token statistic by
its name. Ties, frequent among lengths, are broken by the content of the responses, never by their place in the batch.
Loss: over B and the constant `max_length`, as Dr. GRPO's; another reduction has no divisor.

mu may follow the mean reward r of the batch, or a cosine of the step that restarts: see `mixing_weight`.

Card: papers/canon.md. Code compared: biuboomc/CANON @ 7d6f814. Its annealing by accuracy has mu = r (intra first); the
direction that the paper reports is commented out. Its alpha scales the long half where lengths are compared and the low
half where entropies are. Its random split goes by place in the batch. Controls: `metric: random` (a seeded split), and
`mu: 0.5` with `scale: 2` (Dr. GRPO twice as large).

Presets: `paper` (entropy, mu = 1 - r), `released` (mu = r, alpha on the low half), `inter`, `intra`, `efficient` (by
length, alpha 0.96 on the long half), `tiny` (`inter` for responses of 32 tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_sums
from ..core.reduce import OVER_CONSTANT, Reduction
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError
from ._draws import DrawingMethod, StepDraws
from ._settings import check, check_choice, check_reduction

Half = Literal["low", "high"]
Schedule = Literal["constant", "accuracy_inter_first", "accuracy_intra_first", "cosine_inter_first",
                   "cosine_intra_first"]  # fmt: skip
FIELDS = {"entropy": "token_entropy", "length": None, "random": None}


def high_half(metric_B: Tensor, group_id_B: Tensor, order_B: Tensor | None = None) -> Tensor:
    """True [B] in the high half of each group; of n responses the first floor(n / 2) by the metric are the low one.

    `order_B`: row indices in the order that breaks ties, else that of the batch. Raises ValueError for a nan metric.
    """
    if bool(metric_B.isnan().any()):
        raise ValueError("the metric of a response is nan: its half is undefined")
    order = torch.arange(len(metric_B), device=metric_B.device) if order_B is None else order_B
    order = order[metric_B[order].argsort(stable=True)]
    order = order[group_id_B[order].argsort(stable=True)]
    sizes = group_sums(torch.ones_like(metric_B), group_id_B)[1][order].long()
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = group_id_B[order][1:] != group_id_B[order][:-1]
    place = torch.arange(len(order), device=order.device)
    rank = place - torch.where(starts, place, 0).cummax(0).values
    high = torch.empty_like(starts)
    high[order] = rank >= sizes // 2
    return high


def half_means(reward_B: Tensor, high_B: Tensor, group_id_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean reward of the low and of the high half of each response's own group, both [B]; 0 for a group of one."""
    high = high_B.to(reward_B.dtype)
    size = group_sums(high, group_id_B)[1]

    def mean(chosen: Tensor) -> Tensor:
        value = group_sums(reward_B * chosen, group_id_B)[0] / group_sums(chosen, group_id_B)[0].clamp_min(1)
        return value.masked_fill(size == 1, 0.0)

    return mean(1 - high), mean(high)


def canon_advantage(
    reward_B: Tensor,
    high_B: Tensor,
    group_id_B: Tensor,
    mu: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    scaled_half: Half = "high",
) -> Tensor:
    """mu A_inter + (1 - mu) A_intra [B]; see the module's head."""
    low_mean, high_mean = half_means(reward_B, high_B, group_id_B)
    scaled = high_B if scaled_half == "high" else ~high_B
    own = torch.where(high_B, high_mean, low_mean)
    other = torch.where(high_B, low_mean, high_mean)
    # the scaled half's rewards, wherever they stand: among the own ones there, as the other half's mean elsewhere
    inter = torch.where(scaled, alpha * reward_B - other, reward_B - alpha * other)
    inter = inter + torch.where(high_B, beta, -beta)
    return mu * inter + (1 - mu) * (reward_B - own)


def cosine_weight(step: int, warmup: int, period: float, low: float, high: float) -> float:
    """high (step + 1) / warmup while warming up, then from `high` to `low` by a cosine, again in every period."""
    if step < warmup:
        return high * (step + 1) / warmup
    phase = math.fmod(step - warmup, period) / period
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * phase))


def mixing_weight(
    schedule: Schedule, mu: float, mean_reward: float, step: int, warmup: int = 30, period: float = 40.0
) -> float:
    """mu of this step: the constant `mu`, or by schedule, with r the mean reward of the batch and w of `cosine_weight`,

    `accuracy_inter_first` 1 - r                    `accuracy_intra_first` r
    `cosine_inter_first` w, from 0.4 to 1           `cosine_intra_first` 1 - w, w from 0 to 0.6
    """
    values = {
        "constant": mu,
        "accuracy_inter_first": 1 - mean_reward,
        "accuracy_intra_first": mean_reward,
        "cosine_inter_first": cosine_weight(step, warmup, period, 0.4, 1.0),
        "cosine_intra_first": 1 - cosine_weight(step, warmup, period, 0.0, 0.6),
    }
    return values[schedule]


@dataclass(frozen=True)
class CANONConfig:
    """`mu` counts where the schedule is constant; `warmup` and `period` are steps of the cosine; `max_length` is a
    number of tokens, which scales the loss and nothing else; `scale` multiplies the advantage."""

    metric: str = "entropy"
    mu: float = 1.0
    schedule: Schedule = "constant"
    warmup: int = 30
    period: float = 40.0
    alpha: float = 1.0
    beta: float = 0.0
    scaled_half: Half = "high"
    scale: float = 1.0
    seed: int = 0
    reduction: Reduction = "sequence_mean_of_token_sum_over_constant"
    max_length: int = 8192

    def __post_init__(self) -> None:
        named = isinstance(self.metric, str) and bool(self.metric)
        check(named, "canon.metric", "name a field or a token statistic", self.metric)
        check(0 <= self.mu <= 1, "canon.mu", "lie in [0, 1]", self.mu)
        check_choice(self.schedule, get_args(Schedule), "canon.schedule")
        check(self.warmup >= 0, "canon.warmup", "not be negative", self.warmup)
        check(self.period > 0, "canon.period", "be positive", self.period)
        check(self.alpha >= 0, "canon.alpha", "not be negative", self.alpha)
        check(math.isfinite(self.beta), "canon.beta", "be finite", self.beta)
        check_choice(self.scaled_half, get_args(Half), "canon.scaled_half")
        check(self.scale > 0, "canon.scale", "be positive", self.scale)
        check(self.max_length > 0, "canon.max_length", "be positive", self.max_length)
        check_reduction(self.reduction, "canon.reduction", self.max_length)


class CANON(DrawingMethod):
    """Owner of `advantage` and of the reduction; `observe` counts the steps."""

    slug: ClassVar[str] = "canon"
    config_class: ClassVar[type[CANONConfig]] = CANONConfig
    presets: ClassVar[Mapping[str, CANONConfig]] = {
        "paper": CANONConfig(schedule="accuracy_inter_first"),
        "released": CANONConfig(schedule="accuracy_intra_first", scaled_half="low"),
        "inter": CANONConfig(),
        "intra": CANONConfig(mu=0.0),
        "efficient": CANONConfig("length", alpha=0.96),
        "tiny": CANONConfig(max_length=32),
    }

    def __init__(self, config: CANONConfig | None = None) -> None:
        self.config = c = config or CANONConfig()
        self.reduction = c.reduction
        self.reduction_constant = float(c.max_length) if c.reduction in OVER_CONSTANT else None
        self.field = FIELDS.get(c.metric, c.metric)
        self.requires = ("reward", *((self.field,) if self.field else ()))
        self.draws = StepDraws(c.seed)
        self._figures: dict[str, float] = {}

    def metric(self, rollout: Rollout) -> Tensor:
        """What responses are sorted by [B]; a token statistic by its mean over valid tokens, 0 for no token.

        Raises UserError where it is nan.
        """
        if self.config.metric == "random":
            return self.draws.per_response(rollout)
        counts = rollout.mask.sum(1)
        if self.field is None:
            return counts.double()
        value = rollout.require(self.field, by=self.slug).double()
        if value.ndim == 2:
            value = value.masked_fill(~rollout.mask, 0.0).sum(1) / counts.clamp_min(1)
        if bool(value.isnan().any()):
            raise UserError(f"methods.canon.metric '{self.config.metric}' is undefined (nan) for some responses")
        return value

    def advantage(self, rollout: Rollout) -> Tensor:
        """A [B, T]."""
        c, reward = self.config, rollout.require("reward", by=self.slug)
        mu = mixing_weight(c.schedule, c.mu, float(reward.mean()), self.draws.step, c.warmup, c.period)
        high = high_half(self.metric(rollout), rollout.group_id, canonical_order(rollout))
        value = c.scale * canon_advantage(reward, high, rollout.group_id, mu, c.alpha, c.beta, c.scaled_half)
        low_mean, high_mean = half_means(reward, high, rollout.group_id)
        self._figures = {"mu": mu, "high_better": float((high_mean - low_mean).mean())}
        return value[:, None].expand(rollout.response_ids.shape)

    def metrics(self) -> dict[str, float]:
        """The step's `mu`, and `high_better`: mean reward of the high halves minus that of the low ones."""
        return dict(self._figures)
