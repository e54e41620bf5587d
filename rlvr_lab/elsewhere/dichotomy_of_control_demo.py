"""Two arms whose luck a return-conditioned policy imitates: the smallest demonstration of dichotomy of control.

Arm 1 pays 1 with probability 1 - p, arm 0 with probability p; the recorded behaviour pulls arm 1 with probability p.
Then P(arm 1 | paid) = p (1 - p) / (2 p (1 - p)) = 1/2 whatever p is: asking for a payment earns 1/2, though 1 - p is
to be had. Encoder, policy and value are trained by Adam on the exact loss; runs (luck p, beta, seed) are one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .dichotomy_of_control import (
    Conditioned,
    condition_on_best,
    conditional_information,
    contrastive_estimate,
    objective,
    weights,
)

Sign = Literal["paper", "released"]


@dataclass(frozen=True)
class LuckSettings:
    """`sign` "paper": the encoder lowers the exact information; "released": all minimise beta (-pos + neg)."""

    luck: Sequence[float] = (0.1, 0.2, 0.3)
    betas: Sequence[float] = (0.0, 10.0)
    seeds: int = 5
    sign: Sign = "paper"
    steps: int = 1500
    learning_rate: float = 0.03
    latents: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Luck:
    """Results, each [luck, betas, seeds]: information I(R; Z | A) in nats, promised and achieved return."""

    information: Tensor
    conditioned: Conditioned


def bandit(luck: Sequence[float] | Tensor) -> Tensor:
    """P(a, r) [..., 2, 2] of the recorded data for each p in `luck`, float64; p lies strictly between 0 and 1."""
    p = torch.as_tensor(luck, dtype=torch.float64)
    if not p.numel() or not bool(((p > 0) & (p < 1)).all()):
        raise UserError(f"luck must lie strictly between 0 and 1: {luck}")
    never, mostly = torch.stack([(1 - p) * (1 - p), (1 - p) * p], -1), torch.stack([p * p, p * (1 - p)], -1)
    return torch.stack([never, mostly], -2)


def return_conditioned(joint_AR: Tensor) -> Tensor:
    """The control without a latent: what P(a | the best outcome) earns, outcomes 0 and 1."""
    policy_A = joint_AR[..., -1] / joint_AR[..., -1].sum(-1, keepdim=True)
    return (policy_A * joint_AR[..., -1] / joint_AR.sum(-1)).sum(-1)


def learn(settings: LuckSettings) -> Luck:
    """Train all runs at once. The same settings give the same result on one machine."""
    if min(settings.seeds, settings.steps, settings.latents) < 1 or settings.learning_rate <= 0:
        raise UserError("seeds, steps and latents must be at least 1, and learning_rate positive")
    shape = (len(settings.luck), len(settings.betas), settings.seeds)
    joint = bandit(settings.luck)[:, None, None].expand(*shape, 2, 2)
    beta = torch.tensor(list(settings.betas), dtype=torch.float64)[:, None].expand(shape)
    logits = _start(settings, shape)
    optimizer = torch.optim.Adam(list(logits.values()), lr=settings.learning_rate)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        _loss(joint, logits, beta, settings.sign).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        encoder, policy, value = (logits[name].softmax(-1) for name in ("encoder", "policy", "value"))
        outcomes = torch.tensor([0.0, 1.0], dtype=torch.float64)
        found = condition_on_best(joint, encoder, policy, value, outcomes)
        return Luck(conditional_information(weights(joint, encoder)), found)


def _start(settings: LuckSettings, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Normal logits, drawn for each seed and shared by all betas and p, so that these are compared on equal starts."""
    draws = torch.Generator().manual_seed(settings.seed)
    z = settings.latents
    sizes = {"encoder": (2, 2, z), "policy": (z, 2), "value": (z, 2), "energy": (2, 2, z)}
    start = {}
    for name, size in sizes.items():
        one = torch.randn(settings.seeds, *size, generator=draws, dtype=torch.float64)
        start[name] = one.expand(*shape[:2], *one.shape).clone().requires_grad_(True)
    return start


def _loss(joint: Tensor, logits: dict[str, Tensor], beta: Tensor, sign: Sign) -> Tensor:
    encoder, policy, value = (logits[name].softmax(-1) for name in ("encoder", "policy", "value"))
    if sign == "paper":
        return objective(joint, encoder, policy, value, beta).loss
    if sign != "released":
        raise UserError(f"sign must be 'paper' or 'released', not {sign!r}")
    plain = objective(joint, encoder, policy, value, 0.0).loss
    return plain - beta * contrastive_estimate(joint, encoder, logits["energy"])
