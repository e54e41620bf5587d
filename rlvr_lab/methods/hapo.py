r"""HAPO: token entropy as one signal for temperature, advantage and clip range (arXiv 2509.16591, heterogeneous).

    L = log max(H, 1e-8);  Q = the rho-quantile of L (nearest rank);  h = (L - Q) / RMS(L - Q)
    h~ = h / max h  where h > 0,   h / |min h|  elsewhere                             in [-1, 1], 0 at the pivot

over the valid tokens of the minibatch, without gradient. H: entropy in nats; all [B, T]. Four parts, each a switch:

  A  temperature   T = T_base (1 + tau clip(h~, -1, 1)) of every token while it is sampled, from the entropy of its own
                   distribution at T_base (the card's T_base is 1), with pivot and scales of the previous rollout;
                   T_base in the first step
  B  advantage     every token carries its response's reward; A = (r - mean) / (population std + 1e-6) over the tokens
                   of the group; where some |A| >= 5 the group falls back to GRPO's advantage
  C  redistribute  A (1 + h~) where h~ > 0 and r lies outside the zone [1 - eps_low/2, 1 + eps_high/2], and where
                   h~ <= 0 and r lies inside it
  D  clip          lower 1 - eps_low (1 - h~) where h~ <= 0,   upper 1 + eps_high (1 + h~) where h~ > 0

Card: papers/hapo.md. Code compared: starriver030515/HAPO @ 7671dde. The release divides h <= 0 by the *negative*
minimum, so its h~ lies in [0, 1] and the most certain token counts like the most uncertain one (`sign: released`);
`signed` is what the text describes [inferred]. Its zone uses the adapted ranges and open bounds, its statistics a
micro-batch. Old log-probs are those of the base temperature, as in the release: the tempered sampler is not corrected
for (`truncated_importance_sampling` does). The transformers engine records both while it samples.

Presets: `paper` (signed, 0.2 / 0.28, tau 0.1), `released` (its sign, 0.2 / 0.2, tau 0.05), `signed` (released settings
with the text's sign), `tiny` (paper with the temperature off).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.advantages import group_advantage, group_sums
from ..core.losses import Surrogate, clipped_surrogate, importance_ratio
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..core.temperature import TemperatureRule
from ._settings import check, check_choice
from .base import LossInputs, Method

LEAST = 1e-8
Sign = Literal["signed", "released"]


@dataclass(frozen=True)
class EntropyScale:
    """Statistics of log-entropies from which h~ is made: pivot, spread about it, and the two extremes of h."""

    pivot: float
    spread: float
    highest: float
    lowest: float

    def apply(self, entropy: Tensor, sign: Sign = "signed") -> Tensor:
        """h~ of entropies of any shape; beyond [-1, 1] where an entropy lies outside the range that was measured."""
        h = (entropy.clamp_min(LEAST).log() - self.pivot) / self.spread
        below = -self.lowest if sign == "signed" else self.lowest
        return torch.where(h > 0, h / self.highest, h / below)


def entropy_scale(entropy_BT: Tensor, mask_BT: Tensor, quantile: float = 0.8) -> EntropyScale | None:
    """The statistics over the marked tokens; None where there is none. The rank is rounded half to even."""
    logs = entropy_BT[mask_BT].clamp_min(LEAST).log()
    if not len(logs):
        return None
    pivot = logs.sort().values[round(quantile * (len(logs) - 1))]
    distance = logs - pivot
    spread = distance.square().mean().clamp_min(LEAST).sqrt()
    h = distance / spread
    return EntropyScale(float(pivot), float(spread), max(float(h.max()), LEAST), min(float(h.min()), -LEAST))


def scaled_entropy(entropy_BT: Tensor, mask_BT: Tensor, quantile: float = 0.8, sign: Sign = "signed") -> Tensor:
    """h~ [B, T] with the statistics of the same tokens; 0 outside the mask."""
    scale = entropy_scale(entropy_BT, mask_BT, quantile)
    if scale is None:
        return torch.zeros_like(entropy_BT)
    return scale.apply(entropy_BT, sign).masked_fill(~mask_BT, 0.0)


def adaptive_temperature(scaled: Tensor, base: float, tau: float) -> Tensor:
    """Part A: base (1 + tau clip(h~, -1, 1)), of any shape."""
    return base * (1 + tau * scaled.clamp(-1.0, 1.0))


def token_group_advantage(
    reward_B: Tensor, group_id_B: Tensor, mask_BT: Tensor, eps: float = 1e-6, limit: float = 5.0
) -> Tensor:
    """Part B [B, T]: rewards normalised over the tokens of the group. A padded place counts as a token of reward 0 in
    the test against `limit` and nowhere else, as in the release. Sums to 0 over a group's tokens."""
    tokens_B = mask_BT.sum(1).to(reward_B.dtype)
    count = group_sums(tokens_B, group_id_B)[0].clamp_min(1)
    mean = group_sums(reward_B * tokens_B, group_id_B)[0] / count
    spread = (group_sums((reward_B - mean).square() * tokens_B, group_id_B)[0] / count).sqrt()
    token_reward = reward_B[:, None] * mask_BT
    value = (token_reward - mean[:, None]) / (spread[:, None] + eps)
    large = (value.abs() >= limit).any(1).to(reward_B.dtype)
    falls_back = group_sums(large, group_id_B)[0] > 0
    fallback = group_advantage(reward_B, group_id_B, "sample", eps, "raw")[:, None] * mask_BT
    return torch.where(falls_back[:, None], fallback, value)


