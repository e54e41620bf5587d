r"""BAPO: widen the clip range, update by update, until right answers carry their share of the loss (arXiv 2510.18927).

    share(lo, hi) = sum_{A>0} w |min(rA, clip(r, 0, hi)A)| / sum w |min(rA, clip(r, lo, hi)A)|,   w = p_old of the token
    start at (a-, a+);  while share < rho_0:  raise hi by delta_1 up to b+, then lo by delta_2 up to b-, then stop
    l = max(-A r, -A clip(r, lo, hi)),   for A < 0 at most -A c           c the dual clip

r is the importance ratio, all [B, T] over the optimizer minibatch; the search sees numbers only and carries no
gradient. The released code searches P / N instead, unweighted, P = sum_{A>=0} min(r, hi) A, N = sum_{A<0} max(r, lo)
|A|, and raises lo first. A share rho corresponds to P / N = rho / (1 - rho). Without a negative the target is met.

For A < 0 the clipped value max(r, lo) |A| grows with lo, so **raising lo can only lower either criterion**: it removes
gradient of negatives, never meets the target [inferred, proven in the card]. `criterion: gradient_mass` counts
r |A| of the tokens that still have a gradient, which does respond to lo; it is ours, not the paper's.

Card: papers/bapo.md. Code compared: WooooDyy/BAPO @ 7287044, a re-implementation by the authors; their first public
version searched with 1 - lo and 1 + hi. On the first minibatch of an on-policy step r = 1: no bound changes anything,
and where negatives dominate the search runs to both maxima.

Presets: `paper` (share 0.4, [0.6, 0.9], [1.2, 3.0]); `released` the code's defaults (P / N = 1, [0.6, 0.8],
[1.2, 2.0]); `example` its example script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.dynamics import clip_indicator
from ..core.losses import Surrogate, clipped_surrogate, importance_ratio
from ..core.rollout import Rollout
from ._settings import bounds, check, check_choice
from .base import LossInputs, Method

Criterion = Literal["share", "ratio", "gradient_mass"]


def positive_share(ratio_BT: Tensor, advantage_BT: Tensor, weight_BT: Tensor, lower: float, upper: float) -> float:
    """Share of the clipped surrogate's absolute value that belongs to A > 0 (Eq. 8); nan where it is 0 altogether."""
    value = weight_BT * torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(lower, upper) * advantage_BT).abs()
    return _share(value, advantage_BT > 0)


def positive_ratio(
    ratio_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, lower: float, upper: float, eps: float = 1e-8
) -> float:
    """The released criterion P / (N + eps); infinite where N is 0."""
    value = advantage_BT.abs() * torch.where(advantage_BT >= 0, ratio_BT.clamp_max(upper), ratio_BT.clamp_min(lower))
    value = value.masked_fill(~mask_BT, 0.0)
    negative = float(value[advantage_BT < 0].sum())
    return float(value[advantage_BT >= 0].sum()) / (negative + eps) if negative > 0 else float("inf")


def gradient_share(ratio_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, lower: float, upper: float) -> float:
    """Share of r |A| that belongs to A > 0 among the tokens whose gradient no bound has removed. [ours]"""
    live = clip_indicator(ratio_BT, advantage_BT, lower, upper) & mask_BT
    return _share(live * ratio_BT * advantage_BT.abs(), advantage_BT > 0)


def _share(value_BT: Tensor, part_BT: Tensor) -> float:
    total = float(value_BT.sum())
    return float((value_BT * part_BT).sum()) / total if total else float("nan")


@dataclass(frozen=True)
class Found:
    """Result of a search: bounds of the ratio, the criterion there, and how many steps it took."""

    lower: float
    upper: float
    value: float
    steps: int


