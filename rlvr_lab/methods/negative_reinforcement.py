r"""PSR, NSR and Weighted-REINFORCE: reinforce right answers, penalise wrong ones, or both unequally (arXiv 2506.01347).

    A = w_right on the tokens of a correct response,  -w_wrong on those of a wrong one          no baseline, no group
    `psr` (1, 0)     `nsr` (0, 1)     `weighted` (lambda, 1), lambda = 0.1     `reinforce` (1, 1)

The loss is the surrogate of whoever owns it, here clipped at 1 -+ 0.2 without dual clip, as a token mean. With
`normalise: kept` PSR and NSR drop the other responses before the update, so that the mean runs over the kept tokens
only (the release); with `all` every response stays in the denominator (the paper's objective). Shapes: A [B, T].

On-policy, with many samples and `all`, the exact gradients of PSR, NSR and REINFORCE are equal up to a positive factor,
because E[grad log pi] = 0 [inferred, exact]: what sets them apart comes from few samples, the normalisation, clipping
of off-policy minibatches, and length. A step in which nothing is kept has advantage 0 everywhere (the release fails).

Card: papers/negative_reinforcement.md. Code compared: TianHongZXY/RLVR-Decomposed @ a5d4e7c, which also has an entropy
bonus of 0.001 on by default: add `entropy_bonus` with that coefficient to reproduce it. `right_loss_scale` is its
`positive_learning_weight`, off in every script.

Presets: `paper` is Weighted-REINFORCE over all responses; `released` the same composition normalised as in the code
(for `weighted` they agree, since no response is dropped); `psr`, `nsr` and `reinforce` the other modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._settings import bounds, check, check_choice
from .base import LossInputs, Method

Mode = Literal["psr", "nsr", "weighted", "reinforce"]


def sign_advantage(correct_B: Tensor, mode: Mode, right: float = 0.1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Advantage of each response [B]: positive where it is correct, negative where it is wrong; see the module's head.

    `right` is lambda, the weight of correct responses in mode `weighted`.
    """
    up = {"psr": 1.0, "nsr": 0.0, "weighted": right, "reinforce": 1.0}[mode]
    down = 0.0 if mode == "psr" else -1.0
    one = torch.ones(correct_B.shape, dtype=dtype, device=correct_B.device)
    return torch.where(correct_B, up * one, down * one)


def kept_rows(correct_B: Tensor, mode: Mode) -> Tensor:
    """Indices of the responses that PSR or NSR learns from; all of them in the other modes."""
    keep = {"psr": correct_B, "nsr": ~correct_B}.get(mode, torch.ones_like(correct_B))
    return keep.nonzero().squeeze(1)


def logit_gradient(logits: Tensor, sampled: int, weight: float, form: Literal["logprob", "probability"]) -> Tensor:
    """Gradient with respect to the logits [V] of the loss -w log p_y, or -w p_y, at one sampled token y.

        `logprob`: w (p - delta_y)            `probability`: w p_y (p - delta_y)

    The second is the paper's: a confident wrong token (p_y near 1) is hardly pushed. Both move every other token in
    proportion to its probability.
    """
    p = torch.softmax(logits, -1)
    step = p.clone()
    step[sampled] -= 1.0
    return weight * step * (p[sampled] if form == "probability" else 1.0)


@dataclass(frozen=True)
class NegativeReinforcementConfig:
    """Settings. `right` is lambda; `clip` the distance of both bounds of the ratio from 1."""

    mode: Mode = "weighted"
    right: float = 0.1
    normalise: Literal["kept", "all"] = "all"
    clip: float = 0.2
    right_loss_scale: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.mode, get_args(Mode), "negative_reinforcement.mode")
        check_choice(self.normalise, ("kept", "all"), "negative_reinforcement.normalise")
        check(self.right >= 0, "negative_reinforcement.right", "not be negative", self.right)
        check(0 < self.clip <= 1, "negative_reinforcement.clip", "lie in (0, 1]", self.clip)
        scale = self.right_loss_scale
        check(scale is None or scale >= 0, "negative_reinforcement.right_loss_scale", "not be negative or null", scale)


class NegativeReinforcement(Method):
    """Owns `advantage`, `clip`, `surrogate` and the reduction; `filter` drops responses where `normalise` is kept."""

    slug: ClassVar[str] = "negative_reinforcement"
    requires: tuple[str, ...] = ("correct", "old_logprob")
    config_class: ClassVar[type[NegativeReinforcementConfig]] = NegativeReinforcementConfig
    presets: ClassVar[Mapping[str, NegativeReinforcementConfig]] = {
        "paper": NegativeReinforcementConfig(),
        "released": NegativeReinforcementConfig(normalise="kept"),
        "psr": NegativeReinforcementConfig("psr", normalise="kept"),
        "nsr": NegativeReinforcementConfig("nsr", normalise="kept"),
        "reinforce": NegativeReinforcementConfig("reinforce"),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: NegativeReinforcementConfig | None = None) -> None:
        self.config = config or NegativeReinforcementConfig()

    def filter(self, rollout: Rollout) -> Rollout:
        """Only the responses that are learnt from; all of them where there is none."""
        if self.config.normalise == "all":
            return rollout
        rows = kept_rows(rollout.require("correct", by=self.slug), self.config.mode)
        return rollout.rows(rows) if len(rows) else rollout

    def advantage(self, rollout: Rollout) -> Tensor:
        """w_right or -w_wrong on every token [B, T]."""
        correct = rollout.require("correct", by=self.slug)
        value = sign_advantage(correct, self.config.mode, self.config.right, rollout.behaviour_logprob.dtype)
        return value[:, None].expand(rollout.response_ids.shape)

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """1 - clip and 1 + clip."""
        return bounds(1 - self.config.clip, 1 + self.config.clip, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate without dual clip; `right_loss_scale` multiplies it where the advantage is positive."""
        surrogate = clipped_surrogate(inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper)
        scale = self.config.right_loss_scale
        if scale is None:
            return surrogate
        loss = torch.where(inputs.advantage > 0, scale * surrogate.loss, surrogate.loss)
        return Surrogate(loss, surrogate.ratio, surrogate.clipped_low, surrogate.clipped_high)
