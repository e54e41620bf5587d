"""What the release of ARES computes in place of the paper's reward and KL weight (shawn0728/ARES @ 146620e).

    n      positions whose likeliest token is a trigger word and whose *following* w tokens have a mean entropy of at
           least the threshold
    margin mu = max(least, f_d max(N*, 1)),   D = n - N*,   c = alpha_d cap_d,   sigma(x) = 1 / (1 + exp(-x / tau_d))
    h(x)   = x^2 / (2 kappa_d) up to kappa_d, x - kappa_d / 2 beyond

    easy    right: -min(c, c h([D - mu]+) / (mu + kappa))       wrong: 0.6 c sigma([D - mu]+)
    medium  right: -min(c, c h([|D| - mu]+) / (mu + kappa))     wrong: 0.8 c sigma([D - mu]+)
    hard    right: c sigma(D + mu) where D >= -mu,              wrong: c sigma([D - mu]+)
                   else -min(c, c h(-D - mu) / 2 (mu + kappa))

Since sigma(0) = 1/2, every wrong answer earns at least 0.3 c, 0.4 c or 0.5 c, and alpha near 2 makes a wrong answer
worth more than a right one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.entropy import window_entropy
from ..core.windows import BUCKETS, EASY, HARD, bucket_moments

LEAST_MASS = 1e-12


def head_entropies(top_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy [...] from the log-probs of the likeliest tokens [..., k]: with the missing mass as one more class, and
    without it (the terms of the k tokens as they are, not normalised)."""
    p = top_logprob.exp()
    bare = -(p * top_logprob.clamp_min(torch.finfo(top_logprob.dtype).min)).sum(-1)
    missing = (1 - p.sum(-1)).clamp_min(0.0)
    return bare - missing * missing.clamp_min(LEAST_MASS).log(), bare


def filled_windows(entropy_BT: Tensor, mask_BT: Tensor, window: int) -> Tensor:
    """Means of the following `window` tokens [B, T]; a place without so many gets the mean of the complete ones, and
    the first token's entropy where there is none. This is how the release fills them before it takes a quantile."""
    found = window_entropy(entropy_BT, mask_BT, window, offset=1)
    instead = torch.where(found.isnan().all(1), entropy_BT[:, 0], found.nanmean(1))
    return torch.where(found.isnan(), instead[:, None], found)


@dataclass(frozen=True)
class Grid:
    """Constants of the reward, each for easy, medium and hard."""

    fraction: tuple[float, ...] = (0.15, 0.25, 0.35)
    kappa: tuple[float, ...] = (2.0, 3.0, 4.0)
    temperature: tuple[float, ...] = (2.0, 2.5, 3.0)
    cap: tuple[float, ...] = (1.0, 1.0, 1.2)
    least_margin: float = 1.0


WRONG = (0.6, 0.8, 1.0)
HARD_SHORTFALL = 0.5


def grid_reward(
    count_B: Tensor, target_B: Tensor, alpha_B: Tensor, correct_B: Tensor, bucket_B: Tensor, grid: Grid | None = None
) -> Tensor:
    """The table of the module's head [B], to be added to the accuracy. `target_B` and `alpha_B` are the bucket's."""
    g = grid or Grid()

    def of(values: Sequence[float]) -> Tensor:
        return target_B.new_tensor(values)[bucket_B]

    kappa, delta = of(g.kappa), count_B - target_B
    margin = (of(g.fraction) * target_B.clamp_min(1.0)).clamp_min(g.least_margin)
    cap = alpha_B * of(g.cap)

    def docked(excess: Tensor, share: Tensor | float = 1.0) -> Tensor:
        huber = torch.where(excess <= kappa, excess.square() / (2 * kappa), excess - kappa / 2)
        return -torch.minimum(cap, share * cap * huber / (margin + kappa))

    def bonus(excess: Tensor) -> Tensor:
        return cap * torch.sigmoid(excess / of(g.temperature))

    over = (delta - margin).clamp_min(0.0)
    easy_or_medium = docked(torch.where(bucket_B == EASY, over, (delta.abs() - margin).clamp_min(0.0)))
    hard = torch.where(delta >= -margin, bonus(delta + margin), docked((-delta - margin).clamp_min(0), HARD_SHORTFALL))
    return torch.where(correct_B, torch.where(bucket_B == HARD, hard, easy_or_medium), of(WRONG) * bonus(over))


def rounded_targets(mean: Sequence[float]) -> list[float]:
    """Targets of the buckets: their means, rounded half to even; nan stays nan."""
    return [float(round(value)) if math.isfinite(value) else math.nan for value in mean]


def moved_strengths(
    alpha: Sequence[float], mean: Sequence[float], target: Sequence[float], rate: float = 0.05,
    low: float = 0.0, high: float = 2.0,
) -> list[float]:  # fmt: skip
    """alpha_d + rate (mean - target), the other way for hard, within [low, high]; an empty bucket's stays.

    The target is the rounded mean itself, so that alpha drifts by the rounding error alone.
    """
    signs = [-1.0 if kind == HARD else 1.0 for kind in range(len(BUCKETS))]
    return [
        min(max(a + sign * rate * (m - t), low), high) if math.isfinite(m) else a
        for a, m, t, sign in zip(alpha, mean, target, signs, strict=True)
    ]


class BucketKLController:
    """One KL weight for each bucket, moved so that the bucket's mean KL approaches a target.

        m <- decay m + (1 - decay) KL    (the KL itself at first),     e = m / target - 1
        every `interval` calls, unless |e| < dead_zone:   s <- decay s + (1 - decay) e,
                                                           ln beta <- ln beta + rate clip(s, -clip, clip)

    An absent bucket is passed over. beta moves by a factor of exp(rate clip) per `interval` calls at most.
    """

    def __init__(
        self, target: float = 0.01, interval: int = 100, rate: float = 0.05, clip: float = 0.2, decay: float = 0.97,
        dead_zone: float = 0.02, initial: float = 1.0, low: float = 1e-4, high: float = 100.0,
    ) -> None:  # fmt: skip
        self.target, self.interval, self.rate, self.clip = target, interval, rate, clip
        self.decay, self.dead_zone, self.low, self.high = decay, dead_zone, low, high
        self.beta = [initial] * len(BUCKETS)
        self.mean: list[float | None] = [None] * len(BUCKETS)
        self.smoothed = [0.0] * len(BUCKETS)
        self.calls = 0

    def update(self, kl_B: Tensor, bucket_B: Tensor) -> None:
        """Take in the mean KL of single responses, and move the weights where their turn has come."""
        self.calls += 1
        means, _ = bucket_moments(kl_B, bucket_B)
        for kind, value in enumerate(means.tolist()):
            if math.isfinite(value):
                self._one(kind, value)

    def _one(self, kind: int, value: float) -> None:
        before = self.mean[kind]
        mean = value if before is None else self.decay * before + (1 - self.decay) * value
        self.mean[kind] = mean
        error = mean / self.target - 1
        if abs(error) < self.dead_zone or self.calls % self.interval:
            return
        self.smoothed[kind] = smoothed = self.decay * self.smoothed[kind] + (1 - self.decay) * error
        moved = self.beta[kind] * math.exp(self.rate * min(max(smoothed, -self.clip), self.clip))
        self.beta[kind] = min(max(moved, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averages and the number of calls."""
        return {"beta": list(self.beta), "mean": list(self.mean), "smoothed": list(self.smoothed), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.beta, self.smoothed = [float(x) for x in state["beta"]], [float(x) for x in state["smoothed"]]
        self.mean = [None if x is None else float(x) for x in state["mean"]]
        self.calls = int(state["calls"])