def adaptive_ranges(scaled_BT: Tensor, low: float, high: float, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Part D: distances of the bounds from 1, below and above, each [B, T]."""
    below = torch.where(scaled_BT <= 0, low * (1 - alpha * scaled_BT), torch.full_like(scaled_BT, low))
    above = torch.where(scaled_BT > 0, high * (1 + alpha * scaled_BT), torch.full_like(scaled_BT, high))
    return below, above


def redistribution(
    scaled_BT: Tensor,
    ratio_BT: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    beta: float = 1.0,
    closed: bool = True,
) -> Tensor:
    """Part C: factors of the advantage [B, T]; `low` and `high` are the clip distances whose half bounds the zone."""
    bottom, top = 1 - low / 2, 1 + high / 2
    inside = (ratio_BT >= bottom) & (ratio_BT <= top) if closed else (ratio_BT > bottom) & (ratio_BT < top)
    changes = torch.where(scaled_BT > 0, ~inside, inside)
    return torch.where(changes, 1 + beta * scaled_BT, torch.ones_like(scaled_BT))


@dataclass(frozen=True)
class HAPOConfig:
    """Settings. `tau`, `alpha` and `beta` of 0 switch parts A, D and C off, `token_advantage: false` part B."""

    sign: Sign = "signed"
    quantile: float = 0.8
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    tau: float = 0.1
    token_advantage: bool = True
    beta: float = 1.0
    alpha: float = 1.0
    adapted_zone: bool = False
    """The release's neutral zone: half of the adapted ranges, bounds excluded."""

    def __post_init__(self) -> None:
        check_choice(self.sign, ("signed", "released"), "hapo.sign")
        check(0 <= self.quantile <= 1, "hapo.quantile", "lie in [0, 1]", self.quantile)
        check(0 <= self.clip_low <= 0.5, "hapo.clip_low", "lie in [0, 0.5], since it may double", self.clip_low)
        check(self.clip_high >= 0, "hapo.clip_high", "not be negative", self.clip_high)
        check(self.dual_clip is None or self.dual_clip > 1, "hapo.dual_clip", "be above 1 or null", self.dual_clip)
        check(0 <= self.tau < 1, "hapo.tau", "lie in [0, 1)", self.tau)
        check(0 <= self.alpha <= 1, "hapo.alpha", "lie in [0, 1]", self.alpha)
        check(0 <= self.beta <= 1, "hapo.beta", "lie in [0, 1]", self.beta)


class HAPO(Method):
    """Owns `clip`, `surrogate` and the reduction, with part B also `advantage`; part C is a `weight`."""

    slug: ClassVar[str] = "hapo"
    requires: tuple[str, ...] = ("reward", "old_logprob", "token_entropy")
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[HAPOConfig]] = HAPOConfig
    presets: ClassVar[Mapping[str, HAPOConfig]] = {
        "paper": HAPOConfig(),
        "released": HAPOConfig("released", clip_high=0.2, tau=0.05, adapted_zone=True),
        "signed": HAPOConfig(clip_high=0.2, tau=0.05),
        "tiny": HAPOConfig(tau=0.0),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: HAPOConfig | None = None) -> None:
        self.config = config or HAPOConfig()
        self.scale: EntropyScale | None = None
        self._used: dict[str, Tensor] = {}

    def has(self, hook: str) -> bool:
        """Part B off leaves the advantage to the base; part A off tempers nothing."""
        off = {"advantage": not self.config.token_advantage, "temper": not self.config.tau}
        return super().has(hook) and not off.get(hook, False)

    def temper(self) -> TemperatureRule | None:
        """Part A: h~ is linear in log H on each side of the pivot, so three knots say it; None before a rollout."""
        s, tau = self.scale, self.config.tau
        if s is None or not tau:
            return None
        lowest = 1 - tau if self.config.sign == "signed" else 1 + tau
        knots = s.pivot + s.spread * s.lowest, s.pivot, s.pivot + s.spread * s.highest
        return TemperatureRule(knots, (lowest, 1.0, 1 + tau))

    def filter(self, rollout: Rollout) -> Rollout:
        """Changes nothing; takes the statistics that the next step's sampler will use. Of several generation batches
        the last one's stand."""
        entropy, mask = rollout.require("token_entropy", by=self.slug), rollout.mask
        self.scale = entropy_scale(entropy, mask, self.config.quantile) or self.scale
        used = rollout.behaviour_temperature[mask]
        if len(used):
            self._used = {"temperature": used.mean(), "temperature_min": used.min(), "temperature_max": used.max()}
        return rollout

    def metrics(self) -> dict[str, float]:
        """Temperatures that the step's tokens were sampled at, where part A is on."""
        return {name: float(value) for name, value in self._used.items()} if self.config.tau else {}

    def advantage(self, rollout: Rollout) -> Tensor:
        """Part B."""
        return token_group_advantage(rollout.require("reward", by=self.slug), rollout.group_id, rollout.mask)

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`hapo.scaled`: h~ [B, T] of the current policy, over the minibatch."""
        entropy = batch.require("current_entropy", by=self.slug).detach()
        return {"hapo.scaled": scaled_entropy(entropy, batch.mask, self.config.quantile, self.config.sign)}

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Part D."""
        below, above = self._ranges(batch)
        return 1 - below, 1 + above

    def _ranges(self, batch: Rollout) -> tuple[Tensor, Tensor]:
        scaled, c = batch.require("hapo.scaled", by=self.slug), self.config
        return adaptive_ranges(scaled, c.clip_low, c.clip_high, c.alpha)

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """Part C as a factor of the surrogate, which is linear in the advantage's size; the sign never changes."""
        c = self.config
        logprob, old = (
            batch.require(name, by=self.slug).detach().masked_fill(~batch.mask, 0.0)
            for name in ("current_logprob", "old_logprob")
        )
        ranges: Any = self._ranges(batch) if c.adapted_zone else (c.clip_low, c.clip_high)
        scaled = batch.require("hapo.scaled", by=self.slug)
        return redistribution(scaled, importance_ratio(logprob, old), ranges[0], ranges[1], c.beta, not c.adapted_zone)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate with dual clip."""
        return clipped_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper, self.config.dual_clip
        )

    def state_dict(self) -> dict[str, Any]:
        """The statistics for the next sampler."""
        return {} if self.scale is None else {"scale": list(vars(self.scale).values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the statistics of a checkpoint."""
        self.scale = EntropyScale(*state["scale"]) if state else None
