r"""Contrastive preference learning: a policy from preferences by a supervised loss (CPL, arXiv 2310.13639).

Official code: jhejna/cpl, `research/algs/cpl.py` and `cpl_kl.py`. No reward model, no sampling, no RL loop. Under
maximum-entropy RL the optimal advantage is a log-probability, A*(s,a) = alpha ln pi*(a|s); if people prefer the segment
of less regret, which is the larger sum of A*, then with the score of a segment of T steps

    u_i  = alpha sum_{t=1..T} gamma^t l_it          l = ln pi, or ln pi - ln pi_ref with a reference (CPL-KL)
    P(2 preferred to 1) = sigmoid(u_2 - u_1)
    loss = mean over pairs of  y sp(-(u_2 - lambda u_1)) + (1 - y) sp(-(u_1 - lambda u_2)),     sp(x) = ln(1 + e^x)

    grad of u_2, y = 1:  -sigmoid(-(u_2 - lambda u_1)) / pairs;     of u_1: the same times -lambda

Label y in [0, 1]: 1 says that segment 2 is preferred, 1/2 that none is. lambda in (0, 1], the "contrastive bias": below
1 it asks for a high log-probability of what was preferred in absolute terms, and the loss is no longer the same when a
constant is added to all log-probabilities. Nothing is detached. DPO is the case T = 1 with a reference. Steps are
summed, never averaged. For a language model a segment is a response, [B, T] its token log-probabilities with a mask.

Ratings in place of labels: the mean of the loss over all pairs whose ratings differ (the better one as segment 2).
With the reward of a verifier as rating, that is every correct response against every wrong one of its group.

Where the released code departs: gamma is 1, without a setting; equal ratings make a pair in the order of a sort
(`ties="as_sorted"`); a pair whose loss is exactly 0 in floating point leaves the average (`drop_zero=True`); and the
log-probability of a normal head of unit variance lacks the factor 1/2 and the constant (`gaussian_logprob`), so that
an alpha there acts like 2 alpha in the formula above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import UserError

Ties = Literal["leave_out", "as_sorted"]
TIES: tuple[str, ...] = get_args(Ties)
Cloned = Literal["all", "preferred"]


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (low < value <= high) or not math.isfinite(value):
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise UserError(f"{name} must be above {low:g}{most}, not {value}")


@dataclass(frozen=True)
class CPLConfig:
    """Settings of the loss. Raises UserError for a value outside its range."""

    alpha: float = 0.1
    """Temperature of the entropy-regularised optimum, in units of reward per nat."""
    bias: float = 0.5
    """lambda in (0, 1]; 1 is the likelihood of the preference model."""
    gamma: float = 1.0
    """Discount inside a segment; step t = 1..T has weight gamma^t."""
    reference: bool = False
    """CPL-KL: scores are relative to a frozen reference policy."""

    def __post_init__(self) -> None:
        _in_range("alpha", self.alpha, 0.0, math.inf)
        _in_range("bias", self.bias, 0.0, 1.0)
        _in_range("gamma", self.gamma, 0.0, 1.0)


PRESETS = {
    "paper": CPLConfig(alpha=0.1, bias=1.0),
    "released_dense": CPLConfig(alpha=0.1, bias=0.5),  # with ratings
    "released_sparse": CPLConfig(alpha=0.1, bias=0.75),  # with labels
    "released_kl": CPLConfig(alpha=0.2, bias=0.75, reference=True),
}


def _finite(name: str, x: Tensor, shape: torch.Size | None = None) -> None:
    if shape is not None and x.shape != shape:
        raise UserError(f"{name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
    if not x.numel() or not bool(x.isfinite().all()):
        raise UserError(f"{name} must not be empty and must hold finite numbers")


def segment_score(
    logprob_BT: Tensor,
    alpha: float,
    gamma: float = 1.0,
    reference_BT: Tensor | None = None,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """u = alpha sum_t gamma^t (ln pi - ln pi_ref) of each row [B]; masked entries are inert, and t counts the others.

    Raises UserError for a bad alpha or gamma, for shapes that differ, and where a value that counts is not finite.
    """
    _in_range("alpha", alpha, 0.0, math.inf)
    _in_range("gamma", gamma, 0.0, 1.0)
    if logprob_BT.dim() != 2:
        raise UserError(f"logprob must have shape [B, T], not {tuple(logprob_BT.shape)}")
    mask = torch.ones_like(logprob_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    if mask.shape != logprob_BT.shape or mask.dtype != torch.bool:
        raise UserError(f"mask must be boolean and of shape {tuple(logprob_BT.shape)}, not of {tuple(mask.shape)}")
    values = logprob_BT.masked_fill(~mask, 0.0)
    _finite("logprob", values)
    if reference_BT is not None:
        reference = reference_BT.masked_fill(~mask, 0.0) if reference_BT.shape == mask.shape else reference_BT
        _finite("reference", reference, mask.shape)
        values = values - reference
    if gamma != 1.0:
        values = values * gamma ** mask.cumsum(1).to(values.dtype)
    return alpha * values.sum(1)


def pair_loss(score_1_B: Tensor, score_2_B: Tensor, label_B: Tensor, bias: float = 1.0) -> Tensor:
    """The loss of each pair [B]; label 1 says that segment 2 is preferred, 0 that segment 1 is.

    Raises UserError for a bias outside (0, 1], labels outside [0, 1], unequal shapes and values that are not finite.
    """
    _in_range("bias", bias, 0.0, 1.0)
    _finite("score_1", score_1_B)
    _finite("score_2", score_2_B, score_1_B.shape)
    _finite("label", label_B, score_1_B.shape)
    if bool(((label_B < 0) | (label_B > 1)).any()):
        raise UserError("label must lie between 0 and 1")
    second, first = logsigmoid(score_2_B - bias * score_1_B), logsigmoid(score_1_B - bias * score_2_B)
    return -(label_B * second + (1 - label_B) * first)


def cpl_loss(score_1_B: Tensor, score_2_B: Tensor, label_B: Tensor, bias: float = 1.0) -> Tensor:
    """Mean over pairs of `pair_loss`, as released (`biased_bce_with_logits`)."""
    return pair_loss(score_1_B, score_2_B, label_B, bias).mean()


def pair_accuracy(score_1_B: Tensor, score_2_B: Tensor, label_B: Tensor) -> Tensor:
    """Share of pairs whose larger score is the preferred one, without gradient; as released, 1/2 counts as label 0."""
    _finite("label", label_B, score_1_B.shape)
    agrees = (score_2_B > score_1_B) == label_B.round().bool()
    return agrees.to(score_1_B.dtype).mean()


def rated_pairs(rating_N: Tensor, group_id_N: Tensor | None = None, ties: Ties = "leave_out") -> tuple[Tensor, Tensor]:
    """Indices (worse, better) of all pairs inside a group, each once. One group where no ids are given.

    `ties="as_sorted"` also pairs equal ratings, in the order of a stable sort: what the released rank mode does.
    Raises UserError where no pair is left, for instance where a verifier finds all responses equally good.
    """
    _finite("rating", rating_N)
    if ties not in TIES:
        raise UserError(f"ties must be one of {', '.join(TIES)}, not '{ties}'")
    if group_id_N is not None and group_id_N.shape != rating_N.shape:
        raise UserError(f"group_id must have shape {tuple(rating_N.shape)}, not {tuple(group_id_N.shape)}")
    order = torch.argsort(rating_N, stable=True)
    low, high = torch.triu_indices(len(order), len(order), offset=1, device=order.device)
    worse, better = order[low], order[high]
    keep = torch.ones_like(worse, dtype=torch.bool)
    if ties == "leave_out":
        keep &= rating_N[worse] < rating_N[better]
    if group_id_N is not None:
        keep &= group_id_N[worse] == group_id_N[better]
    if not bool(keep.any()):
        raise UserError("rating must differ inside a group: there is no pair to learn from")
    return worse[keep], better[keep]


def rank_loss(
    score_N: Tensor,
    rating_N: Tensor,
    bias: float = 1.0,
    group_id_N: Tensor | None = None,
    ties: Ties = "leave_out",
    drop_zero: bool = False,
) -> Tensor:
    """Mean of the loss over all pairs of rated segments, the better one as segment 2 (`biased_bce_with_scores`).

    With `drop_zero` pairs whose loss is exactly 0 leave the average, as released; if all do, the loss is 0.
    """
    _finite("score", score_N, rating_N.shape)
    worse, better = rated_pairs(rating_N, group_id_N, ties)
    losses = pair_loss(score_N[worse], score_N[better], torch.ones_like(score_N[worse]), bias)
    return losses.sum() / (losses != 0).sum().clamp_min(1) if drop_zero else losses.mean()


def rank_accuracy(
    score_N: Tensor, rating_N: Tensor, group_id_N: Tensor | None = None, ties: Ties = "leave_out"
) -> Tensor:
    """Share of the rated pairs whose better segment has the larger score, without gradient."""
    worse, better = rated_pairs(rating_N, group_id_N, ties)
    return (score_N[better] > score_N[worse]).to(score_N.dtype).mean()


def cloning_loss(
    logprob_1_BT: Tensor, logprob_2_BT: Tensor, label_B: Tensor | None = None, data: Cloned = "all"
) -> Tensor:
    """Behaviour cloning, the mean of -ln pi over steps of all segments or of the preferred ones (a tie gives both)."""
    _finite("logprob_1", logprob_1_BT)
    _finite("logprob_2", logprob_2_BT, logprob_1_BT.shape)
    if data == "all":
        return -torch.cat([logprob_1_BT, logprob_2_BT]).mean()
    if data != "preferred":
        raise UserError(f"data must be 'all' or 'preferred', not '{data}'")
    if label_B is None or label_B.shape != logprob_1_BT.shape[:1]:
        raise UserError("label must have one entry for each pair where only preferred segments are cloned")
    return -torch.cat([logprob_1_BT[label_B <= 0.5], logprob_2_BT[label_B >= 0.5]]).mean()


def labelled_loss(
    logprob_1_BT: Tensor,
    logprob_2_BT: Tensor,
    label_B: Tensor,
    config: CPLConfig,
    reference_1_BT: Tensor | None = None,
    reference_2_BT: Tensor | None = None,
    mask_1_BT: Tensor | None = None,
    mask_2_BT: Tensor | None = None,
) -> Tensor:
    """The loss of labelled pairs under a config, from log-probabilities. Raises UserError for a missing reference."""
    u1 = _score(logprob_1_BT, config, reference_1_BT, mask_1_BT)
    u2 = _score(logprob_2_BT, config, reference_2_BT, mask_2_BT)
    return cpl_loss(u1, u2, label_B, config.bias)


def rated_loss(
    logprob_BT: Tensor,
    rating_B: Tensor,
    config: CPLConfig,
    reference_BT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    group_id_B: Tensor | None = None,
) -> Tensor:
    """The loss of rated segments under a config: for a language model, responses with rewards and prompt groups.

    Raises UserError for a missing reference, and where no two responses of a group differ in their rating.
    """
    return rank_loss(_score(logprob_BT, config, reference_BT, mask_BT), rating_B, config.bias, group_id_B)


def _score(logprob_BT: Tensor, config: CPLConfig, reference_BT: Tensor | None, mask_BT: Tensor | None) -> Tensor:
    if config.reference and reference_BT is None:
        raise UserError("reference must be given: this config compares with a reference policy")
    reference = reference_BT if config.reference else None
    return segment_score(logprob_BT, config.alpha, config.gamma, reference, mask_BT)


def gaussian_logprob(mean: Tensor, action: Tensor, released: bool = True) -> Tensor:
    """ln N(action; mean, I) over the last axis; as released -|a - mu|^2, without the factor 1/2 and the constant."""
    _finite("action", action, mean.shape)
    squared = (action - mean).square().sum(-1)
    return -squared if released else -0.5 * squared - 0.5 * mean.shape[-1] * math.log(2 * math.pi)
