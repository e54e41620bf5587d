r"""SIREN: hold the entropy of the uncertain positions near where it began (arXiv 2509.25133).

    H_t  = entropy of the renormalised nucleus (core.entropy.nucleus_entropy, top_p 0.8), of the policy being updated
    M_it = 1 where H_it > the tau-quantile of the response's own H (strict, linear interpolation), tau = 0.8
    Hbar = mean over the B responses of  sum_t M_it H_it / sum_t M_it,     0 for a response without a marked position
    term = beta (Hbar - H_0)^2,            H_0: Hbar of the first whole rollout, by the policy the run started from

Nats; H, M [B, T]. Only this term is masked, never the surrogate. Hbar spans the minibatch, so the term is handed to
micro-batches through its exact gradient 2 beta (Hbar - H_0) grad Hbar, and its value is their sum.

Card: papers/siren.md. Code compared: Linn3a/siren @ fa59a8d, which squares per micro-batch, so that its target moves
with the micro-batch size; its nucleus leaves out the token that crosses top_p (`include_crossing: false`); its quantile
mask may mark the place after the end token, ours never does. The paper's nucleus convention could not be confirmed
[secondary].

Presets: `paper` the usual nucleus [inferred]; `released` the code's. `tiny` beta 0.5, because the gradient of a squared
gap of 0.1 nat is tiny [inferred]. Ablations are settings: `top_p: null` (whole vocabulary), `quantile: null` (every
position), `peaks_by: full` (positions by full entropy), `anchor: none` (-Hbar, the naive bonus), `anchor: adaptive` (a
coefficient that follows H_0 - Hbar). The base of the paper is `dr_grpo`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.entropy import entropy_of_log, nucleus_entropy
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._choices import EmptyChoices
from ._settings import check, check_choice
from .base import LossInputs, Method

Anchor = Literal["square", "none", "adaptive"]


def row_quantile(values_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """Quantile of the marked values of each row [B], interpolated linearly; nan for an empty row."""
    return values_BT.detach().masked_fill(~mask_BT, math.nan).nanquantile(quantile, dim=1)


def peak_mask(values_BT: Tensor, mask_BT: Tensor, quantile: float | None) -> Tensor:
    """Marked positions strictly above their row's quantile [B, T]; every marked position for None.

    A row of one token, or of equal values, has none.
    """
    if quantile is None:
        return mask_BT
    return (values_BT.detach() > row_quantile(values_BT, mask_BT, quantile)[:, None]) & mask_BT


def peak_weights(peaks_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [B, T] with which Hbar = (weights * H).sum(): 1 / (B x peaks of the row)."""
    return peaks_BT.to(dtype) / (peaks_BT.sum(1, keepdim=True).clamp_min(1) * max(len(peaks_BT), 1))


@dataclass(frozen=True)
class SirenConfig:
    """Settings. `coefficient` is beta, `quantile` tau; `rate` moves the coefficient of `anchor: adaptive`."""

    coefficient: float = 0.005
    top_p: float | None = 0.8
    top_k: int | None = 10_000
    include_crossing: bool = True
    quantile: float | None = 0.8
    peaks_by: Literal["nucleus", "full"] = "nucleus"
    anchor: Anchor = "square"
    rate: float = 0.005

    def __post_init__(self) -> None:
        check(self.coefficient >= 0, "siren.coefficient", "not be negative", self.coefficient)
        check(self.top_p is None or 0 < self.top_p <= 1, "siren.top_p", "lie in (0, 1] or be null", self.top_p)
        check(self.top_k is None or self.top_k > 0, "siren.top_k", "be positive or null", self.top_k)
        q = self.quantile
        check(q is None or 0 <= q < 1, "siren.quantile", "lie in [0, 1), since nothing is above the largest", q)
        check_choice(self.peaks_by, ("nucleus", "full"), "siren.peaks_by")
        check_choice(self.anchor, ("square", "none", "adaptive"), "siren.anchor")
        check(self.rate >= 0, "siren.rate", "not be negative", self.rate)


