r"""RiskPO: a risk-averse functional of the scores of bundles of questions as the advantage (arXiv 2510.00911).

B questions with G responses each form a bundle. Response xi_i(j) of question i, xi_i a random permutation, goes to slot
j, and R_j is the sum of a slot's rewards. With q_a, q_b the quantiles of R at levels 0 < a < b < 1 (mixed
value-at-risk; the closed form is [inferred] from the stated theorem):

    A_j = -(1 + omega) (q_a - R_j)+  +  (R_j - q_a)+ - (R_j - q_b)+ + q_a - q_b        <= 0, and 0 where R_j >= q_b
    q_s <- q_s + gamma (s - mean_j 1[R_j < q_s])          after use; the first batch's own quantiles start it

A_j stands on every token [B, T] of the slot's responses, under a clipped sequence ratio (that of `gspo`).

Card: papers/riskpo.md. Code compared: RTkenny/RiskPO @ 65ec40c. It divides tail and body by their widths and mixes
them with w = `tail_weight`: A = (w tail / a + body / (b - a)) / (w + 1), so that 1 + omega = w (b - a) / a [inferred],
4.5 at its settings. **Its tracked quantiles are written into a batch that is then discarded**, so that each bundle is
judged by its own G scores (`quantile_source: bundle`); slots follow the batch order (`permute: false`); the loss is the
ordinary token ratio (`surrogate: token` leaves clip, loss and reduction to the base). It divides by the bundle's
standard deviation (`divide_by_std`; here not where that is at most `std_floor`: with tracked quantiles it would
multiply by 1e6) and spreads A over the members (`credit`): `score` 1.5 or 0.5 for wrong or right ones, `std` over the
question's spread, `sum-mean` by rho_i / sum rho with rho = reward - question mean, which can turn signs around.

Presets: `paper`; `released` (hard mathematics: no baseline q_a - q_b, `sum-mean`), `released_easy` (levels 0.2 / 0.9,
`std`); `tiny` (paper with bundles of 4 and the base's loss). Controls: `functional: seeking` weighs the upper tail;
`negative_only` is GRPO's min(A, 0): every averse advantage is negative, and this says what the sign alone does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_advantage, group_sums
from ..core.losses import Surrogate, gspo_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError
from ._bundles import Bundles, consecutive_bundles, form_bundles, slots
from ._draws import StepDraws
from ._settings import bounds, check, check_choice
from .base import LossInputs, Method

Functional = Literal["averse", "seeking", "body", "negative_only"]
Scale = Literal["plain", "levels"]
Credit = Literal["uniform", "score", "std", "sum-mean"]
LEAST_STD, LEAST_SUM = 1e-3, 1e-6


def window(score: Tensor, low: Tensor | float, high: Tensor | float, baseline: bool = True) -> Tensor:
    """(R - low)+ - (R - high)+, and with `baseline` + low - high, which puts it into [low - high, 0]."""
    value = (score - low).clamp_min(0.0) - (score - high).clamp_min(0.0)
    return value + low - high if baseline else value


def mixed_value_at_risk(score: Tensor, low: Tensor | float, high: Tensor | float, omega: float) -> Tensor:
    """The paper's advantage of a score, of any shape; `low` and `high` are q_a and q_b. Never positive."""
    return -(1 + omega) * (low - score).clamp_min(0.0) + window(score, low, high)


