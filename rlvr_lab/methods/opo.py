r"""OPO: the baseline that minimises gradient variance, a length-weighted mean reward (arXiv 2505.23585).

    A_i = R_i - sum_j L_j R_j / sum_j L_j          over the group of i; L_j tokens in response j; no standard deviation

Shapes: R, L [B]; A [B, T], constant over the tokens of a response. The weight is the squared gradient norm of a
response, taken to be proportional to its length. Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5.
The paper trains strictly on-policy: one optimizer minibatch per rollout.

Presets: `paper` follows the formula, by which a group of one has advantage 0; `released` keeps its reward, as verl
does (baseline 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from ..core.advantages import Singleton, opo_advantage
from ..core.rollout import Rollout
from ._settings import check_choice
from .base import Method


@dataclass(frozen=True)
class OPOConfig:
    """Settings of OPO: what a group of one gets."""

    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check_choice(self.singleton, get_args(Singleton), "opo.singleton")


class OPO(Method):
    """Owner of `advantage`."""

    slug: ClassVar[str] = "opo"
    requires: tuple[str, ...] = ("reward",)
    config_class: ClassVar[type[OPOConfig]] = OPOConfig
    presets: ClassVar[Mapping[str, OPOConfig]] = {"paper": OPOConfig(), "released": OPOConfig("raw")}

    def __init__(self, config: OPOConfig | None = None) -> None:
        self.config = config or OPOConfig()

    def advantage(self, rollout: Rollout) -> Tensor:
        """Reward minus length-weighted baseline [B, T]; the length counts the tokens that the policy chose."""
        reward = rollout.require("reward", by=self.slug)
        value_B = opo_advantage(reward, rollout.mask.sum(1), rollout.group_id, self.config.singleton)
        return value_B[:, None].expand(rollout.response_ids.shape)
