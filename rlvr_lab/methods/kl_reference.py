r"""KL to a reference policy as a loss term (the KL of GRPO, DeepSeekMath, arXiv 2402.03300).

    L <- L + beta agg(kl),        d = log pi - log pi_ref on sampled tokens
    k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) + d - 1

Shapes [b, T]; nats; aggregated as the surrogate is. The reference is the starting policy, whose log-probabilities the
loop provides as `ref_logprob`. The gradient is that of the estimate on fixed samples: for k2 it is, on-policy, the
gradient of KL(pi || pi_ref); for k3 that of KL(pi_ref || pi); for k1 it is 0 in expectation, so k1 belongs in a
reward. Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5 `kl_penalty` (whose straight-through
`k3+` raises an error there), huggingface/trl @ f2cd57710.

Presets:
- `paper`: k3 with beta 0.04, GRPO's.
- `released`: verl: k3 (`low_var_kl`) with beta 0.001, d within +-20 and k3 within +-10, beyond which the gradient is 0.
- `trl`: k3 without limits and with beta 0.04; TRL's own default is beta 0. TRL 1.16
  multiplies k3 by the importance ratio unless `use_bias_correction_kl` is switched off; this preset is without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.losses import KL_KINDS, KLKind, kl_estimate
from ._settings import check, check_choice
from .base import LossInputs, Method


@dataclass(frozen=True)
class KLReferenceConfig:
    """Settings of the KL term; `limit` holds k3 within verl's limits."""

    beta: float = 0.04
    kind: KLKind = "k3"
    limit: bool = False

    def __post_init__(self) -> None:
        check(self.beta >= 0, "kl_reference.beta", "not be negative", self.beta)
        check_choice(self.kind, KL_KINDS, "kl_reference.kind")


class KLReference(Method):
    """Places a `regularise` term."""

    slug: ClassVar[str] = "kl_reference"
    requires: tuple[str, ...] = ("ref_logprob",)
    config_class: ClassVar[type[KLReferenceConfig]] = KLReferenceConfig
    presets: ClassVar[Mapping[str, KLReferenceConfig]] = {
        "paper": KLReferenceConfig(),
        "released": KLReferenceConfig(beta=0.001, limit=True),
        "trl": KLReferenceConfig(),
    }

    def __init__(self, config: KLReferenceConfig | None = None) -> None:
        self.config = config or KLReferenceConfig()

    def regularise(self, inputs: LossInputs) -> Tensor:
        """beta times the estimate [b, T]."""
        # a nan in the padding would survive the mask, because the gradient of exp multiplies it by zero
        reference = inputs.rollout.require("ref_logprob", by=self.slug).masked_fill(~inputs.rollout.mask, 0.0)
        return self.config.beta * kl_estimate(inputs.logprob, reference, self.config.kind, self.config.limit)
