r"""Clip-Cov and KL-Cov: restrain the few tokens that drive entropy down (The Entropy Mechanism, arXiv 2505.22617).

Entropy falls by about Cov(log pi, A) (core.dynamics). Both methods pick tokens by the centred product

    Cov_i = (log pi(y_i) - mean log pi) (A_i - mean A)             over the N tokens of the optimizer minibatch, no grad

Clip-Cov draws n = max(floor(r N), 1) tokens at random among those with omega_low < Cov < omega_high that the clip has
not stopped, and takes them out of the loss (value and gradient; the denominator stays N):

    l_i = c_i max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)),                          c_i = 0 on the selected tokens

KL-Cov takes the max(floor(k N), 1) tokens of largest Cov, has no clip, and penalises them:

    l_i = -A r + beta |log pi - log pi_old| 1[i selected]

On the first, strictly on-policy minibatch r = 1: the penalty has neither value nor gradient there, and KL-Cov is plain
policy gradient. Zero advantages: every Cov is 0, Clip-Cov selects nothing, KL-Cov still selects (ties in canonical row
order). No dual clip in either.

Code: PRIME-RL/Entropy-Mechanism-of-RL @ 8850579; ported to volcengine/verl @ b178a3cd5. Card: entropy_mechanism.md.
Both codes take the statistic over a micro-batch, so that selection depends on its size; here it is the minibatch.

Presets. Clip-Cov `paper`: no clip, closed interval (Eq. 12); `released`: eps = 1 (a ratio in [0, 2]), open interval;
`verl`: its default eps = 0.2, which is not the authors' setting. KL-Cov `paper`: k is a fraction; `released`: a
percentage, capped at the number of tokens as in the original code; `verl`: its defaults k = 2e-4, beta = 0.1. `tiny`:
2 % of the tokens, and for Clip-Cov the interval as quantiles of Cov, because small vocabularies rarely give Cov > 1
[inferred].

Controls of the card are a setting: `selection` picks by Cov, at `random`, or by the `lowest` Cov, the same number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.dynamics import token_covariance
from ..core.losses import Surrogate, clipped_surrogate, importance_ratio
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError, nearest
from ._choices import EmptyChoices
from .base import LossInputs, Method


def clip_cov_candidates(
    covariance_BT: Tensor,
    mask_BT: Tensor,
    omega_low: Tensor | float,
    omega_high: Tensor | float,
    clipped_BT: Tensor | None = None,
    closed: bool = False,
) -> Tensor:
    """Tokens [B, T] that Clip-Cov may select: Cov inside the interval (open unless `closed`), not yet clipped."""
    above = covariance_BT >= omega_low if closed else covariance_BT > omega_low
    below = covariance_BT <= omega_high if closed else covariance_BT < omega_high
    candidates = above & below & mask_BT
    return candidates if clipped_BT is None else candidates & ~clipped_BT


def clip_cov_number(tokens: int, ratio: float) -> int:
    """max(floor(ratio x tokens), 1): the floor of one makes small minibatches select a larger share."""
    return max(int(ratio * tokens), 1)


def select_clip_cov(
    candidates_BT: Tensor, number: int, generator: torch.Generator | None = None, permutation: Tensor | None = None
) -> Tensor:
    """(row, column) of the selected tokens [n, 2]: the first `number` of the candidates, listed row by row, in a
    random order. The order is `permutation` where given (to replay a recorded choice), else drawn from `generator`.

    Raises ValueError where both are missing, or where the permutation has another length than the candidates.
    """
    places = candidates_BT.nonzero()
    if permutation is None:
        if generator is None:
            raise ValueError("the random selection of Clip-Cov needs a generator or a permutation")
        permutation = torch.randperm(len(places), generator=generator, device=generator.device)
    if len(permutation) != len(places):
        raise ValueError(f"the permutation has {len(permutation)} entries for {len(places)} candidates")
    return places[permutation[:number].to(places.device)]


def kl_cov_number(tokens: int, k: float, percent: bool = False) -> int:
    """Tokens that KL-Cov penalises: max(floor(k tokens), 1) for a fraction k; none for k = 0 or for no token.

    With `percent` k is one, and the count is that of the original code, max(floor(tokens min(k, tokens) / 100), 1),
    which compares a percentage with a count and so selects fewer where there are fewer tokens than percent.
    """
    if not k or not tokens:
        return 0
    # the products in the order in which each code writes them: the floor is sensitive to the last bit
    return max(1, int(tokens * min(k, tokens) / 100) if percent else int(tokens * k))


def select_kl_cov(covariance_BT: Tensor, mask_BT: Tensor, number: int) -> Tensor:
    """(row, column) of the `number` marked tokens of largest covariance [n, 2], largest first, ties row by row."""
    places = mask_BT.nonzero()
    order = covariance_BT[mask_BT].argsort(descending=True, stable=True)
    return places[order[:number]]


def place_mask(places: Tensor, like: Tensor) -> Tensor:
    """Boolean matrix shaped as `like`, True at the given (row, column) pairs."""
    mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    mask[places[:, 0], places[:, 1]] = True
    return mask


def kl_cov_loss(
    logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, selected_BT: Tensor, beta: float
) -> Surrogate:
    """-A r + beta |log pi - log pi_old| on the selected tokens [B, T]; nothing is clipped.

    The penalty's gradient is +-beta by the sign of log r, however small it is, and 0 only where the two log-probs are
    equal bit by bit. Log-probs recorded by the sampler differ from a recomputation in the last bits, so "on-policy
    KL-Cov is plain policy gradient" needs `update.recompute_old_logprob: true` (shown in the chapter).
    """
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    penalty = beta * (logprob_BT - old_logprob_BT).abs() * selected_BT
    nowhere = torch.zeros_like(selected_BT, dtype=torch.bool)
    return Surrogate(penalty - advantage_BT * ratio, ratio, nowhere, nowhere)


Selection = Literal["covariance", "random", "lowest"]


def selection_statistic(
    selection: Selection, logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, generator: torch.Generator
) -> Tensor:
    """What tokens are ranked by [B, T]: their Cov, minus it, or random numbers (the card's controls)."""
    if selection == "random":
        draws = torch.rand(int(mask_BT.sum()), generator=generator, device=generator.device).to(logprob_BT)
        return torch.zeros_like(logprob_BT).masked_scatter(mask_BT, draws)
    covariance = token_covariance(logprob_BT, advantage_BT, mask_BT)
    return -covariance if selection == "lowest" else covariance


def _check_selection(selection: str, slug: str) -> None:
    if selection not in get_args(Selection):
        raise UserError(f"methods.{slug}.selection: {nearest(selection, get_args(Selection))}")


@dataclass(frozen=True)
class ClipCovConfig:
    """`ratio` is r; `low` and `high` are the omegas, values of Cov. `low_quantile` and `high_quantile`, where set, take
    their place: quantiles of Cov over the minibatch. `clip_low` and `clip_high` are distances from 1 (`.inf`: no clip).
    """

    ratio: float = 2e-4
    selection: Selection = "covariance"
    low: float = 1.0
    high: float = 5.0
    low_quantile: float | None = None
    high_quantile: float | None = None
    closed: bool = False
    clip_low: float = 1.0
    clip_high: float = 1.0

    def __post_init__(self) -> None:
        _check_selection(self.selection, "clip_cov")
        if not 0 <= self.ratio <= 1:
            raise UserError(f"methods.clip_cov.ratio must be a fraction in [0, 1], not {self.ratio}")
        if not self.low <= self.high:
            raise UserError(f"methods.clip_cov.low must not exceed high, not {self.low} and {self.high}")
        for name in ("low_quantile", "high_quantile"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"methods.clip_cov.{name} must lie in [0, 1] or be null, not {value}")
        if not 0 <= self.clip_low <= 1:
            raise UserError(f"methods.clip_cov.clip_low must lie in [0, 1], not {self.clip_low}")
        if not self.clip_high >= 0:
            raise UserError(f"methods.clip_cov.clip_high must not be negative, not {self.clip_high}")


@dataclass(frozen=True)
class KLCovConfig:
    """`ratio` is k, a fraction of the tokens; `capped_percent` the original code's way to count them."""

    ratio: float = 2e-3
    beta: float = 1.0
    selection: Selection = "covariance"
    capped_percent: bool = False

    def __post_init__(self) -> None:
        _check_selection(self.selection, "kl_cov")
        if not 0 <= self.ratio <= 1:
            raise UserError(f"methods.kl_cov.ratio must be a fraction in [0, 1], not {self.ratio}; 0.2 % is 0.002")
        if not 0 <= self.beta < math.inf:
            raise UserError(f"methods.kl_cov.beta must be finite and not negative, not {self.beta}")


class ClipCov(Method):
    """Selects in `prepare`, takes tokens out by `weight`; owns `clip` and `surrogate` (which has no dual clip)."""

    slug: ClassVar[str] = "clip_cov"
    requires: tuple[str, ...] = ("old_logprob",)
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[ClipCovConfig]] = ClipCovConfig
    presets: ClassVar[Mapping[str, ClipCovConfig]] = {
        "paper": ClipCovConfig(clip_high=math.inf, closed=True),
        "released": ClipCovConfig(),
        "verl": ClipCovConfig(clip_low=0.2, clip_high=0.2),
        "tiny": ClipCovConfig(ratio=0.02, low_quantile=0.9, high_quantile=1.0, closed=True),
    }

    def __init__(self, config: ClipCovConfig | None = None) -> None:
        self.config = config or ClipCovConfig()
        remedy = "no Cov lies between methods.clip_cov.low and high; set low_quantile and high_quantile instead"
        self.empty = EmptyChoices(self.slug, remedy)

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`clip_cov.selected` [B, T], the same tokens whatever the order of rows."""
        order = canonical_order(batch)
        logprob, old, mask, advantage = _in_order(batch, advantage_BT, order, self.slug)
        statistic = selection_statistic(self.config.selection, logprob, advantage, mask, generator)
        low, high = self._interval(statistic[mask])
        bounds = 1 - self.config.clip_low, 1 + self.config.clip_high
        surrogate = clipped_surrogate(logprob, old, advantage, *bounds)
        clipped = surrogate.clipped_low | surrogate.clipped_high
        candidates = clip_cov_candidates(statistic, mask, low, high, clipped, self.config.closed)
        number = clip_cov_number(int(mask.sum()), self.config.ratio)
        places = select_clip_cov(candidates, number, generator)
        self.empty.count(len(places), int(mask.sum()))
        return {"clip_cov.selected": _undo_order(places, order, mask)}

    def _interval(self, values: Tensor) -> tuple[Tensor | float, Tensor | float]:
        low, high = self.config.low_quantile, self.config.high_quantile
        if not len(values):
            return self.config.low, self.config.high
        return (
            self.config.low if low is None else values.quantile(low),
            self.config.high if high is None else values.quantile(high),
        )

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """0 on the selected tokens, 1 elsewhere; the reduction still counts them."""
        return (~batch.require("clip_cov.selected", by=self.slug)).to(advantage_BT.dtype)

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """1 - clip_low and 1 + clip_high; by default a ratio in [0, 2]."""
        return advantage_BT.new_tensor(1 - self.config.clip_low), advantage_BT.new_tensor(1 + self.config.clip_high)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate without dual clip."""
        return clipped_surrogate(inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper)

    def metrics(self) -> dict[str, float]:
        """Minibatches without a chosen token."""
        return self.empty.metrics()

    def notices(self) -> list[str]:
        """Says once that a choice was empty."""
        return self.empty.notices()


