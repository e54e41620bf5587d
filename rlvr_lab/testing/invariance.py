"""Does a composition give the same update however its minibatch is split and ordered?

Public frameworks break this for Clip-Cov, KL-Cov and quantile masks, whose statistics they take per micro-batch. Here a
method that breaks it is wrong. Use it for your own: `check_invariance(compose([Mine()]), model, rollout)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.rollout import Rollout
from ..methods.base import Pipeline
from ..train.update import Updater, UpdateTotals


@dataclass(frozen=True)
class UpdateResult:
    """One minibatch's loss, gradient, and every per-token choice made for it, rows in the order of the rollout."""

    loss: float
    gradient: Tensor
    choices: dict[str, Tensor]


def update_result(
    pipeline: Pipeline, model: Any, rollout: Rollout, micro_batch_rows: int, order: Tensor | None = None
) -> UpdateResult:
    """Loss and gradient of `rollout` as one optimizer minibatch of step 0, its rows taken in `order`. No optimizer
    step."""
    order = torch.arange(len(rollout)) if order is None else order
    updater = Updater(model, torch.optim.SGD(model.parameters()), pipeline, micro_batch_rows=micro_batch_rows)
    rollout, advantage = pipeline.credit(rollout)
    rollout = updater.look_through(pipeline.lens(0, model), rollout)
    batch = rollout.rows(order)
    part = advantage[order][:, : batch.response_ids.shape[1]]
    model.zero_grad(set_to_none=True)
    loss = updater.accumulate(batch, part, UpdateTotals(), torch.Generator().manual_seed(0))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    prepared = updater.prepare(batch, part, torch.Generator().manual_seed(0))
    back = order.argsort()
    new = {k: v for k, v in prepared.rollout.statistics.items() if k not in rollout.statistics}
    choices = {name: value[back] for name, value in (new | {"weight": prepared.weight}).items()}
    return UpdateResult(loss, torch.cat([g.flatten() for g in grads]).clone(), choices)


def check_invariance(
    pipeline: Pipeline,
    model: Any,
    rollout: Rollout,
    micro_batch_rows: Sequence[int] = (1, 2, 5),
    tolerance: float = 1e-5,
) -> UpdateResult:
    """Compare micro-batches of several sizes, and a permuted minibatch, with the whole minibatch at once.

    Loss and gradient agree within `tolerance` (relative to the largest entry), choices within it and binary choices
    exactly. Returns the result of the whole minibatch; raises AssertionError that names what differs.
    """
    whole = update_result(pipeline, model, rollout, len(rollout))
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3))
    variants = [(f"micro-batches of {n}", n, None) for n in micro_batch_rows]
    for name, rows, rearranged in [*variants, ("permuted rows", len(rollout), order)]:
        other = update_result(pipeline, model, rollout, rows, rearranged)
        scale = float(whole.gradient.abs().max()) + 1e-12
        _agree(name, "loss", other.loss, whole.loss, tolerance * (1 + abs(whole.loss)))
        _agree(name, "gradient", float((other.gradient - whole.gradient).abs().max()), 0.0, 10 * tolerance * scale)
        for key, value in whole.choices.items():
            width = min(value.shape[1], other.choices[key].shape[1])
            difference = (other.choices[key][:, :width].double() - value[:, :width].double()).abs().max()
            _agree(name, f"'{key}'", float(difference), 0.0, tolerance)
    return whole


def _agree(variant: str, what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance:
        raise AssertionError(f"{variant}: {what} differs by {abs(found - expected):.3g}, allowed {tolerance:.3g}")
