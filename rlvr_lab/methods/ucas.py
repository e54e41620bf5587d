r"""UCAS: advantages scaled by the response's confidence, minus a penalty on each token's logit (arXiv 2510.10649).

    c_t = logsumexp(z / T) - mean_v z_v / T = -mean_v log p_v          certainty: KL(uniform || p) + log V, in nats
    C_i = mean (or sum) of c over the response                         A, C^: z-scores of reward and C in the group
    stage 1   A' = A exp(-b_pos C^)  where A > 0,     A exp(+b_neg C^)  elsewhere
    stage 2   A_t = A' - lambda l^_t,  not below 0 where A' > 0

l^ is the raw logit z_t of the sampled token (before the temperature), scaled to [0, 1] by its minimum and maximum over
all valid tokens of the rollout; 1/2 everywhere where they are equal. Shapes: c, l [B, T]; C, A' [B]. c and l are those
of the old policy, recorded when the rollout is scored, without gradient. **In a group of equal rewards A' = 0 and every
token is pushed down by lambda l^**, right answers too: such groups must not be dropped beforehand, and `degenerate:
mask` is the control that gives them advantage 0. Loss: the base's, in the paper the clipped token mean.

Card: papers/ucas.md. Code compared: xvolcano02/UCAS @ b122ff2. Its C is a **sum**, and with log V in every term it is
almost the length of the response (`certainty_length_correlation` among the metrics); it runs over padding, where one
entry behind a short response is not 0. Here padding never counts. "Minimum equals maximum" is taken as a difference of
at most eps [inferred]. `std: none` undoes both divisions, as the release's Dr. GRPO switch does.

Presets: `paper` (mean, a group of one learns nothing by its reward), `released` (sum, a group of one has mean 0 and
standard deviation 1). A response without a token has no mean certainty and no part in its group's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import Singleton, dead_groups, group_advantage
from ..core.rollout import Rollout
from ..errors import UserError
from ._settings import check, check_choice
from .base import Method

Confidence = Literal["mean", "sum"]
Scale = Literal["sample", "none"]
Degenerate = Literal["keep", "mask"]


def response_certainty(certainty_BT: Tensor, mask_BT: Tensor, confidence: Confidence = "mean") -> Tensor:
    """C [B]: mean or sum of the certainty over the valid tokens; the mean of no token is nan."""
    total = certainty_BT.masked_fill(~mask_BT, 0.0).sum(1)
    return total / mask_BT.sum(1) if confidence == "mean" else total


def scaled_certainty(
    certainty_B: Tensor, group_id_B: Tensor, std: Scale = "sample", eps: float = 1e-6, singleton: Singleton = "zero"
) -> Tensor:
    """C^ [B]: the group's z-score, or the difference from the mean for `std` none; nan is left out and stays nan."""
    known = ~certainty_B.isnan()
    scaled = certainty_B.clone()
    scaled[known] = group_advantage(certainty_B[known], group_id_B[known], std, eps, singleton)
    return scaled


def confidence_weight(advantage_B: Tensor, scaled_B: Tensor, positive: float = 0.25, negative: float = 0.35) -> Tensor:
    """exp(-positive C^) where A > 0, exp(+negative C^) elsewhere [B]; 1 where C^ is nan."""
    scaled = scaled_B.nan_to_num(0.0)
    return torch.where(advantage_B > 0, (-positive * scaled).exp(), (negative * scaled).exp())


def scaled_logit(logit_BT: Tensor, mask_BT: Tensor, eps: float = 1e-6) -> Tensor:
    """l^ = (l - min) / (max - min + eps) over the marked tokens of the whole rollout, 0 outside the mask [B, T]."""
    inside = logit_BT[mask_BT]
    scaled = torch.zeros_like(logit_BT)
    if len(inside):
        low, spread = inside.min(), inside.max() - inside.min()
        scaled[mask_BT] = (inside - low) / (spread + eps) if spread > eps else torch.full_like(inside, 0.5)
    return scaled


