r"""Dr. GRPO: GRPO without the division by the standard deviation and by the response length (arXiv 2503.20783).

    A_i = R_i - mean_g                         constant over the tokens of response i
    L   = sum over tokens of l / (B L_max)     L_max a constant, the maximal response length

Shapes: R [B], A and the per-token loss l [B, T]. Both divisions that are left out bias GRPO: the one by std towards
prompts of extreme difficulty, the one by |y| towards long wrong answers. Card: papers/baselines.md. Code compared:
volcengine/verl @ b178a3cd5 (`norm_adv_by_std_in_grpo=False`, `seq-mean-token-sum-norm`), huggingface/trl @ f2cd57710.

Set `max_length` to the run's `rollout.max_tokens`; it scales the loss and nothing else.

Presets:
- `paper` and `trl`: divided by B and by the constant.
- `released`: verl: not divided by B, so that the loss grows with the minibatch, and a group of one keeps its reward.
  verl's constant is `loss_scale_factor`, or else the padded length of the batch, which makes the loss depend on
  padding. That default is not offered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from ..core.advantages import Singleton, group_advantage
from ..core.reduce import OVER_CONSTANT, Reduction
from ..core.rollout import Rollout
from ._settings import check, check_choice
from .base import Method


@dataclass(frozen=True)
class DrGRPOConfig:
    """Settings of Dr. GRPO; `max_length` is a number of tokens (3000 in the runs that TRL's documentation cites)."""

    max_length: int = 3000
    reduction: Reduction = "sequence_mean_of_token_sum_over_constant"
    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check(self.max_length > 0, "dr_grpo.max_length", "be positive", self.max_length)
        check_choice(self.reduction, OVER_CONSTANT, "dr_grpo.reduction")
        check_choice(self.singleton, get_args(Singleton), "dr_grpo.singleton")


class DrGRPO(Method):
    """Owner of `advantage` and of the reduction."""

    slug: ClassVar[str] = "dr_grpo"
    requires: tuple[str, ...] = ("reward",)
    config_class: ClassVar[type[DrGRPOConfig]] = DrGRPOConfig
    presets: ClassVar[Mapping[str, DrGRPOConfig]] = {
        "paper": DrGRPOConfig(),
        "trl": DrGRPOConfig(),
        "released": DrGRPOConfig(reduction="token_sum_over_constant", singleton="raw"),
    }

    def __init__(self, config: DrGRPOConfig | None = None) -> None:
        self.config = config or DrGRPOConfig()
        self.reduction = self.config.reduction
        self.reduction_constant = float(self.config.max_length)

    def advantage(self, rollout: Rollout) -> Tensor:
        """Reward minus group mean [B, T]."""
        reward = rollout.require("reward", by=self.slug)
        value_B = group_advantage(reward, rollout.group_id, "none", singleton=self.config.singleton)
        return value_B[:, None].expand(rollout.response_ids.shape)
