r"""GRPO: group-relative advantages under a clipped importance ratio (DeepSeekMath, arXiv 2402.03300).

For a group g of G responses to one prompt with rewards R_i, and r the importance ratio of a token:

    A_i = (R_i - mean_g) / (std_g + eps)                                    constant over the tokens of response i
    l   = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))                minimised; for A < 0 at most -A dual_clip
    L   = sum over tokens of weight * l                                     the weights come from the reduction

Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5, huggingface/trl @ f2cd57710.

Presets:
- `paper`: averages within a response first, no dual clip. The paper does not say which standard deviation it means;
  the sample one is used, as verl and TRL do. Its KL term to a reference policy (0.04) is a separate regulariser.
- `released`: verl's defaults: token mean over the minibatch, dual clip 3, eps 1e-6.
- `tiny`: the tiny lab's measured recipe: token mean, eps 1e-4, no dual clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.advantages import Std, group_advantage
from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import REDUCTIONS, Reduction
from ..core.rollout import Rollout
from ..errors import UserError
from .base import LossInputs, Method


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO. `clip_low` and `clip_high` are distances from 1; `reduction_constant` is a length in tokens."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    std: Std = "sample"
    eps: float = 1e-6
    reduction: Reduction = "token_mean"
    reduction_constant: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise UserError(f"methods.grpo.clip_low must lie in [0, 1], not {self.clip_low}")
        if self.clip_high < 0:
            raise UserError(f"methods.grpo.clip_high must not be negative, not {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"methods.grpo.dual_clip must be above 1 or null, not {self.dual_clip}")
        if self.std not in ("sample", "population", "none"):
            raise UserError(f"methods.grpo.std must be sample, population or none, not '{self.std}'")
        if self.reduction not in REDUCTIONS:
            raise UserError(f"methods.grpo.reduction must be one of {', '.join(REDUCTIONS)}, not '{self.reduction}'")
        if self.reduction == "sequence_mean_of_token_sum_over_constant" and not self.reduction_constant:
            raise UserError("methods.grpo.reduction_constant is needed by that reduction: the maximal response length")


class GRPO(Method):
    """Owner of `advantage`, `clip` and `surrogate`."""

    slug: ClassVar[str] = "grpo"
    requires: ClassVar[tuple[str, ...]] = ("reward", "old_logprob")
    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    presets: ClassVar[Mapping[str, GRPOConfig]] = {
        "paper": GRPOConfig(reduction="sequence_mean_of_token_mean"),
        "released": GRPOConfig(dual_clip=3.0),
        "tiny": GRPOConfig(eps=1e-4),
    }

    def __init__(self, config: GRPOConfig | None = None) -> None:
        self.config = config or GRPOConfig()
        self.reduction = self.config.reduction
        self.reduction_constant = self.config.reduction_constant

    def advantage(self, rollout: Rollout) -> Tensor:
        """Group-relative advantage, the same on every token of a response [B, T]."""
        reward = rollout.require("reward", by=self.slug)
        value_B = group_advantage(reward, rollout.group_id, self.config.std, self.config.eps)
        return value_B[:, None].expand(rollout.response_ids.shape)

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant bounds 1 - clip_low and 1 + clip_high."""
        device = advantage_BT.device
        return torch.tensor(1 - self.config.clip_low, device=device), torch.tensor(
            1 + self.config.clip_high, device=device
        )

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate of core.losses."""
        return clipped_surrogate(
            inputs.logprob,
            inputs.old_logprob,
            inputs.advantage,
            inputs.lower,
            inputs.upper,
            self.config.dual_clip,
        )
