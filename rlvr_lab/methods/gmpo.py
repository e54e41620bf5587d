r"""GMPO: the geometric mean of token ratios, each clipped on the side where it would run away (arXiv 2507.20673).

    x_t = log pi - log pi_old
    d_t = min(x_t, clip_high) for A > 0,   max(x_t, -clip_low) for A < 0
    l_i = -A_i exp(mean over the tokens of i of d_t)                          averaged over the responses

Shapes: x, d [B, T]; l per response, carried on every token. The clip range is one of log-ratios. Card:
papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5 `compute_policy_loss_geo_mean`, which also counts empty
responses in the average; here they have no weight.

Presets: `paper` and `released` (callsys/GMPO) clip the ratio to [e^-0.4, e^0.4] [secondary]; `verl` uses its default
clip range 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.losses import Surrogate, gmpo_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._settings import bounds, check
from .base import LossInputs, Method


@dataclass(frozen=True)
class GMPOConfig:
    """Settings of GMPO: distances of the log-ratio from 0, in nats."""

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        check(self.clip_low >= 0, "gmpo.clip_low", "not be negative", self.clip_low)
        check(self.clip_high >= 0, "gmpo.clip_high", "not be negative", self.clip_high)


class GMPO(Method):
    """Owner of `clip`, `surrogate` and the reduction, which the definition fixes."""

    slug: ClassVar[str] = "gmpo"
    requires: tuple[str, ...] = ("old_logprob",)
    config_class: ClassVar[type[GMPOConfig]] = GMPOConfig
    presets: ClassVar[Mapping[str, GMPOConfig]] = {
        "paper": GMPOConfig(),
        "released": GMPOConfig(),
        "verl": GMPOConfig(0.2, 0.2),
    }
    reduction: Reduction | None = "sequence_mean_of_token_mean"

    def __init__(self, config: GMPOConfig | None = None) -> None:
        self.config = config or GMPOConfig()

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the token ratio: e^-clip_low and e^clip_high."""
        return bounds(math.exp(-self.config.clip_low), math.exp(self.config.clip_high), advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """Geometric mean of the clipped ratios."""
        return gmpo_surrogate(
            inputs.logprob,
            inputs.old_logprob,
            inputs.advantage,
            inputs.rollout.mask,
            -inputs.lower.log(),
            inputs.upper.log(),
        )
