r"""Adaptive entropy coefficient: a bonus that acts only while entropy is low (Skywork-OR1, arXiv 2505.22312).

    c     <- clip(c + step, minimum, maximum) where e_k < target, else clip(c - step, ...)       c starts at `initial`
    alpha  = c where e < target, else 0
    L     <- L - alpha agg(H)

e_k is the entropy measured at step k, H [b, T] the exact token entropy with gradient, both in nats. Card:
papers/baselines.md. Code compared: SkyworkAI/Skywork-OR1 @ 64e96af `EntController`, huggingface/trl @ f2cd57710.

Presets differ in estimator, gate and lag:
- `paper`: e_k is the exact token entropy of step k's own rollout and opens the gate of that very step; c moves after
  it [inferred: the paper does not state a lag].
- `released`: e_k is -mean log pi of the sampled tokens, a Monte-Carlo estimate; c and gate act on the next step; the
  gate is open at first; step 1e-4, maximum 5e-3, target 0.2 (Skywork-OR1-7B's scripts).
- `trl`: exact entropies, "<=", gate closed at first, same lag; step 5e-3, maximum 1; the bonus is a mean over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ..core.controllers import SignStepController
from ..core.reduce import Reduction, masked_mean
from ..core.rollout import Rollout
from ._settings import check, check_choice, check_reachable, check_reduction
from .base import LossInputs, Method

Measure = Literal["token_entropy", "behaviour_logprob"]


@dataclass(frozen=True)
class AdaptiveEntropyConfig:
    """Settings of the controller. `lag`: a step's measurement acts on the next step; `strict`: "<" instead of "<="."""

    target: float = 0.2
    step: float = 1e-4
    minimum: float = 0.0
    maximum: float = 5e-3
    initial: float = 0.0
    measure: Measure = "behaviour_logprob"
    lag: bool = True
    strict: bool = True
    open_at_start: bool = True
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        check(self.target > 0, "adaptive_entropy.target", "be positive", self.target)
        check(self.step > 0, "adaptive_entropy.step", "be positive", self.step)
        ordered = self.minimum <= self.initial <= self.maximum
        check(ordered, "adaptive_entropy.initial", f"lie in [{self.minimum}, {self.maximum}]", self.initial)
        check_choice(self.measure, get_args(Measure), "adaptive_entropy.measure")
        check_reduction(self.reduction, "adaptive_entropy.reduction", optional=True)


class AdaptiveEntropy(Method):
    """Places a `regularise` term and an `observe` that moves its coefficient; without lag a `filter` that looks."""

    slug: ClassVar[str] = "adaptive_entropy"
    requires: tuple[str, ...] = ("token_entropy",)
    needs_entropy: ClassVar[bool] = True
    config_class: ClassVar[type[AdaptiveEntropyConfig]] = AdaptiveEntropyConfig
    presets: ClassVar[Mapping[str, AdaptiveEntropyConfig]] = {
        "paper": AdaptiveEntropyConfig(measure="token_entropy", lag=False),
        "released": AdaptiveEntropyConfig(),
        "trl": AdaptiveEntropyConfig(
            step=5e-3, maximum=1.0, measure="token_entropy", strict=False, open_at_start=False, reduction="token_mean"
        ),
    }

    def __init__(self, config: AdaptiveEntropyConfig | None = None) -> None:
        self.config = c = config or AdaptiveEntropyConfig()
        self.regularise_reduction = c.reduction
        self.controller = SignStepController(
            c.target, c.step, c.minimum, c.maximum, c.initial, c.strict, c.open_at_start
        )

    def check_run(self, vocabulary: int, steps: int) -> None:
        """Refuse a target above the entropy of a uniform choice."""
        check_reachable(self.config.target, vocabulary, "adaptive_entropy.target")

    def metrics(self) -> dict[str, float]:
        """`coefficient`: what the step's entropy term was multiplied by, 0 where the gate was shut."""
        return {"coefficient": self.controller.coefficient}

    def filter(self, rollout: Rollout) -> Rollout:
        """The rollout as it is; without lag, its entropy sets the gate of this step."""
        if not self.config.lag:
            values = rollout.require(self.config.measure, by=self.slug)
            self.controller.gate(self._entropy(float(masked_mean(values, rollout.mask))))
        return rollout

    def regularise(self, inputs: LossInputs) -> Tensor:
        """Minus the applied coefficient times token entropy [b, T]."""
        if inputs.entropy is None:
            raise ValueError("adaptive_entropy needs differentiable entropies in its loss inputs")
        return -self.controller.coefficient * inputs.entropy

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Move the coefficient by what the step measured."""
        self.controller.update(self._entropy(metrics[self.config.measure]))

    def _entropy(self, mean: float) -> float:
        return mean if self.config.measure == "token_entropy" else -mean

    def state_dict(self) -> dict[str, Any]:
        """Coefficient and gate."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up coefficient and gate."""
        self.controller.load_state_dict(state)
