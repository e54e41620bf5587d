r"""CISPO: truncate the importance weight instead of clipping the surrogate (MiniMax-M1, arXiv 2506.13585).

    l = -sg[clip(r, lower, upper)] A log pi              sg: no gradient through the weight

Shapes [B, T]. Every token keeps the gradient -clip(r) A on its log-probability; clipping never silences one. Averaged
over all tokens of the minibatch. Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5,
huggingface/trl @ f2cd57710. ScaleRL (arXiv 2510.13786) builds on it.

The two libraries mean different bounds by the same number: verl's `clip_high` is a distance (r <= 1 + clip_high) and
clips on both sides; TRL's is the bound itself (r <= clip_high) and there is none below. `bound` says which is meant.

Presets:
- `paper`: in effect no lower bound [secondary]; upper bound at distance 5 [inferred: the paper gives no number; 5 is
  TRL's suggestion].
- `released` and `verl`: both sides, distances 0.2, verl's defaults.
- `trl`: r <= 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..core.losses import Surrogate, cispo_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._settings import bounds, check, check_choice, check_reduction
from .base import LossInputs, Method

Bound = Literal["distance", "ratio"]


@dataclass(frozen=True)
class CISPOConfig:
    """Settings of CISPO. `clip_low` null leaves the weight unbounded below."""

    clip_low: float | None = None
    clip_high: float = 5.0
    bound: Bound = "distance"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.bound, get_args(Bound), "cispo.bound")
        check(self.clip_low is None or self.clip_low >= 0, "cispo.clip_low", "not be negative, or null", self.clip_low)
        check(self.clip_high >= 0, "cispo.clip_high", "not be negative", self.clip_high)
        check(self.lower <= self.upper, "cispo.clip_low", f"leave the lower bound below {self.upper}", self.clip_low)
        check_reduction(self.reduction, "cispo.reduction")

    @property
    def lower(self) -> float:
        """Lower bound of the weight."""
        if self.clip_low is None:
            return 0.0
        return self.clip_low if self.bound == "ratio" else max(1 - self.clip_low, 0.0)

    @property
    def upper(self) -> float:
        """Upper bound of the weight."""
        return self.clip_high if self.bound == "ratio" else 1 + self.clip_high


class CISPO(Method):
    """Owner of `clip`, `surrogate` and the reduction."""

    slug: ClassVar[str] = "cispo"
    requires: tuple[str, ...] = ("old_logprob",)
    config_class: ClassVar[type[CISPOConfig]] = CISPOConfig
    presets: ClassVar[Mapping[str, CISPOConfig]] = {
        "paper": CISPOConfig(),
        "released": CISPOConfig(clip_low=0.2, clip_high=0.2),
        "verl": CISPOConfig(clip_low=0.2, clip_high=0.2),
        "trl": CISPOConfig(bound="ratio"),
    }

    def __init__(self, config: CISPOConfig | None = None) -> None:
        self.config = config or CISPOConfig()
        self.reduction = self.config.reduction

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the weight."""
        return bounds(self.config.lower, self.config.upper, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """REINFORCE under the truncated weight."""
        return cispo_surrogate(inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper)
