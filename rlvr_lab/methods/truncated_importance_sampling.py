r"""Truncated importance sampling: correct for a sampler that is not quite the policy that learns.

    w_t = min(pi_old(y_t) / pi_behaviour(y_t), cap)           multiplies the surrogate, no gradient

Shapes [B, T]. pi_old is scored by the trainer, pi_behaviour is what the sampling engine recorded; they differ through
kernels, precision, temperature or stale weights. The truncated weight is that of IMPALA (arXiv 1802.01561); for the
mismatch of engines see also ScaleRL (arXiv 2510.13786). Code compared: volcengine/verl `tis_imp_ratio_cap`,
huggingface/trl `vllm_importance_sampling_cap`. The baselines card does not define it [secondary]. It needs
`update.recompute_old_logprob`; without that, both log-probabilities are the same and the weight is 1.

Presets: `paper` and `released` both cap at 2; `uncapped` is plain importance sampling in effect, the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.losses import truncated_importance_weight
from ..core.rollout import Rollout
from ._settings import check
from .base import Method


@dataclass(frozen=True)
class TruncatedImportanceSamplingConfig:
    """Settings: the largest weight."""

    cap: float = 2.0

    def __post_init__(self) -> None:
        check(self.cap > 0, "truncated_importance_sampling.cap", "be positive", self.cap)


class TruncatedImportanceSampling(Method):
    """Places a `weight`."""

    slug: ClassVar[str] = "truncated_importance_sampling"
    requires: tuple[str, ...] = ("old_logprob",)
    config_class: ClassVar[type[TruncatedImportanceSamplingConfig]] = TruncatedImportanceSamplingConfig
    presets: ClassVar[Mapping[str, TruncatedImportanceSamplingConfig]] = {
        "paper": TruncatedImportanceSamplingConfig(),
        "released": TruncatedImportanceSamplingConfig(),
        "uncapped": TruncatedImportanceSamplingConfig(cap=float("inf")),
    }

    def __init__(self, config: TruncatedImportanceSamplingConfig | None = None) -> None:
        self.config = config or TruncatedImportanceSamplingConfig()

    @property
    def importance_cap(self) -> float:
        """Largest weight."""
        return self.config.cap

    def weight(self, rollout: Rollout, advantage_BT: Tensor) -> Tensor:
        """Weights [B, T]."""
        old = rollout.require("old_logprob", by=self.slug)
        return truncated_importance_weight(old, rollout.behaviour_logprob, self.config.cap)
