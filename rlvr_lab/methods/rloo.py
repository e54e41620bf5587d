r"""RLOO: every response is judged against the mean of the others (arXiv 2402.14740).

    A_i = R_i - sum_{j != i} R_j / (G - 1) = G / (G - 1) * (R_i - mean_g)

Shapes: R [B]; A [B, T], constant over the tokens of a response. The baseline does not contain R_i, so the gradient is
unbiased; apart from G / (G - 1) it is Dr. GRPO's. Card: papers/baselines.md. Code compared: volcengine/verl @
b178a3cd5, OpenRLHF/OpenRLHF @ 3c3be623. The paper's loss is plain REINFORCE with a KL term in the reward: compose
`rloo` with `gpg`, and with `kl_reference` (TRL's documentation: beta 0.03, G of 2 to 4).

Presets: `paper` gives a group of one advantage 0, for the formula has no value there; `released` keeps its reward, as
verl does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from ..core.advantages import Singleton, rloo_advantage
from ..core.rollout import Rollout
from ._settings import check_choice
from .base import Method


@dataclass(frozen=True)
class RLOOConfig:
    """Settings of RLOO: what a group of one gets."""

    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check_choice(self.singleton, get_args(Singleton), "rloo.singleton")


class RLOO(Method):
    """Owner of `advantage`."""

    slug: ClassVar[str] = "rloo"
    requires: tuple[str, ...] = ("reward",)
    config_class: ClassVar[type[RLOOConfig]] = RLOOConfig
    presets: ClassVar[Mapping[str, RLOOConfig]] = {"paper": RLOOConfig(), "released": RLOOConfig("raw")}

    def __init__(self, config: RLOOConfig | None = None) -> None:
        self.config = config or RLOOConfig()

    def advantage(self, rollout: Rollout) -> Tensor:
        """Leave-one-out advantage [B, T]."""
        reward = rollout.require("reward", by=self.slug)
        value_B = rloo_advantage(reward, rollout.group_id, self.config.singleton)
        return value_B[:, None].expand(rollout.response_ids.shape)
