r"""GPG: the policy gradient itself, without ratio, clip or reference (arXiv 2504.02546).

    l = -A log pi

Shapes [B, T]; averaged over all tokens of the minibatch. With minibatches that reuse a rollout it is biased, for
nothing corrects the change of the policy. Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5
`compute_policy_loss_gpg`. GPG's own advantage is the reward minus its group mean, rescaled for groups without signal;
compose with `dr_grpo` or `rloo` for the first part. This method owns the loss only.

Presets: `paper` and `released` are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.losses import Surrogate, policy_gradient
from ..core.reduce import Reduction
from ._settings import check_reduction
from .base import LossInputs, Method


@dataclass(frozen=True)
class GPGConfig:
    """Settings of GPG."""

    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction, "gpg.reduction")


class GPG(Method):
    """Owner of `surrogate` and the reduction. Clip bounds have no effect."""

    slug: ClassVar[str] = "gpg"
    config_class: ClassVar[type[GPGConfig]] = GPGConfig
    presets: ClassVar[Mapping[str, GPGConfig]] = {"paper": GPGConfig(), "released": GPGConfig()}

    def __init__(self, config: GPGConfig | None = None) -> None:
        self.config = config or GPGConfig()
        self.reduction = self.config.reduction

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """-A log pi."""
        return policy_gradient(inputs.logprob, inputs.advantage)
