r"""EPO: an entropy bonus inside a corridor around the entropy's own history (arXiv 2509.22576).

    term   = -lambda [ L_H - beta_k alpha P ],     beta_k = 1 + exp(-gamma k / floor(K / 2))
    L_H    = mean over responses (turns) of the mean token entropy H
    P      = the same mean of  [kappa_l Hw - H]_+ + [H - kappa_r Hw]_+                    Hw: mean of the history

The history holds one number per earlier step, the mean token entropy of its rollout; it has no gradient and is never
shortened. With no history there is no penalty. H in nats [B, T], with gradient; k counts steps, K is `horizon`. The
published corridor (0, 2) has no lower side, and no upper side either where 2 Hw exceeds log V (small vocabularies).

Card: papers/epo.md. Code compared: WujiangXu/EPO @ 5b6fa98. **The released penalty is a constant, 0 inside the
corridor and alpha outside: it has no gradient** (`penalty: indicator`), so that the release optimises the plain entropy
bonus. Its weight decays by `released_phase_weight` to almost nothing where beta_k stays above 1, its history is kept
per turn and includes the step itself, its mean runs over tokens. In a single-turn task a response is one turn.

Presets: `paper` (arXiv v2, ALFWorld), `released` (indicator, token mean, its phase weight), `tiny` (corridor 0.5 to
1.2, alpha 5, lambda 0.02: the settings of the card's pilot; few tokens lie inside it). Control: `alpha: 0`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_sums
from ..core.reduce import Reduction
from ._settings import check, check_choice
from .base import LossInputs, Method

Penalty = Literal["hinge", "indicator"]
Phase = Literal["paper", "released", "constant"]
RELEASED_HORIZON = 150


def phase_weight(step: int, horizon: int, gamma: float = 3.0) -> float:
    """beta_k = 1 + exp(-gamma k / floor(K / 2)): from 2 down towards 1."""
    return 1.0 + math.exp(-gamma * step / max(horizon // 2, 1))


def released_phase_weight(step: int, horizon: int = RELEASED_HORIZON) -> float:
    """The code's weight: 1 - 0.2 (1 - exp(-2 k / h)) up to h = K / 2, then 0.8 exp(-3 (k - h) / h)."""
    half = horizon / 2
    if step <= half:
        return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * step / half))
    return 0.8 * math.exp(-3.0 * (step - half) / half)


def corridor_hinge(entropy_BT: Tensor, reference: Tensor | float, low: float, high: float) -> Tensor:
    """[low reference - H]_+ + [H - high reference]_+, of any shape; differentiable in H."""
    return (low * reference - entropy_BT).relu() + (entropy_BT - high * reference).relu()


def corridor_indicator(entropy_BT: Tensor, reference: Tensor | float, low: float, high: float) -> Tensor:
    """1 outside the corridor, 0 inside and on its edges; a constant."""
    value = entropy_BT.detach()
    return ((value < low * reference) | (value > high * reference)).to(value.dtype)


