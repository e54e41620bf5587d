r"""GSPO: one importance ratio per sequence, and clipping of whole sequences (Qwen, arXiv 2507.18071).

    s_i = exp(mean over the tokens of i of (log pi - log pi_old))
    l_i = max(-A_i s_i, -A_i clip(s_i, 1 - clip_low, 1 + clip_high))       averaged over the non-empty responses

Shapes: s, l per response, carried on every token [B, T]; each token has the gradient -A_i s_i / |y_i|, or none where
its sequence is clipped. The ratio is a geometric mean, so it lies close to 1 and the range is narrow. Card:
papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5, huggingface/trl @ f2cd57710 (ratio of shape [B, 1],
same value and gradient).

Presets: `paper` has no limit on s; `released` is verl, which limits log s to at most 10, from above only. Both are
averaged over sequences: verl ignores the aggregation that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.losses import Surrogate, gspo_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._settings import bounds, check
from .base import LossInputs, Method


@dataclass(frozen=True)
class GSPOConfig:
    """Settings of GSPO: distances of the sequence ratio from 1, and the limit of its logarithm or null."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    log_limit: float | None = None

    def __post_init__(self) -> None:
        check(0 <= self.clip_low <= 1, "gspo.clip_low", "lie in [0, 1]", self.clip_low)
        check(self.clip_high >= 0, "gspo.clip_high", "not be negative", self.clip_high)
        check(self.log_limit is None or self.log_limit > 0, "gspo.log_limit", "be positive or null", self.log_limit)


class GSPO(Method):
    """Owner of `clip`, `surrogate` and the reduction, which the definition fixes."""

    slug: ClassVar[str] = "gspo"
    requires: tuple[str, ...] = ("old_logprob",)
    config_class: ClassVar[type[GSPOConfig]] = GSPOConfig
    presets: ClassVar[Mapping[str, GSPOConfig]] = {"paper": GSPOConfig(), "released": GSPOConfig(log_limit=10.0)}
    reduction: Reduction | None = "sequence_mean_of_token_mean"

    def __init__(self, config: GSPOConfig | None = None) -> None:
        self.config = config or GSPOConfig()

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant bounds of the sequence ratio."""
        return bounds(1 - self.config.clip_low, 1 + self.config.clip_high, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """Clipped sequence ratio. Rows of a micro-batch are whole, so no statistic spans rows."""
        return gspo_surrogate(
            inputs.logprob,
            inputs.old_logprob,
            inputs.advantage,
            inputs.rollout.mask,
            inputs.lower,
            inputs.upper,
            self.config.log_limit,
        )