class Siren(Method):
    """A regulariser on `siren.entropy`, which it reads from the logits; keeps the anchor."""

    slug: ClassVar[str] = "siren"
    config_class: ClassVar[type[SirenConfig]] = SirenConfig
    presets: ClassVar[Mapping[str, SirenConfig]] = {
        "paper": SirenConfig(),
        "released": SirenConfig(include_crossing=False),
        "tiny": SirenConfig(coefficient=0.5),
    }
    regularise_reduction: Reduction | None = "sequence_mean_of_token_sum"

    def __init__(self, config: SirenConfig | None = None) -> None:
        self.config = config or SirenConfig()
        self.anchor: float | None = None
        self.coefficient = 0.0  # of the adaptive baseline
        remedy = "no position lies above its response's quantile; lower methods.siren.quantile"
        self.empty = EmptyChoices(self.slug, remedy)

    def read_logits(self, log_p_bTV: Tensor, ids_bT: Tensor) -> dict[str, Tensor]:
        """The entropy that is regularised, with gradient, and the one that chooses positions."""
        c = self.config
        full = entropy_of_log(log_p_bTV)
        if c.top_p is None:
            return {"siren.entropy": full, "siren.chooser": full.detach()}
        own = nucleus_entropy(log_p_bTV, c.top_p, c.top_k, c.include_crossing)
        return {"siren.entropy": own, "siren.chooser": (full if c.peaks_by == "full" else own).detach()}

    read_old_logits = read_logits

    def filter(self, rollout: Rollout) -> Rollout:
        """Changes nothing; takes the anchor from the first rollout."""
        if self.anchor is None:
            value, _ = self._mean(rollout)
            self.anchor = float(value)
        return rollout

    def _mean(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Hbar, and the weights [B, T] that make it."""
        entropy, chooser = (rollout.require(f"siren.{name}", by=self.slug) for name in ("entropy", "chooser"))
        weights = peak_weights(peak_mask(chooser, rollout.mask, self.config.quantile), entropy.dtype)
        return (weights * entropy.masked_fill(~rollout.mask, 0.0)).sum(), weights

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Per position: d term / d H, and the position's share of the term's value; both over the minibatch."""
        mean, weights = self._mean(batch)
        self.empty.count(int(weights.ne(0).sum()), int(batch.mask.sum()))
        slope, value = self._slope(float(mean))
        # the reduction divides by the responses that are not empty, Hbar by all
        scale = batch.mask.any(1).sum() * weights
        share = value / float(weights.sum()) if bool(weights.any()) else 0.0
        return {"siren.slope": slope * scale, "siren.value": share * scale}

    def _slope(self, mean: float) -> tuple[float, float]:
        """Derivative of the term by Hbar, and its value."""
        gap, c = mean - (self.anchor or 0.0), self.config
        if c.anchor == "square":
            return 2 * c.coefficient * gap, c.coefficient * gap**2
        if c.anchor == "adaptive":
            self.coefficient = max(0.0, self.coefficient - c.rate * gap)
            return -self.coefficient, -self.coefficient * mean
        return -c.coefficient, -c.coefficient * mean

    def regularise(self, inputs: LossInputs) -> Tensor:
        """Per token [b, T]; summed over the minibatch it has the value and the gradient of the term."""
        entropy = inputs.statistics["siren.entropy"]
        slope, value = (inputs.rollout.require(f"siren.{name}", by=self.slug) for name in ("slope", "value"))
        return slope * (entropy - entropy.detach()) + value

    def metrics(self) -> dict[str, float]:
        """`anchor` H_0, nan before the first rollout; minibatches without a marked position."""
        return {"anchor": math.nan if self.anchor is None else self.anchor, **self.empty.metrics()}

    def notices(self) -> list[str]:
        """Says once that no position was marked."""
        return self.empty.notices()

    def state_dict(self) -> dict[str, Any]:
        """Anchor and adaptive coefficient."""
        return {"anchor": self.anchor, "coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's anchor."""
        self.anchor, self.coefficient = state["anchor"], float(state["coefficient"])
