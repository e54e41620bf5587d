r"""Early exit with gates and classifiers trained for each other (JEI-DNN).

A network of L + 1 exits spends more compute the later a sample leaves it. "Jointly-Learned Exit and Inference for a
Dynamic Neural Network" (Regol, Chataoui and Coates, ICLR 2024, arXiv 2310.09163; code networkslab/dynn, read at 8dd598d
for the golden file) replaces the usual threshold on one confidence by a small gate at each exit but the last:

    m_l = (max p, H(p), p_(1) - p_(2), H(q)),   q_c = p_c^2 / sum_k p_k^2,   g_l = sigmoid(w_l . m_l + b_l)

with p the class probabilities of exit l, and entropies in nats, not normalised. From the gates (code; the paper may
write it in another form) come the chance to leave at exit l, and the chance to leave there having come so far:

    P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)),    P~_l = P_l / prod_{j<l} (1 - P~_j) = P_l / (1 - sum_{j<l} P_j)

What remains leaves at the end. At inference a sample leaves at the first l with P~_l >= 1/2. The objective is
min E sum_l P_l (CE_l + lambda c_l), c_l the cost of exit l (1 at the end). It is solved in turns:

    gates:        l* = argmin_l (CE_l + lambda c_l),  T_l = 1[l >= l*],  mean of BCE(g_l, T_l) over samples and l <= L
    classifiers:  mean over samples and l <= L of P_l CE_l sg[ sum_k CE_k / sum_k P_k CE_k ]      (sg: no gradient)

| symbol | shape | | symbol | shape |
|---|---|---|---|---|
| gate inputs m | [B, L, 4] | | cross-entropies CE (nats) | [B, L + 1] |
| gate logits, P, T | [B, L] | | cost c | [L + 1] |

**The released code leaves out sg.** Then the sum over l is sum_l CE_l whatever P is: value and gradient are those of
the unweighted mean, and the gates have no say in how the classifiers are trained (`ratio="released"`). The default,
`ratio="detached"`, is what the code seems to intend [inferred]; its gradient is sum_k CE_k (held) times that of
ln sum_l P_l CE_l, which is no proper score and asks for more confidence than is due. `ratio="unscaled"` is the gradient
of the objective itself. Where every P_l of a sample is exactly 0, so that it always goes to the end, the code divides 0
by 0; here the denominator is held above 0 and the sample counts nothing.
The demonstration with its controls is in `jei_dnn_demo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..core.entropy import softmax_entropy
from ..errors import UserError
from ._checks import finite

Ratio = Literal["detached", "released", "none", "unscaled"]
MEASURES = ("largest probability", "entropy", "margin", "entropy of squares")
"""The four gate inputs in their order."""


def gate_inputs(logits: Tensor) -> Tensor:
    """The four measures of certainty `[..., 4]` of class logits `[..., C]`, detached; entropies in nats.

    The squared and renormalised probabilities are the softmax of twice the logits. Raises UserError for fewer than two
    classes and for logits that are not finite.
    """
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise UserError(f"logits must have at least two classes on the last axis; got shape {tuple(logits.shape)}")
    finite("logits", logits)
    values = logits.detach()
    top = values.softmax(-1).topk(2, dim=-1).values
    measures = (top[..., 0], softmax_entropy(values), top[..., 0] - top[..., 1], softmax_entropy(2 * values))
    return torch.stack(measures, dim=-1)


def exit_probabilities(gate_logits: Tensor) -> Tensor:
    """P_l `[B, L]` for the exits before the last; the last one gets 1 - sum_l P_l, which is never negative."""
    finite("gate_logits", gate_logits, 2)
    gates = gate_logits.sigmoid()
    before = gates.cumsum(1) - gates
    return torch.minimum(gates, 1 - before).clamp_min(0)


def conditional_probabilities(p_exit: Tensor) -> Tensor:
    """P~_l `[B, L]`: the chance to leave at exit l for a sample that has come so far; 0 where none comes so far."""
    _probabilities(p_exit)
    left = 1 - (p_exit.cumsum(1) - p_exit)
    arrives = left > torch.finfo(p_exit.dtype).eps * p_exit.shape[1]
    return torch.where(arrives, p_exit / left.clamp_min(torch.finfo(p_exit.dtype).tiny), 0.0).clamp(0, 1)


def _probabilities(p_exit: Tensor) -> None:
    finite("p_exit", p_exit, 2)
    if bool((p_exit < 0).any()) or bool((p_exit.sum(1) > 1 + 1e-5).any()):
        raise UserError("p_exit must hold probabilities: none negative, and at most 1 in total for each sample")


def hard_exit(p_exit: Tensor) -> Tensor:
    """Exit that each sample takes `[B]`, 0 to L: the first with conditional probability >= 1/2, else the last."""
    leaves = conditional_probabilities(p_exit) >= 0.5
    return torch.where(leaves.any(1), leaves.int().argmax(1), p_exit.shape[1])


def threshold_exit(certainty: Tensor, threshold: float) -> Tensor:
    """The usual rule `[B]`: the first exit whose certainty `[B, L]` reaches the threshold, else the last one, L.

    For a threshold on entropy give minus the entropy, and minus the threshold.
    """
    finite("certainty", certainty, 2)
    leaves = certainty >= threshold
    return torch.where(leaves.any(1), leaves.int().argmax(1), certainty.shape[1])


def exit_costs(exits: int) -> Tensor:
    """Cost `[exits]` of blocks of equal size: 1 / exits, 2 / exits, ..., 1 (float64)."""
    if exits < 2:
        raise UserError(f"exits must be at least 2, got {exits}")
    return torch.arange(1, exits + 1, dtype=torch.float64) / exits


def cheapest_exit(ce: Tensor, cost: Tensor, trade: float) -> Tensor:
    """l* `[B]` = argmin_l CE_l + trade c_l, `trade` being lambda; the earliest of equals. Needs the labels, by CE."""
    finite("ce", ce, 2)
    if cost.shape != ce.shape[1:] or bool((cost < 0).any()):
        raise UserError(f"cost must hold one non-negative number for each of {ce.shape[1]} exits")
    if not 0 <= trade < float("inf"):
        raise UserError(f"trade (lambda) must be at least 0 and finite, got {trade}")
    return (ce + trade * cost.to(ce)).argmin(1)


def gate_targets(best: Tensor, exits: int) -> Tensor:
    """T `[B, exits - 1]`: 1 at the best exit and at every later one that has a gate, as floats.

    A sample whose best exit is the last has zeros only. Raises UserError for an exit outside 0 .. exits - 1.
    """
    if exits < 2 or best.ndim != 1 or bool(((best < 0) | (best >= exits)).any()):
        raise UserError(f"best must be one exit, 0 to {exits - 1}, for each sample, and exits at least 2")
    return (torch.arange(exits - 1)[None] >= best[:, None]).double()


def balance(targets: Tensor) -> Tensor:
    """Weight of a positive target for each gate `[L]`: zeros over ones, 1 where a gate has only one of the two."""
    finite("targets", targets, 2)
    ones = targets.sum(0)
    zeros = len(targets) - ones
    return torch.where((ones > 0) & (zeros > 0), zeros / ones.clamp_min(1), 1.0)


def gate_loss(gate_logits: Tensor, targets: Tensor, positive: Tensor | Sequence[float] | None = None) -> Tensor:
    """Mean binary cross-entropy (nats) of the gates over samples and gates; `positive` `[L]` weighs targets of 1."""
    finite("gate_logits", gate_logits, 2)
    if targets.shape != gate_logits.shape:
        raise UserError(f"targets must have the shape of gate_logits, {tuple(gate_logits.shape)}")
    weight = None if positive is None else torch.as_tensor(positive, dtype=gate_logits.dtype)
    if weight is not None and (weight.shape != gate_logits.shape[1:] or not bool((weight > 0).all())):
        raise UserError(f"positive must hold one positive weight for each of {gate_logits.shape[1]} gates")
    return functional.binary_cross_entropy_with_logits(gate_logits, targets.to(gate_logits), pos_weight=weight)


def classifier_loss(ce: Tensor, p_exit: Tensor, ratio: Ratio = "detached") -> Tensor:
    """Loss of the classifiers that have a gate: cross-entropies and P, `[B, L]` each; no gradient goes to P.

    With `detached` each sample's weights follow P and its total stays sum_l CE_l; `released` lets the gradient through
    the ratio, which cancels P; `none` is the plain mean, equal to `released` in value and gradient; `unscaled` is the
    control that keeps P and leaves the ratio out, so that a sample's weights sum to at most 1 instead.
    """
    finite("ce", ce, 2)
    _probabilities(p_exit)
    if ce.shape != p_exit.shape:
        raise UserError(f"p_exit must have the shape of ce, {tuple(ce.shape)}; got {tuple(p_exit.shape)}")
    if ratio not in get_args(Ratio):
        raise UserError(f"ratio must be one of {', '.join(get_args(Ratio))}; not {ratio!r}")
    if ratio == "none":
        return ce.mean()
    weighted = p_exit.detach() * ce
    if ratio == "unscaled":
        return weighted.mean()
    scale = ce.sum(1) / weighted.sum(1).clamp_min(torch.finfo(ce.dtype).tiny)
    return (weighted * (scale if ratio == "released" else scale.detach())[:, None]).mean()


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean over samples of |accuracy - confidence| of equal-width bins."""
    finite("confidence", confidence, 1)
    if correct.shape != confidence.shape or bool(((confidence < 0) | (confidence > 1)).any()) or bins < 1:
        raise UserError("confidence must lie in [0, 1], correct must have its shape, and bins must be at least 1")
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))
