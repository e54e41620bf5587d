r"""Entropy bonus: a fixed reward for being undecided (A3C, arXiv 1602.01783).

    L <- L - coefficient agg(H),        H = -sum_a p_a log p_a over the full vocabulary, with gradient
    dH/dz_a = -p_a (log p_a + H)

Shapes: H [b, T], in nats; z logits. Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5 (aggregated
as the policy loss), huggingface/trl @ f2cd57710 (always the mean over tokens).

Presets:
- `paper`: A3C's 0.01 [secondary], aggregated as the surrogate.
- `released`: 0.001, verl's default in early 2025, which several repositories of that year inherit silently; 0 today.
- `trl`: 0.01 under the token mean, whatever the surrogate's reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.reduce import Reduction
from ._settings import check_reduction
from .base import LossInputs, Method


@dataclass(frozen=True)
class EntropyBonusConfig:
    """Settings of the bonus. A negative coefficient punishes entropy; `reduction` null takes the surrogate's."""

    coefficient: float = 0.01
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        check_reduction(self.reduction, "entropy_bonus.reduction", optional=True)


class EntropyBonus(Method):
    """Places a `regularise` term."""

    slug: ClassVar[str] = "entropy_bonus"
    needs_entropy: ClassVar[bool] = True
    config_class: ClassVar[type[EntropyBonusConfig]] = EntropyBonusConfig
    presets: ClassVar[Mapping[str, EntropyBonusConfig]] = {
        "paper": EntropyBonusConfig(),
        "released": EntropyBonusConfig(coefficient=0.001),
        "trl": EntropyBonusConfig(reduction="token_mean"),
    }

    def __init__(self, config: EntropyBonusConfig | None = None) -> None:
        self.config = config or EntropyBonusConfig()
        self.regularise_reduction = self.config.reduction

    def regularise(self, inputs: LossInputs) -> Tensor:
        """Minus coefficient times token entropy [b, T]."""
        if inputs.entropy is None:
            raise ValueError("entropy_bonus needs differentiable entropies in its loss inputs")
        return -self.config.coefficient * inputs.entropy
