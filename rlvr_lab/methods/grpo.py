r"""GRPO: group-relative advantages under a clipped importance ratio (DeepSeekMath, arXiv 2402.03300).

For a group g of G responses to one prompt with rewards R_i, and r the importance ratio of a token:

    A_i = (R_i - mean_g) / (std_g + eps)                                    constant over the tokens of response i
    l   = max(-A min(r, delta), -A clip(r, 1 - clip_low, 1 + clip_high))    minimised; for A < 0 at most -A dual_clip
    L   = sum over tokens of weight * l                                     the weights come from the reduction

Shapes: R [B], A, r, l [B, T]; log-probabilities in nats. Card: papers/baselines.md. Code compared: volcengine/verl @
b178a3cd5, huggingface/trl @ f2cd57710. This is the base of every composition: another method that owns one of its
hooks takes that hook over.

Presets:
- `paper`: averages within a response first, no dual clip, a group of one learns nothing. The paper does not say which
  standard deviation it means; the sample one is used, as verl and TRL do. It holds no KL term: the paper's algorithm is
  the composition of `grpo` with `kl_reference` (preset `paper`: k3, beta 0.04).
- `released`: verl's defaults: token mean over the minibatch, dual clip 3, eps 1e-6, a group of one keeps its reward.
- `trl`: TRL's defaults: token mean, eps 1e-4, no dual clip. Its `scale_rewards="batch"` is `std: batch`.
- `tiny`: the tiny lab's measured recipe: token mean, eps 1e-4, no dual clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from ..core.advantages import Singleton, Std, group_advantage
from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._settings import bounds, check, check_choice, check_reduction
from .base import LossInputs, Method


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO. `clip_low` and `clip_high` are distances from 1; `reduction_constant` is a length in tokens."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    """TRL's two-sided bound of the unclipped branch."""
    std: Std = "sample"
    eps: float = 1e-6
    singleton: Singleton = "zero"
    reduction: Reduction = "token_mean"
    reduction_constant: float | None = None

    def __post_init__(self) -> None:
        check(0 <= self.clip_low <= 1, "grpo.clip_low", "lie in [0, 1]", self.clip_low)
        check(self.clip_high >= 0, "grpo.clip_high", "not be negative", self.clip_high)
        check(self.dual_clip is None or self.dual_clip > 1, "grpo.dual_clip", "be above 1 or null", self.dual_clip)
        top = 1 + self.clip_high
        check(self.delta is None or self.delta > top, "grpo.delta", "be above 1 + clip_high or null", self.delta)
        check_choice(self.std, get_args(Std), "grpo.std")
        check(self.eps > 0, "grpo.eps", "be positive", self.eps)
        check_choice(self.singleton, get_args(Singleton), "grpo.singleton")
        check_reduction(self.reduction, "grpo.reduction", self.reduction_constant)


class GRPO(Method):
    """The base: owner of `advantage`, `clip`, `surrogate` and the reduction, unless another method takes one over."""

    slug: ClassVar[str] = "grpo"
    is_base: ClassVar[bool] = True
    requires: tuple[str, ...] = ("reward", "old_logprob")
    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    presets: ClassVar[Mapping[str, GRPOConfig]] = {
        "paper": GRPOConfig(reduction="sequence_mean_of_token_mean"),
        "released": GRPOConfig(dual_clip=3.0, singleton="raw"),
        "trl": GRPOConfig(eps=1e-4),
        "tiny": GRPOConfig(eps=1e-4),
    }

    def __init__(self, config: GRPOConfig | None = None) -> None:
        self.config = config or GRPOConfig()
        self.reduction = self.config.reduction
        self.reduction_constant = self.config.reduction_constant

    def advantage(self, rollout: Rollout) -> Tensor:
        """Group-relative advantage, the same on every token of a response [B, T]."""
        reward, c = rollout.require("reward", by=self.slug), self.config
        value_B = group_advantage(reward, rollout.group_id, c.std, c.eps, c.singleton)
        return value_B[:, None].expand(rollout.response_ids.shape)

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant bounds 1 - clip_low and 1 + clip_high."""
        return bounds(1 - self.config.clip_low, 1 + self.config.clip_high, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate of core.losses, within whatever bounds the owner of `clip` set."""
        return clipped_surrogate(
            inputs.logprob,
            inputs.old_logprob,
            inputs.advantage,
            inputs.lower,
            inputs.upper,
            self.config.dual_clip,
            self.config.delta,
        )