def search(
    criterion: Callable[[float, float], float],
    target: float,
    lower: tuple[float, float, float],
    upper: tuple[float, float, float],
    lower_first: bool = False,
) -> Found:
    """Widen the bounds, given as (start, end, step), until `criterion(lower, upper)` reaches the target.

    The upper bound moves first (Algorithm 1), or with `lower_first` the lower one (the code). A criterion of nan (there
    is nothing to balance) counts as met.
    """
    position, steps = {"lower": lower[0], "upper": upper[0]}, 0
    value = criterion(*position.values())
    ranges = {"lower": lower, "upper": upper}
    for side in ("lower", "upper") if lower_first else ("upper", "lower"):
        _, end, step = ranges[side]
        # half a millionth of a step short counts as there: 36 steps of 0.05 do not add up to 1.8 exactly
        while value < target and position[side] < end - 5e-7 * step:
            position[side] = min(position[side] + step, end)
            value, steps = criterion(*position.values()), steps + 1
    return Found(position["lower"], position["upper"], value, steps)


@dataclass(frozen=True)
class BAPOConfig:
    """Settings. Bounds are ratios; `target` is a share in (0, 1), or a ratio for `criterion: ratio`."""

    criterion: Criterion = "share"
    target: float = 0.4
    lower: float = 0.6
    lower_end: float = 0.9
    lower_step: float = 0.02
    upper: float = 1.2
    upper_end: float = 3.0
    upper_step: float = 0.05
    lower_first: bool = False
    weigh_by_probability: bool = True
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_choice(self.criterion, get_args(Criterion), "bapo.criterion")
        top = float("inf") if self.criterion == "ratio" else 1.0
        check(0 < self.target < top, "bapo.target", "be positive (a share below 1, or a ratio)", self.target)
        check(0 <= self.lower <= self.lower_end <= 1, "bapo.lower", "satisfy 0 <= lower <= lower_end <= 1", self.lower)
        check(1 <= self.upper <= self.upper_end, "bapo.upper", "satisfy 1 <= upper <= upper_end", self.upper)
        for name in ("lower_step", "upper_step"):
            check(getattr(self, name) > 0, f"bapo.{name}", "be positive", getattr(self, name))
        check(self.dual_clip is None or self.dual_clip > 1, "bapo.dual_clip", "be above 1 or null", self.dual_clip)


class BAPO(Method):
    """Owns `clip`, by a search over the minibatch, and the `surrogate` with its dual clip."""

    slug: ClassVar[str] = "bapo"
    requires: tuple[str, ...] = ("old_logprob",)
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[BAPOConfig]] = BAPOConfig
    presets: ClassVar[Mapping[str, BAPOConfig]] = {
        "paper": BAPOConfig(),
        "released": BAPOConfig("ratio", 1.0, 0.6, 0.8, 0.05, 1.2, 2.0, 0.05, True, False),
        "example": BAPOConfig("ratio", 0.5, 0.8, 0.95, 0.05, 1.2, 2.0, 0.1, True, False),
    }

    def __init__(self, config: BAPOConfig | None = None) -> None:
        self.config = config or BAPOConfig()
        self.found: Found | None = None
        """The last search, for whoever logs it."""

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds that the search ends with, for every token of the minibatch."""
        c = self.config
        self.found = search(
            self._criterion(batch, advantage_BT),
            c.target,
            (c.lower, c.lower_end, c.lower_step),
            (c.upper, c.upper_end, c.upper_step),
            c.lower_first,
        )
        return bounds(self.found.lower, self.found.upper, advantage_BT)

    def _criterion(self, batch: Rollout, advantage_BT: Tensor) -> Callable[[float, float], float]:
        logprob, old = (
            batch.require(name, by=self.slug).detach().masked_fill(~batch.mask, 0.0)
            for name in ("current_logprob", "old_logprob")
        )
        ratio, mask = importance_ratio(logprob, old), batch.mask
        if self.config.criterion == "ratio":
            return lambda lower, upper: positive_ratio(ratio, advantage_BT, mask, lower, upper)
        if self.config.criterion == "gradient_mass":
            return lambda lower, upper: gradient_share(ratio, advantage_BT, mask, lower, upper)
        weight = old.exp() * mask if self.config.weigh_by_probability else mask.to(ratio)
        return lambda lower, upper: positive_share(ratio, advantage_BT, weight, lower, upper)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate within the bounds found, with the dual clip."""
        return clipped_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper, self.config.dual_clip
        )
