r"""Entropy minimisation at test time, and the wisdom-of-crowds filter that stops its collapse.

A classifier meets data from elsewhere, without labels. TENT (arXiv 2006.10726) takes the only signal there is, its own
entropy, and turns it down by gradient steps on the gains and offsets of the normalisation layers:

    H(y) = -sum_c y_c ln y_c,    dH / dz_c = -y_c (ln y_c + H)                     (nats, y = softmax(z))

Whatever the class of a sample is, its largest logit is driven up. The filter ("Towards Open-Set Test-Time Adaptation
Utilizing the Wisdom of Crowds in Entropy Minimization", Lee, Das, Choo and Choi, ICCV 2023, arXiv 2308.06879) keeps a
frozen copy of the source model and lets a sample take part while it has not lost confidence:

    c_o = argmax_c y0_c,    phi = 1[y_{c_o} >= y0_{c_o}],    loss = (1 / B) sum_i phi_i H(y_i)

| symbol | meaning | shape |
|---|---|---|
| y0, y | class probabilities of the frozen source model and of the adapting one | [B, C] |
| c_o | class that the **source** model prefers | [B] |
| phi | 1 where the sample is kept; no gradient passes through it | [B] |

At step 0 the models are equal and every sample is kept (>=, not >). The rule is known from secondary sources that
agree with the abstract; that the loss is divided by the whole batch B and not by the kept samples is [inferred].

No code was released. Two readings of the rule differ from it here by option: `reference="adapted"` takes the class that
the adapting model prefers, so that a sample that has changed its mind is rewarded for it; `average="kept"` divides by
the number of kept samples. The demonstration with its controls is in `open_set_tta_demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.entropy import softmax_entropy
from ..errors import UserError

Reference = Literal["original", "adapted"]
Average = Literal["batch", "kept"]


@dataclass(frozen=True)
class Choice:
    """What the filter saw in a batch: `[B]` each."""

    reference: Tensor
    """Class whose confidence is compared."""
    original: Tensor
    """Confidence of the frozen source model in that class."""
    adapted: Tensor
    """Confidence of the adapting model in that class."""
    keep: Tensor
    """True where the adapting model is at least as confident."""

    @property
    def change(self) -> Tensor:
        """Confidence of the adapting model minus that of the source model, in [-1, 1]."""
        return self.adapted - self.original


def _logits(name: str, value: Tensor) -> None:
    if value.ndim < 2 or not value.numel() or not torch.is_floating_point(value):
        raise UserError(f"{name} must be floating-point logits [..., classes], not empty; got {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{name} must be finite: it holds nan or infinity")


def wisdom_filter(original: Tensor, adapted: Tensor, reference: Reference = "original") -> Choice:
    """Which samples have not lost confidence. Both logits `[..., C]`: of samples, or of pixels too.

    `reference` names the model whose preferred class is compared: the original one in the paper. No gradient passes.
    Raises UserError where the shapes differ, for logits that are not finite, and for an unknown reference.
    """
    _logits("original", original)
    _logits("adapted", adapted)
    if original.shape != adapted.shape:
        raise UserError(f"adapted must have the shape of original, {tuple(original.shape)}; got {tuple(adapted.shape)}")
    if reference not in get_args(Reference):
        raise UserError(f"reference must be 'original' or 'adapted', not {reference!r}")
    with torch.no_grad():
        before, after = original.softmax(-1), adapted.softmax(-1)
        chosen = (before if reference == "original" else after).argmax(-1, keepdim=True)
        low, high = before.gather(-1, chosen).squeeze(-1), after.gather(-1, chosen).squeeze(-1)
        return Choice(chosen.squeeze(-1), low, high, high >= low)


def filtered_entropy(logits: Tensor, keep: Tensor, average: Average = "batch") -> Tensor:
    """Entropy of the kept samples, in nats, over the whole batch (`batch`) or over the kept ones (`kept`).

    `keep` is boolean, of the shape of `logits` without its last axis. TENT is `keep` all True. Where nothing is kept
    the loss is 0, with gradient 0, in both averages. Raises UserError for a mask of another shape or type.
    """
    _logits("logits", logits)
    if keep.dtype != torch.bool or keep.shape != logits.shape[:-1]:
        raise UserError(f"keep must be boolean with shape {tuple(logits.shape[:-1])}; got {keep.dtype} "
                        f"{tuple(keep.shape)}")  # fmt: skip
    if average not in get_args(Average):
        raise UserError(f"average must be 'batch' or 'kept', not {average!r}")
    total = (softmax_entropy(logits) * keep).sum()
    return total / (keep.numel() if average == "batch" else max(1, int(keep.sum())))


def entropy_split(logits: Tensor) -> tuple[float, float]:
    """Mean entropy of the samples, and entropy of their mean prediction, in nats; logits `[B, C]`.

    The second minus the first is the mutual information between sample and prediction: 0 where every sample gets the
    same prediction, and never negative. Turning the first down does not say what becomes of the second.
    """
    _logits("logits", logits)
    y = logits.softmax(-1).reshape(-1, logits.shape[-1]).mean(0)
    return float(softmax_entropy(logits).mean()), float(-torch.special.xlogy(y, y).sum())


def auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counted half: 0.5 says that the score knows nothing.

    `score` and `positive` are `[N]`. Raises UserError unless both kinds occur, and where a score is nan.
    """
    if score.ndim != 1 or positive.shape != score.shape or positive.dtype != torch.bool:
        raise UserError(f"positive must be boolean with the shape of score, [N]; got {positive.dtype} "
                        f"{tuple(positive.shape)} for {tuple(score.shape)}")  # fmt: skip
    if bool(torch.isnan(score).any()) or not bool(positive.any()) or bool(positive.all()):
        raise UserError("auroc needs scores that are not nan, and at least one positive and one negative sample")
    low = score[~positive].sort().values
    high = score[positive]
    below, not_above = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return float((below + not_above).double().mean() / (2 * len(low)))
