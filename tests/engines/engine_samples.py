"""The same tensors for an engine and for us, and our loss of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose
from rlvr_lab.testing.minibatch import minibatch_loss, record

TOLERANCE = 1e-6
FULL = (9, 4, 1, 7, 5, 9, 6, 3)
WITH_EMPTY = (9, 4, 1, 7, 0, 9, 6, 3)


@dataclass(frozen=True)
class Sample:
    """An off-policy minibatch in float64: ratios on both sides of every bound, a dead row, ragged lengths."""

    rollout: Rollout
    logprob: Tensor
    advantage_B: Tensor
    entropy: Tensor

    @property
    def mask(self) -> Tensor:
        return self.rollout.mask

    @property
    def old_logprob(self) -> Tensor:
        assert self.rollout.old_logprob is not None
        return self.rollout.old_logprob

    @property
    def advantage(self) -> Tensor:
        return self.advantage_B[:, None] * self.mask

    def statistic(self, name: str) -> Tensor:
        return self.rollout.statistics[name]


def sample(lengths: tuple[int, ...] = FULL, seed: int = 0, spread: float = 0.7) -> Sample:
    g = torch.Generator().manual_seed(seed)
    b, t = len(lengths), max(lengths)
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logprob = -normal(b, t).abs() - 0.01
    advantage = normal(b)
    advantage[3] = 0.0
    rollout = record(
        mask,
        logprob + spread * normal(b, t),
        statistics={"ref_logprob": logprob + normal(b, t), "token_entropy": normal(b, t).abs()},
    )
    entropy = rollout.statistics["token_entropy"].clone().requires_grad_()
    return Sample(rollout, logprob.requires_grad_(), advantage, entropy)


def our_loss(data: Sample, methods: dict[str, dict[str, Any]]) -> Tensor:
    """The loss of a composition; random choices have seed 0."""
    pipeline = compose([build(slug, settings) for slug, settings in methods.items()])
    return minibatch_loss(pipeline, data.rollout, data.logprob, data.advantage, data.entropy)


def assert_same_loss(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Equal values and equal gradients, none of which is zero throughout."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=TOLERANCE)
    for leaf in leaves:
        mine, other = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE)