class KLCov(Method):
    """Selects in `prepare`; owns the `surrogate`, which ignores the bounds of whoever owns `clip`."""

    slug: ClassVar[str] = "kl_cov"
    requires: tuple[str, ...] = ("old_logprob",)
    needs_current: ClassVar[bool] = True
    learns_without_advantage: ClassVar[bool] = True
    config_class: ClassVar[type[KLCovConfig]] = KLCovConfig
    presets: ClassVar[Mapping[str, KLCovConfig]] = {
        "paper": KLCovConfig(),
        "released": KLCovConfig(capped_percent=True),
        "verl": KLCovConfig(ratio=2e-4, beta=0.1),
        "tiny": KLCovConfig(ratio=0.02),
    }

    def __init__(self, config: KLCovConfig | None = None) -> None:
        self.config = config or KLCovConfig()

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`kl_cov.selected` [B, T]; no random choice unless `selection` asks for one."""
        order = canonical_order(batch)
        logprob, _, mask, advantage = _in_order(batch, advantage_BT, order, self.slug)
        capped = self.config.capped_percent
        k = round(100 * self.config.ratio, 9) if capped else self.config.ratio
        number = kl_cov_number(int(mask.sum()), k, capped)
        statistic = selection_statistic(self.config.selection, logprob, advantage, mask, generator)
        places = select_kl_cov(statistic, mask, number)
        return {"kl_cov.selected": _undo_order(places, order, mask)}

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """-A r plus the penalty on the selected tokens."""
        selected = inputs.rollout.require("kl_cov.selected", by=self.slug)
        return kl_cov_loss(inputs.logprob, inputs.old_logprob, inputs.advantage, selected, self.config.beta)


def _in_order(batch: Rollout, advantage_BT: Tensor, order: Tensor, slug: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Current and old log-probabilities, mask and advantage with rows in canonical order."""
    current, old = (batch.require(name, by=slug)[order].detach() for name in ("current_logprob", "old_logprob"))
    mask = batch.mask[order]
    return current, old.masked_fill(~mask, 0.0), mask, advantage_BT[order]


def _undo_order(places: Tensor, order: Tensor, like: Tensor) -> Tensor:
    return place_mask(torch.stack([order[places[:, 0]], places[:, 1]], 1), like)