def turn_row_advantage(
    return_R: Tensor, group_id_R: Tensor, trajectory_R: Tensor, over_rows: bool, std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GRPO advantage [R] where every row is one turn of a trajectory.

    `over_rows` takes mean and sample standard deviation over the group's rows (the release), so that long episodes
    weigh more; else every trajectory counts once. A group of one row or trajectory keeps its raw return.
    """
    counted = torch.ones_like(return_R)
    if not over_rows:
        _, first = torch.unique(trajectory_R, return_inverse=True)
        seen = torch.zeros(int(first.max()) + 1, dtype=torch.bool)
        for row, index in enumerate(first.tolist()):
            counted[row] = float(not seen[index])
            seen[index] = True
    number = group_sums(counted, group_id_R)[0]
    alone = number <= 1
    mean = (group_sums(return_R * counted, group_id_R)[0] / number.clamp_min(1)).masked_fill(alone, 0.0)
    centred = return_R - mean
    if not std:
        return centred
    spread = (group_sums(centred.square() * counted, group_id_R)[0] / (number - 1).clamp_min(1)).sqrt()
    return centred / (spread.masked_fill(alone, 1.0) + eps)


@dataclass(frozen=True)
class EPOConfig:
    """Settings: `coefficient` is lambda, `low` and `high` the kappas, `horizon` the number of steps K."""

    coefficient: float = 0.001
    alpha: float = 0.1
    low: float = 0.0
    high: float = 2.0
    gamma: float = 3.0
    horizon: int = 150
    penalty: Penalty = "hinge"
    phase: Phase = "paper"
    reduction: Reduction = "sequence_mean_of_token_mean"

    def __post_init__(self) -> None:
        check(self.coefficient >= 0, "epo.coefficient", "not be negative", self.coefficient)
        check(self.alpha >= 0, "epo.alpha", "not be negative", self.alpha)
        check(0 <= self.low <= self.high, "epo.low", "satisfy 0 <= low <= high", self.low)
        check(self.gamma >= 0, "epo.gamma", "not be negative", self.gamma)
        check(self.horizon >= 2, "epo.horizon", "be at least 2, the number of training steps", self.horizon)
        check_choice(self.penalty, get_args(Penalty), "epo.penalty")
        check_choice(self.phase, get_args(Phase), "epo.phase")
        means = ("token_mean", "sequence_mean_of_token_mean")
        check_choice(self.reduction, means, "epo.reduction")


class EPO(Method):
    """A regulariser; `observe` keeps the history."""

    slug: ClassVar[str] = "epo"
    needs_entropy: ClassVar[bool] = True
    config_class: ClassVar[type[EPOConfig]] = EPOConfig
    presets: ClassVar[Mapping[str, EPOConfig]] = {
        "paper": EPOConfig(),
        "released": EPOConfig(penalty="indicator", phase="released", reduction="token_mean"),
        "tiny": EPOConfig(coefficient=0.02, alpha=5.0, low=0.5, high=1.2, horizon=80),
    }

    def __init__(self, config: EPOConfig | None = None) -> None:
        self.config = config or EPOConfig()
        self.regularise_reduction = self.config.reduction
        self.history: list[float] = []
        self._pending: list[str] = []

    def check_run(self, vocabulary: int, steps: int) -> None:
        """A phase weight that the run is too short for is said, not refused."""
        c = self.config
        if c.phase != "constant" and c.horizon > steps:
            self._pending = [
                f"methods.epo.horizon is {c.horizon}, but the run has {steps} steps: the penalty's weight stops on its "
                f"way at {self._phase_weight(steps):.2f}; set methods.epo.horizon={steps}"
            ]

    def notices(self) -> list[str]:
        """Says once that the horizon is longer than the run."""
        found, self._pending = self._pending, []
        return found

    def metrics(self) -> dict[str, float]:
        """`reference`, the mean of the history that the corridor of this step stood on, and its `weight`; nan and 0 in
        the first step."""
        reference = sum(self.history) / len(self.history) if self.history else math.nan
        return {"reference": reference, "weight": self.weight_of_penalty}

    @property
    def weight_of_penalty(self) -> float:
        """beta_k of the present step, 0 where there is no history."""
        return self._phase_weight(len(self.history)) if self.history else 0.0

    def _phase_weight(self, step: int) -> float:
        c = self.config
        if c.phase == "constant":
            return 1.0
        return phase_weight(step, c.horizon, c.gamma) if c.phase == "paper" else released_phase_weight(step, c.horizon)

    def regularise(self, inputs: LossInputs) -> Tensor:
        """-lambda (H - beta_k alpha P) per token [b, T]."""
        assert inputs.entropy is not None
        c, weight = self.config, self.weight_of_penalty
        if not weight:
            return -c.coefficient * inputs.entropy
        reference = sum(self.history) / len(self.history)
        penalise = corridor_hinge if c.penalty == "hinge" else corridor_indicator
        penalty = penalise(inputs.entropy, reference, c.low, c.high)
        return -c.coefficient * (inputs.entropy - weight * c.alpha * penalty)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Append the step's mean token entropy; an undefined one is left out."""
        value = metrics["token_entropy"]
        if math.isfinite(value):
            self.history.append(float(value))

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's history."""
        self.history = [float(value) for value in state["history"]]
