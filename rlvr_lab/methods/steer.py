r"""STEER: weaken tokens by how much entropy change their update would cause (arXiv 2510.10150).

    omega_t  = -I_clip r A p (1 - p)(log p + H)                `theorem`: Theorem 1, the other logits taken as fixed
    omega_t  = -I_clip r A [p (log p + H) - sum_k p_k^2 (log p_k + H)]         `full`: exact first order [inferred]
    omega_t  = (A / p_old) x (1 - x)(log x + H),  x = p          `released`: one factor p short, and without I_clip
    lambda_t = exp(ln(lambda_min) |omega_t| / M),     M = max over the tokens of |omega|, at least a floor

The surrogate is multiplied by lambda in [lambda_min, 1], without gradient; the denominator of the mean stays the number
of tokens. p, p_old: current and old probability of the sampled token; H: entropy of its distribution in nats; all
[B, T]. The `linear` map gives the calmest token lambda_max and the largest |omega| lambda_min.

Card: papers/steer.md. Code compared: zz-haooo/STEER @ b31df71 (`compute_token_weights`), which takes M over a
micro-batch; here it is the optimizer minibatch. Its H is the one recorded before the update; `theorem` and `full` use
the current policy's.

Presets: `paper` is the theorem with lambda_min 0.7 [secondary]; `released` the code with 0.8 and the floor 0.02;
`linear` its linear map to [0.8, 1.2]; `full` the exact form; `tiny` the theorem with lambda_min 0.05, because 0.7
hardly acts on a small policy [inferred]. Controls (`control`): `constant` gives every token the mean weight,
`shuffled` deals the same weights out at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.dynamics import change_full, change_theorem, clip_indicator
from ..core.losses import importance_ratio
from ..core.reduce import masked_mean
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ._settings import check, check_choice
from .base import CLIP_BOUNDS, Method

Form = Literal["released", "theorem", "full"]
Control = Literal["none", "constant", "shuffled"]
LEAST = 1e-8  # of a probability in the released form


def released_change(logprob_BT: Tensor, old_logprob_BT: Tensor, entropy_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    """The released code's signed metric [B, T]: (A / p_old) x (1 - x)(log x + H); 0 where it is not finite."""
    x = logprob_BT.exp().clamp(LEAST, 1 - LEAST)
    old = old_logprob_BT.exp().clamp(LEAST, 1.0)
    return (advantage_BT / old * x * (1 - x) * (x.log() + entropy_BT)).nan_to_num(0.0, 0.0, 0.0)


def exponential_weights(change_BT: Tensor, mask_BT: Tensor, least: float, floor: float = 0.0) -> Tensor:
    """exp(ln(least) |change| / M) [B, T], M the largest |change| but at least `floor`; 0 outside the mask.

    1 everywhere where nothing changes.
    """
    size = change_BT.abs().masked_fill(~mask_BT, 0.0)
    largest = max(float(size.max()) if size.numel() else 0.0, floor)
    if not largest:
        return mask_BT.to(change_BT.dtype)
    return (size * (math.log(least) / largest)).exp().clamp(least, 1.0) * mask_BT


def linear_weights(change_BT: Tensor, mask_BT: Tensor, least: float, most: float) -> Tensor:
    """From `most` at the smallest |change| of the mask down to `least` at the largest [B, T]; halfway between where
    all are equal; 0 outside the mask."""
    values = change_BT.abs()[mask_BT]
    if not len(values):
        return torch.zeros_like(change_BT)
    low, high = values.min(), values.max()
    if bool(high == low):
        return mask_BT * ((least + most) / 2)
    weight = most - (change_BT.abs() - low) * (most - least) / (high - low)
    return weight.clamp(least, most).masked_fill(~mask_BT, 0.0)


@dataclass(frozen=True)
class SteerConfig:
    """Settings of STEER. `floor` bounds M from below."""

    form: Form = "theorem"
    shape: Literal["exponential", "linear"] = "exponential"
    least: float = 0.7
    most: float = 1.0
    """Weight of the calmest token; other than 1 for `linear` only."""
    floor: float = 0.0
    control: Control = "none"

    def __post_init__(self) -> None:
        check_choice(self.form, get_args(Form), "steer.form")
        check_choice(self.shape, ("exponential", "linear"), "steer.shape")
        check_choice(self.control, get_args(Control), "steer.control")
        check(0 < self.least <= 1, "steer.least", "lie in (0, 1]", self.least)
        check(self.most >= self.least, "steer.most", "be at least steer.least", self.most)
        check(self.shape == "linear" or self.most == 1, "steer.most", "be 1 for the exponential shape", self.most)
        check(self.floor >= 0, "steer.floor", "not be negative", self.floor)


class Steer(Method):
    """A token `weight`; `prepare` draws the numbers of the shuffled control."""

    slug: ClassVar[str] = "steer"
    requires: tuple[str, ...] = ("old_logprob", "token_entropy")
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[SteerConfig]] = SteerConfig
    presets: ClassVar[Mapping[str, SteerConfig]] = {
        "paper": SteerConfig(),
        "released": SteerConfig("released", least=0.8, floor=0.02),
        "linear": SteerConfig("released", "linear", least=0.8, most=1.2),
        "full": SteerConfig("full"),
        "tiny": SteerConfig(least=0.05),
    }

    def __init__(self, config: SteerConfig | None = None) -> None:
        self.config = config or SteerConfig()
        self.needs_moments = self.config.form == "full"

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for the shuffled control, drawn in canonical row order."""
        if self.config.control != "shuffled":
            return {}
        order = canonical_order(batch)
        draws = torch.rand(int(batch.mask.sum()), generator=generator, device=generator.device).to(advantage_BT)
        noise = torch.empty_like(advantage_BT)
        noise[order] = torch.zeros_like(advantage_BT).masked_scatter(batch.mask[order], draws)
        return {"steer.noise": noise}

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """lambda [B, T] of the whole minibatch."""
        c, mask = self.config, batch.mask
        change = self._change(batch, advantage_BT)
        if c.shape == "linear":
            weight = linear_weights(change, mask, c.least, c.most)
        else:
            weight = exponential_weights(change, mask, c.least, c.floor)
        if c.control == "constant":
            return masked_mean(weight, mask).expand_as(weight)
        if c.control == "shuffled":
            places = batch.require("steer.noise", by=self.slug)[mask].argsort()
            return torch.zeros_like(weight).masked_scatter(mask, weight[mask].sort().values[places.argsort()])
        return weight

    def _change(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        def known(name: str) -> Tensor:
            return batch.require(name, by=self.slug).masked_fill(~batch.mask, 0.0)

        logprob, old = known("current_logprob"), known("old_logprob")
        if self.config.form == "released":
            return released_change(logprob, old, known("token_entropy"), advantage_BT)
        ratio = importance_ratio(logprob, old)
        lower, upper = (batch.require(name, by=self.slug) for name in CLIP_BOUNDS)
        coefficient = clip_indicator(ratio, advantage_BT, lower, upper) * ratio * advantage_BT
        entropy = known("current_entropy")
        if self.config.form == "theorem":
            return change_theorem(coefficient, logprob, entropy)
        return change_full(coefficient, logprob, entropy, known("current_collision"), known("current_cross"))
