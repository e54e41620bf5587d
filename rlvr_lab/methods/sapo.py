r"""SAPO: a smooth gate in place of the hard clip (arXiv 2511.20347).

    l = -A (4 / tau) sigmoid(tau (r - 1)),       tau = tau_positive for A > 0, tau_negative otherwise

Shapes [B, T]. The gradient is that of -A r at r = 1 and fades on both sides, faster for negative advantages; no token
is cut off. Averaged within responses, then over them. Card: papers/baselines.md. Code compared: volcengine/verl @
b178a3cd5 `compute_policy_loss_sapo`, huggingface/trl @ f2cd57710.

Presets: `paper` and `released` are the same: tau 1.0 and 1.05.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.losses import Surrogate, sapo_surrogate
from ..core.reduce import Reduction
from ._settings import check, check_reduction
from .base import LossInputs, Method


@dataclass(frozen=True)
class SAPOConfig:
    """Settings of SAPO: how fast the gate closes for positive and for other advantages."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    reduction: Reduction = "sequence_mean_of_token_mean"

    def __post_init__(self) -> None:
        check(self.tau_positive > 0, "sapo.tau_positive", "be positive", self.tau_positive)
        check(self.tau_negative > 0, "sapo.tau_negative", "be positive", self.tau_negative)
        check_reduction(self.reduction, "sapo.reduction")


class SAPO(Method):
    """Owner of `surrogate` and the reduction. Clip bounds have no effect."""

    slug: ClassVar[str] = "sapo"
    requires: tuple[str, ...] = ("old_logprob",)
    config_class: ClassVar[type[SAPOConfig]] = SAPOConfig
    presets: ClassVar[Mapping[str, SAPOConfig]] = {"paper": SAPOConfig(), "released": SAPOConfig()}

    def __init__(self, config: SAPOConfig | None = None) -> None:
        self.config = config or SAPOConfig()
        self.reduction = self.config.reduction

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The gated ratio."""
        return sapo_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, self.config.tau_positive, self.config.tau_negative
        )