def risk_advantage(
    score: Tensor,
    low: Tensor,
    high: Tensor,
    levels: tuple[float, float],
    functional: Functional = "averse",
    scale: Scale = "plain",
    tail_weight: float = 1.5,
    baseline: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of a score: body plus weighted lower (averse) or upper (seeking) tail, or the body alone.

    `plain` is the paper's sum with the tail at `tail_weight` times the ratio of the widths, `levels` the release's.
    """
    body = window(score, low, high, baseline)
    width = levels[1] - levels[0]
    tail_width = levels[0] if functional == "averse" else 1 - levels[1]
    tail = -(low - score).clamp_min(0.0) if functional == "averse" else (score - high).clamp_min(0.0)
    if functional == "body":
        return body if scale == "plain" else body / (width + eps)
    if scale == "plain":
        return tail_weight * width / tail_width * tail + body
    return (tail_weight * tail / (tail_width + eps) + body / (width + eps)) / (tail_weight + 1)


def own_quantiles(bundles: Bundles, levels: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Quantiles of the scores of each slot's own bundle, both [N], linearly interpolated."""
    at = torch.tensor(levels, dtype=bundles.score.dtype, device=bundles.score.device)
    found = torch.empty(2, len(bundles.score), dtype=bundles.score.dtype, device=bundles.score.device)
    for number in torch.unique(bundles.bundle):
        own = bundles.bundle == number
        found[:, own] = bundles.score[own].quantile(at)[:, None]
    return found[0], found[1]


def track(quantiles: Tensor, levels: Tensor, score_N: Tensor, rate: float) -> Tensor:
    """q + rate (level - share of the scores below q), for every level [Q]."""
    below = (score_N < quantiles[:, None]).to(quantiles.dtype).mean(1)
    return quantiles + rate * (levels - below)


def _std(values: Tensor, label: Tensor) -> Tensor:
    """Sample standard deviation of each value's own class; 1 where it is alone."""
    sums, sizes, _ = group_sums(values, label)
    squares, _, _ = group_sums((values - sums / sizes).square(), label)
    return (squares / (sizes - 1).clamp_min(1)).sqrt().masked_fill(sizes == 1, 1.0)


def divide_by_bundle_std(value_N: Tensor, bundles: Bundles, floor: float = LEAST_STD, eps: float = 1e-6) -> Tensor:
    """Advantages [N] over the standard deviation of their bundle's scores; left alone where that is at most `floor`."""
    spread = _std(bundles.score, bundles.bundle)
    return torch.where(spread > floor, value_N / (spread + eps), value_N)


def assign_credit(
    value_N: Tensor, bundles: Bundles, reward_B: Tensor, group_id_B: Tensor, mode: Credit, eps: float = 1e-6
) -> Tensor:
    """Each response's part [B] of its slot's advantage; see the module's head."""
    value = value_N[bundles.index]
    if mode == "score":
        return torch.where(reward_B > 0, 0.5, 1.5).to(value.dtype) * value
    if mode == "std":
        spread = _std(reward_B, group_id_B)
        return value / (torch.where(spread <= LEAST_STD, 1.0, spread) + eps)
    if mode == "sum-mean":
        sums, sizes, _ = group_sums(reward_B, group_id_B)
        rho = reward_B - sums / sizes
        total = torch.zeros_like(value_N).index_add_(0, bundles.index, rho)[bundles.index]
        even = total.abs() <= LEAST_SUM
        return torch.where(even, value / bundles.members[bundles.index], value * rho / total.masked_fill(even, 1.0))
    return value


@dataclass(frozen=True)
class RiskPOConfig:
    """Settings: `low` and `high` are the levels a and b, `rate` is gamma, `clip` the distance of both bounds from 1."""

    bundle_size: int = 5
    low: float = 0.2
    high: float = 0.8
    functional: Functional = "averse"
    scale: Scale = "plain"
    tail_weight: float = 1.5
    baseline: bool = True
    quantile_source: Literal["tracked", "bundle"] = "tracked"
    rate: float = 0.1
    credit: Credit = "uniform"
    divide_by_std: bool = False
    std_floor: float = LEAST_STD
    permute: bool = True
    seed: int = 0
    surrogate: Literal["sequence", "token"] = "sequence"
    clip: float = 0.2

    def __post_init__(self) -> None:
        whole = isinstance(self.bundle_size, int) and self.bundle_size >= 1
        check(whole, "riskpo.bundle_size", "be a whole number of at least 1", self.bundle_size)
        check(0 < self.low < self.high < 1, "riskpo.low", "satisfy 0 < low < high < 1", self.low)
        check_choice(self.functional, get_args(Functional), "riskpo.functional")
        check_choice(self.scale, get_args(Scale), "riskpo.scale")
        check(self.tail_weight >= 0, "riskpo.tail_weight", "not be negative", self.tail_weight)
        check_choice(self.quantile_source, ("tracked", "bundle"), "riskpo.quantile_source")
        check(0 < self.rate <= 1, "riskpo.rate", "lie in (0, 1]", self.rate)
        check_choice(self.credit, get_args(Credit), "riskpo.credit")
        check(self.std_floor >= 0, "riskpo.std_floor", "not be negative", self.std_floor)
        check_choice(self.surrogate, ("sequence", "token"), "riskpo.surrogate")
        check(0 < self.clip <= 1, "riskpo.clip", "lie in (0, 1]", self.clip)


class RiskPO(Method):
    """Owns `advantage`, and with the sequence ratio also `clip`, `surrogate` and the reduction; `observe` tracks."""

    slug: ClassVar[str] = "riskpo"
    requires: tuple[str, ...] = ("reward", "old_logprob")
    config_class: ClassVar[type[RiskPOConfig]] = RiskPOConfig
    presets: ClassVar[Mapping[str, RiskPOConfig]] = {
        "paper": RiskPOConfig(),
        "released": RiskPOConfig(
            scale="levels", baseline=False, quantile_source="bundle", credit="sum-mean", divide_by_std=True,
            permute=False, surrogate="token",
        ),
        "released_easy": RiskPOConfig(
            high=0.9, scale="levels", quantile_source="bundle", credit="std", divide_by_std=True, permute=False,
            surrogate="token",
        ),
        "tiny": RiskPOConfig(bundle_size=4, surrogate="token"),
    }  # fmt: skip

    def __init__(self, config: RiskPOConfig | None = None) -> None:
        self.config = config or RiskPOConfig()
        own_loss = self.config.surrogate == "sequence"
        self.reduction: Reduction | None = "sequence_mean_of_token_mean" if own_loss else None
        self.draws = StepDraws(self.config.seed)
        self.quantiles: list[float] | None = None
        self._scores: Tensor | None = None
        self._last: dict[str, float] = {}

    def has(self, hook: str) -> bool:
        """The token ratio leaves clip and surrogate to the base."""
        own = hook not in ("clip", "surrogate") or self.config.surrogate == "sequence"
        return own and super().has(hook)

    def advantage(self, rollout: Rollout) -> Tensor:
        """A_j, or the member's part of it, on every token [B, T]. Changes no state: `observe` updates the quantiles.

        Raises UserError for fewer groups than a bundle has, and for a bundle whose groups differ in size.
        """
        reward, c = rollout.require("reward", by=self.slug), self.config
        if c.functional == "negative_only":
            value = group_advantage(reward, rollout.group_id).clamp_max(0.0)
            self._last = {"negative": float((value < 0).float().mean())}
        else:
            value = self._bundle_advantage(rollout, reward)
        return value[:, None].expand(rollout.response_ids.shape)

    def _bundle_advantage(self, rollout: Rollout, reward: Tensor) -> Tensor:
        c = self.config
        bundles = self._bundles(rollout, reward)
        low, high = self._quantiles(bundles)
        levels = (c.low, c.high)
        value = risk_advantage(bundles.score, low, high, levels, c.functional, c.scale, c.tail_weight, c.baseline)
        if c.divide_by_std:
            value = divide_by_bundle_std(value, bundles, c.std_floor)
        self._scores = bundles.score
        self._last = {
            "quantile_low": float(low.mean()),
            "quantile_high": float(high.mean()),
            "score": float(bundles.score.mean()),
            "negative": float((value < 0).float().mean()),
        }
        return assign_credit(value, bundles, reward, rollout.group_id, c.credit)

    def _bundles(self, rollout: Rollout, reward: Tensor) -> Bundles:
        c, group = self.config, rollout.group_id
        groups = len(torch.unique(group))
        if rollout.bundle_id is None and groups < c.bundle_size:
            raise UserError(
                f"methods.riskpo.bundle_size is {c.bundle_size}, but this rollout has {groups} groups; lower it, or "
                "raise rollout.prompts"
            )
        bundle = consecutive_bundles(group, c.bundle_size) if rollout.bundle_id is None else rollout.bundle_id
        # without a permutation the order of the content stands for that of the batch, which carries no meaning
        key = self.draws.per_response(rollout) if c.permute else canonical_order(rollout).argsort()
        found = form_bundles(reward, bundle, slots(key, group))
        questions = torch.tensor(
            [len(torch.unique(group[bundle == b])) for b in torch.unique(bundle)], device=group.device
        )
        if bool((found.members != questions[found.bundle]).any()):
            raise UserError(
                "method 'riskpo' adds up the j-th responses of a bundle's questions, and here these have unequal "
                "numbers of responses; leave out the method that drops single responses, or set "
                "methods.riskpo.bundle_size=1"
            )
        if c.quantile_source == "tracked":
            # a smaller last bundle is measured on the scale of a whole one, which the tracked quantiles are on
            found = Bundles(found.score * (questions.max() / found.members), found.bundle, found.index)
        return found

    def _quantiles(self, bundles: Bundles) -> tuple[Tensor, Tensor]:
        c = self.config
        if c.quantile_source == "bundle":
            return own_quantiles(bundles, (c.low, c.high))
        at = self._start(bundles.score) if self.quantiles is None else bundles.score.new_tensor(self.quantiles)
        return at[0].expand_as(bundles.score), at[1].expand_as(bundles.score)

    def _start(self, score_N: Tensor) -> Tensor:
        return score_N.quantile(score_N.new_tensor([self.config.low, self.config.high]))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take the step's scores into the tracked quantiles, after they were used; the next step permutes anew."""
        self.draws.step += 1
        score, self._scores = self._scores, None
        if score is None or self.config.quantile_source == "bundle":
            return
        if self.quantiles is None:
            self.quantiles = self._start(score).tolist()
            return
        levels = torch.tensor([self.config.low, self.config.high], dtype=torch.float64)
        old = torch.tensor(self.quantiles, dtype=torch.float64)
        self.quantiles = track(old, levels, score.double().cpu(), self.config.rate).tolist()

    def metrics(self) -> dict[str, float]:
        """Mean quantiles used, mean score, and the share of slots (negative-only: responses) with A < 0."""
        names = ("quantile_low", "quantile_high", "score", "negative")
        return {name: self._last.get(name, math.nan) for name in names}

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant bounds of the sequence ratio."""
        return bounds(1 - self.config.clip, 1 + self.config.clip, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped sequence ratio, without a limit on it."""
        return gspo_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.rollout.mask, inputs.lower, inputs.upper, None
        )

    def state_dict(self) -> dict[str, Any]:
        """The tracked quantiles and the number of steps."""
        return {"quantiles": self.quantiles} | self.draws.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's quantiles and steps."""
        found = state["quantiles"]
        self.quantiles = None if found is None else [float(value) for value in found]
        self.draws.load_state_dict(state)