def token_advantage(shaped_B: Tensor, scaled_logit_BT: Tensor, mask_BT: Tensor, token_penalty: float = 0.05) -> Tensor:
    """A' - token_penalty l^ [B, T], held at 0 from below where A' > 0; 0 outside the mask."""
    value = shaped_B[:, None] - token_penalty * scaled_logit_BT
    value = torch.where(shaped_B[:, None] > 0, value.clamp_min(0.0), value)
    return value.masked_fill(~mask_BT, 0.0)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors; nan where one of them is constant or there are fewer than two entries."""
    centred = torch.stack([x, y]).double()
    centred = centred - centred.mean(1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred.square().sum(1).prod().sqrt())


@dataclass(frozen=True)
class UCASConfig:
    """`positive` and `negative` are the exponents of stage 1 (0 and 0 switch it off), `token_penalty` is lambda (0
    switches stage 2 off)."""

    positive: float = 0.25
    negative: float = 0.35
    token_penalty: float = 0.05
    confidence: Confidence = "mean"
    std: Scale = "sample"
    eps: float = 1e-6
    singleton: Singleton = "zero"
    degenerate: Degenerate = "keep"

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "token_penalty"):
            check(getattr(self, name) >= 0, f"ucas.{name}", "not be negative", getattr(self, name))
        check(self.eps > 0, "ucas.eps", "be positive", self.eps)
        check_choice(self.confidence, get_args(Confidence), "ucas.confidence")
        check_choice(self.std, get_args(Scale), "ucas.std")
        check_choice(self.singleton, get_args(Singleton), "ucas.singleton")
        check_choice(self.degenerate, get_args(Degenerate), "ucas.degenerate")


class UCAS(Method):
    """Owner of `advantage`."""

    slug: ClassVar[str] = "ucas"
    requires: tuple[str, ...] = ("reward", "token_certainty", "sampled_logit")
    rescored: ClassVar[bool] = True
    config_class: ClassVar[type[UCASConfig]] = UCASConfig
    presets: ClassVar[Mapping[str, UCASConfig]] = {
        "paper": UCASConfig(),
        "released": UCASConfig(confidence="sum", singleton="raw"),
    }

    def __init__(self, config: UCASConfig | None = None) -> None:
        self.config = config or UCASConfig()
        self._figures: dict[str, float] = {}

    def advantage(self, rollout: Rollout) -> Tensor:
        """A_t [B, T]. Raises UserError where a certainty or a weight of stage 1 is not finite."""
        c, mask, group = self.config, rollout.mask, rollout.group_id
        names = ("reward", "token_certainty", "sampled_logit")
        reward, certainty, logit = (rollout.require(name, by=self.slug) for name in names)
        if not bool(certainty[mask].isfinite().all()):
            raise UserError(
                "methods.ucas: a token's certainty is not finite: the model forbids some of its words, and ucas has no "
                "mean over all of them"
            )
        advantage = group_advantage(reward, group, c.std, c.eps, c.singleton)
        whole = response_certainty(certainty, mask, c.confidence)
        scaled = scaled_certainty(whole, group, c.std, c.eps, c.singleton)
        weight = confidence_weight(advantage, scaled, c.positive, c.negative)
        if not bool(weight.isfinite().all()):
            far = float(scaled.nan_to_num(0.0).abs().max())
            raise UserError(
                f"methods.ucas: a weight of stage 1 overflows, for a certainty {far:.3g} off its group's mean; set "
                "methods.ucas.confidence=mean and methods.ucas.std=sample"
            )
        value = token_advantage(advantage * weight, scaled_logit(logit, mask, c.eps), mask, c.token_penalty)
        dead = dead_groups(reward, group)
        if c.degenerate == "mask":
            value = value.masked_fill(dead[:, None], 0.0)
        self._note(rollout, whole, weight, value, dead)
        return value

    def _note(self, rollout: Rollout, whole: Tensor, weight: Tensor, value: Tensor, dead: Tensor) -> None:
        some = rollout.mask.any(1)
        size = value.abs().sum(1)
        self._figures = {
            "certainty_length_correlation": correlation(whole[some], rollout.mask.sum(1)[some]),
            "weight_min": float(weight.min()),
            "weight_max": float(weight.max()),
            "degenerate_share": float(size[dead].sum() / size.sum()),
        }

    def metrics(self) -> dict[str, float]:
        """Correlation of C with the length in tokens, extremes of the weight of stage 1, and the part of all |A| that
        lies in groups of equal rewards."""
        return dict(self._figures)
