r"""Load and temperature: whether noisier training helps a network that will be pruned depends on how much is pruned.

"A Three-regime Model of Network Pruning" (Zhou, Yang, Chang and Mahoney, ICML 2023, arXiv 2305.18383,
YefanZhou/ThreeRegimePruning, MIT). Two numbers describe an experiment instead of one: a *temperature-like* one, how
noisy the training of the dense network was (high: small batches, few epochs, large steps), and a *load-like* one, how
much was asked of the pruned network (high: low density). From one pruned network two are trained on, and compared:

    L(t) = training error of (1 - t) theta + t theta',   t = 0, 0.1, ..., 1
    LMC  = (L(0) + L(1)) / 2 - L(t*),   t* = argmax_t |(L(0) + L(1)) / 2 - L(t)|                (first one of equals)
    CKA  = |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F),   X, Y with column means removed

LMC < 0 is a barrier between the two, near 0 they are connected, > 0 says that something better lies between them and
that both are under-trained. CKA is 1 where the features agree up to rotation and scale.

| symbol | meaning | shape |
|---|---|---|
| L(t) | error along the straight line | [..., points] |
| X, Y | features of both networks for the same n inputs | [n, p], [n, q] |
| d | density: share of the weights that stay | scalar in (0, 1] |

Where the released code departs from the straight line: it re-estimates batch-norm statistics at each point, and its
curve is a Bezier chain whose bends were set on the line, which is the same line. It prunes uniformly for each layer
(`scope="layer"`); the toy of `three_regime_pruning_demo` prunes by magnitude over all layers (`"global"`). Where the
three regimes begin, in units of LMC and CKA, is not taken from the paper here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError

Scope = Literal["global", "layer"]


class Connectivity(NamedTuple):
    """Linear mode connectivity and where the line departs most from the mean of its ends; `[...]` each."""

    lmc: Tensor
    place: Tensor
    """Index of t* in the path."""


def mode_connectivity(path: Tensor) -> Connectivity:
    """LMC of errors along a line, `[..., points]` with both ends: negative for a barrier, positive for a valley.

    Of equal departures the first counts. Raises UserError for fewer than three points and for nan.
    """
    if path.ndim < 1 or path.shape[-1] < 3 or not path.is_floating_point():
        raise UserError(
            f"path must hold errors at three or more points of a line, [..., points]; got {tuple(path.shape)}"
        )
    if not bool(torch.isfinite(path).all()):
        raise UserError("path must be finite: it holds nan or infinity")
    departure = (path[..., :1] + path[..., -1:]) / 2 - path
    place = departure.abs().argmax(-1)
    return Connectivity(departure.gather(-1, place.unsqueeze(-1)).squeeze(-1), place)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features `[n, p]` and `[n, q]` of the same n inputs: between 0 and 1.

    It does not see rotations, one common scale, and shifts of either side. Raises UserError where the numbers of inputs
    differ, and where a side is constant over the inputs: then nothing varies that could agree.
    """
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2 or value.shape[0] < 2 or not value.shape[1] or not bool(torch.isfinite(value).all()):
            raise UserError(f"{name} must be finite features [n, p] of two or more inputs; got {tuple(value.shape)}")
    if x.shape[0] != y.shape[0]:
        raise UserError(f"x and y must have the same inputs in their rows; got {x.shape[0]} and {y.shape[0]}")
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    for name, value, raw in (("x", a, x), ("y", b, y)):
        if float(value.abs().max()) <= 1e-12 * float(raw.abs().max()):
            raise UserError(f"{name} is constant over the inputs: its similarity is not defined")
    a, b = a / a.norm(), b / b.norm()  # the scale cancels, and squares of squares neither vanish nor overflow
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def between(one: Sequence[Tensor], other: Sequence[Tensor], t: float) -> list[Tensor]:
    """(1 - t) one + t other, tensor by tensor. Raises UserError for t outside [0, 1] and where shapes differ."""
    if not 0 <= t <= 1:
        raise UserError(f"t must be between 0 and 1, not {t}")
    if [a.shape for a in one] != [b.shape for b in other]:
        raise UserError("one and other must have the same shapes")
    return [(1 - t) * a + t * b for a, b in zip(one, other, strict=True)]


def magnitude_masks(weights: Sequence[Tensor], density: float, scope: Scope = "global") -> list[Tensor]:
    """True where a weight stays: the `density` share of largest magnitude, over all matrices or within each.

    Always at least one stays in what is ranked together; the number is rounded, and of equal magnitudes the first stay.
    Raises UserError for a density outside (0, 1], no weights, weights that are not finite, and an unknown scope.
    """
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, not {density}")
    if scope not in get_args(Scope):
        raise UserError(f"scope must be 'global' or 'layer', not {scope!r}")
    if not weights or any(not w.numel() or not bool(torch.isfinite(w).all()) for w in weights):
        raise UserError("weights must be one or more tensors that are not empty and hold finite numbers")
    if scope == "layer" and len(weights) > 1:
        return [magnitude_masks([w], density)[0] for w in weights]
    size = torch.cat([w.detach().abs().flatten() for w in weights])
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.argsort(descending=True, stable=True)[: max(1, round(density * len(size)))]] = True
    return [m.view(w.shape) for m, w in zip(torch.split(mask, [w.numel() for w in weights]), weights, strict=True)]
