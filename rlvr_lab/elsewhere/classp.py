r"""CLASSP: weights that have moved much move less, and small gradients move nothing (arXiv 2405.09637).

The optimizer itself is `core.classp`, which training runs use too (`optimizer.name: classp`); its equations, symbols
and the departures of the released code (oswaldoludwig/CLASSP @ ea3fe3c) stand there. Per weight, with gradient g,
threshold theta on g^2, power p, rate alpha:

    s <- s + 1[g^2 > theta] |g|^p,        w <- w - 1[g^2 > theta] alpha g / (eps + s)^(1/p)

Here: what the rule promises. For p = 1 the way of a weight during a task is bounded by the growth of its history,

    sum_t |w_t - w_{t-1}|  <=  alpha ln((eps + s_T) / (eps + s_0))                       x / (a + x) <= ln(1 + x / a)

so that after a task with a long history s_0 the next one has to double it to move the weight by alpha ln 2. And how two
optimizers are compared: by curves of what is kept against what is learned, read at one level of the latter.

Card: papers/classp.md. The demonstration is `classp_demo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.classp import Classp, Rule, advance, gate
from ..errors import UserError

__all__ = ["Classp", "Rule", "advance", "gate", "path_bound", "read_at", "trajectory"]


def trajectory(start: Tensor, grads: Sequence[Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """Weights [T, ...] after each gradient of the sequence, and the history [...] at its end; settings of `Classp`."""
    if not len(grads):
        raise UserError("grads must hold at least one gradient")
    weight = torch.nn.Parameter(start.detach().clone())
    optimizer = Classp([weight], **settings)
    path = []
    for grad in grads:
        if grad.shape != weight.shape or not bool(torch.isfinite(grad).all()):
            raise UserError(f"every gradient in grads must be finite and of shape {tuple(weight.shape)}")
        weight.grad = grad.detach().to(weight.dtype)
        optimizer.step()
        path.append(weight.detach().clone())
    return torch.stack(path), optimizer.state[weight]["history"]


def path_bound(before: Tensor, after: Tensor, lr: float, eps: float = 1e-5) -> Tensor:
    """The longest way that weights can have gone while their history grew from `before` to `after`, for p = 1."""
    if before.shape != after.shape:
        raise UserError(f"after must have the shape of before, {tuple(before.shape)}, not {tuple(after.shape)}")
    if not bool(torch.isfinite(after).all() and (before >= 0).all() and (after >= before).all()):
        raise UserError(
            "after must be finite and nowhere below before, which must not be negative: a history only grows"
        )
    for name, value in (("lr", lr), ("eps", eps)):
        if not value > 0:
            raise UserError(f"{name} must be positive, not {value}")
    return lr * ((eps + after) / (eps + before)).log()


def read_at(level: float, learned: Sequence[float], kept: Sequence[float]) -> float:
    """What is kept where `learned` first reaches `level` in the order of the sweep, between two points by a straight
    line; nan where it never does."""
    if len(learned) != len(kept) or len(learned) < 2:
        raise UserError(f"learned and kept must have one length of at least 2, not {len(learned)} and {len(kept)}")
    if any(value != value for value in (*learned, *kept, level)):
        raise UserError("level, learned and kept must be numbers, not nan")
    if learned[0] >= level:
        return float(kept[0])
    for (b0, b1), (a0, a1) in zip(pairwise(learned), pairwise(kept), strict=True):
        if b1 >= level:
            return float(a0 + (a1 - a0) * (level - b0) / (b1 - b0))
    return float("nan")
