r"""High-entropy (forking) tokens: the policy gradient of the most uncertain positions only (arXiv 2506.01939).

    M_t = 1 on the k = max(1, ceil(rho n)) of the n tokens of the minibatch with the highest entropy H_t
    L   = sum M_t l_t / sum M_t   (`denominator: selected`)      or      sum M_t l_t / n   (`denominator: all`)

H is the entropy in nats of the current policy's distribution from which token t was sampled, at the training
temperature, without gradient. l is the surrogate [B, T]; regularisers see all tokens. The two denominators differ by a
factor of about 1 / rho in the size of the gradient: arXiv v1 and TRL divide by all tokens, the official code by the
selected ones.

Card: papers/high_entropy_tokens.md. Code compared: Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR @ 6f5dda6f
(`get_global_entropy_top_mask`) and huggingface/trl @ f2cd57710 (`top_entropy_quantile`), both per micro-batch or per
call; here the minibatch. The official code gives nan for a response without a selected token under a per-sequence
mean; the `token_mean` that this method owns has no such case. The ceiling is int(n rho + 0.9999), as in the code.

Presets: `paper` divides by all tokens (the formula of arXiv v1 [secondary]); `released` by the selected ones; `trl`
keeps every token at or above the interpolated quantile. Controls are settings: `selection: lowest` with
`ratio: 0.8` (the other 80 %), `selection: random`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.reduce import Reduction, reduction_weights
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ._choices import EmptyChoices
from ._settings import check, check_choice
from .base import Method

Selection = Literal["highest", "lowest", "random"]


def top_count(tokens: int, ratio: float) -> int:
    """max(1, ceil(tokens x ratio)) as the official code rounds it; 0 for no token."""
    return min(tokens, max(1, int(tokens * ratio + 0.9999))) if tokens else 0


def top_mask(values_BT: Tensor, mask_BT: Tensor, ratio: float) -> Tensor:
    """The `top_count` marked tokens of largest value [B, T]; ties go to the earlier row and position."""
    places = mask_BT.nonzero()
    chosen = places[values_BT[mask_BT].argsort(descending=True, stable=True)[: top_count(len(places), ratio)]]
    selected = torch.zeros_like(mask_BT)
    selected[chosen[:, 0], chosen[:, 1]] = True
    return selected


def quantile_mask(values_BT: Tensor, mask_BT: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """TRL's rule: marked tokens at or above the (1 - ratio) quantile, interpolated linearly [B, T], and the threshold.

    All ties at the threshold are kept. No token: nothing is kept, and the threshold is nan.
    """
    values = values_BT[mask_BT]
    if not len(values):
        return torch.zeros_like(mask_BT), values_BT.new_tensor(float("nan"))
    # numpy's rule by hand: torch.quantile refuses more than 16 million values
    place = (1 - ratio) * (len(values) - 1)
    ordered, below = values.sort().values, int(place)
    above = min(below + 1, len(values) - 1)
    threshold = torch.lerp(ordered[below], ordered[above], place - below)
    return (values_BT >= threshold) & mask_BT, threshold


def selected_weights(selected_BT: Tensor, mask_BT: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Factors [B, T] on top of a reduction over `mask_BT` that make it the same reduction over `selected_BT`; a
    response without a selected token drops out of a per-sequence mean, and so does the whole where none is selected."""
    if not bool(selected_BT.any()):
        return torch.zeros(mask_BT.shape, dtype=dtype, device=mask_BT.device)
    wanted = reduction_weights(selected_BT, reduction, dtype=dtype)
    have = reduction_weights(mask_BT, reduction, dtype=dtype)
    return torch.where(selected_BT, wanted / have.masked_fill(~mask_BT, 1.0), torch.zeros_like(wanted))


@dataclass(frozen=True)
class HighEntropyTokensConfig:
    """Settings of the selection. `ratio` is rho, the share of tokens that keep their gradient."""

    ratio: float = 0.2
    denominator: Literal["selected", "all"] = "selected"
    rule: Literal["count", "quantile"] = "count"
    selection: Selection = "highest"

    def __post_init__(self) -> None:
        check(0 <= self.ratio <= 1, "high_entropy_tokens.ratio", "lie in [0, 1]; 20 % is 0.2", self.ratio)
        check_choice(self.denominator, ("selected", "all"), "high_entropy_tokens.denominator")
        check_choice(self.rule, ("count", "quantile"), "high_entropy_tokens.rule")
        check_choice(self.selection, get_args(Selection), "high_entropy_tokens.selection")


class HighEntropyTokens(Method):
    """Selects in `prepare`, masks by `weight`, and owns the reduction: a mean over tokens."""

    slug: ClassVar[str] = "high_entropy_tokens"
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[HighEntropyTokensConfig]] = HighEntropyTokensConfig
    presets: ClassVar[Mapping[str, HighEntropyTokensConfig]] = {
        "paper": HighEntropyTokensConfig(denominator="all"),
        "released": HighEntropyTokensConfig(),
        "trl": HighEntropyTokensConfig(denominator="all", rule="quantile"),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: HighEntropyTokensConfig | None = None) -> None:
        self.config = config or HighEntropyTokensConfig()
        self.empty = EmptyChoices(
            self.slug, "none of them has an advantage; raise methods.high_entropy_tokens.ratio or rollout.group_size"
        )
        self._selected, self._tokens = 0, 0

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`high_entropy_tokens.selected` [B, T], the same tokens whatever the order of rows."""
        order = canonical_order(batch)
        mask = batch.mask[order]
        values = batch.require("current_entropy", by=self.slug)[order].detach()
        if self.config.selection == "random":
            draws = torch.rand(int(mask.sum()), generator=generator, device=generator.device).to(values)
            values = torch.zeros_like(values).masked_scatter(mask, draws)
        elif self.config.selection == "lowest":
            values = -values
        if self.config.rule == "quantile":
            selected, _ = quantile_mask(values, mask, self.config.ratio)
        else:
            selected = top_mask(values, mask, self.config.ratio)
        placed = torch.empty_like(selected)
        placed[order] = selected
        live = batch.mask & advantage_BT.ne(0)
        self.empty.count(int((placed & live).sum()), int(live.sum()))
        self._selected, self._tokens = self._selected + int(placed.sum()), self._tokens + int(mask.sum())
        return {"high_entropy_tokens.selected": placed}

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """0 on the other tokens; on the selected ones 1, or n / k where they alone are the denominator."""
        selected = batch.require("high_entropy_tokens.selected", by=self.slug).bool()
        if self.config.denominator == "all":
            return selected.to(advantage_BT.dtype)
        return selected_weights(selected, batch.mask, "token_mean", advantage_BT.dtype)

    def metrics(self) -> dict[str, float]:
        """`selected`, the share of the step's tokens that kept their gradient, nan for no token; minibatches in which
        no such token has an advantage."""
        share = self._selected / self._tokens if self._tokens else math.nan
        self._selected, self._tokens = 0, 0
        return {"selected": share, **self.empty.metrics()}

    def notices(self) -> list[str]:
        """Says once that a choice was without effect."""
        return self.empty.notices()
