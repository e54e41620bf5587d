"""A secret in a table of trigrams: what a student at its optimum tells, under global and under token-wise heat.

An order-2 source over 20 symbols (rows drawn from a Dirichlet law) is sampled; a canary, two symbols and four digits,
is counted in as often as it was repeated; the teacher is the smoothed table of counts. A student that minimises the KL
term in each context has a closed form, so nothing is trained, and labels are not used. Symbols below `digits` are the
digits and occur in the source as well, so that the secret's contexts compete with ordinary ones. That, and the
smoothing, are [inferred].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .swing_distillation import Student, exposure, noisy_targets, optimal_student, soft_targets, token_temperature

Scope = Literal["context", "occurrence"]


@dataclass(frozen=True)
class SecretSettings:
    """`repeats` is how often the canary stands in the teacher's data, beside `length` symbols of the source."""

    symbols: int = 20
    digits: int = 10
    secret: int = 4
    length: int = 20_000
    repeats: int = 160
    concentration: float = 0.15
    smoothing: float = 0.03


@dataclass(frozen=True)
class World:
    """Source law and counts, both [V, V, V] (two symbols of context, then the next), and the canary's symbols."""

    law: Tensor
    counts: Tensor
    canary: tuple[int, ...]
    settings: SecretSettings

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """The context of each secret digit, in order."""
        return list(zip(self.canary[:-2], self.canary[1:-1], strict=True))

    def teacher(self) -> Tensor:
        """Smoothed log-probabilities [V, V, V] of source and canary together."""
        seen = self.counts + self.settings.smoothing
        for (one, two), digit in zip(self.contexts, self.canary[2:], strict=True):
            seen[one, two, digit] += self.settings.repeats
        return (seen / seen.sum(-1, keepdim=True)).log()


def make_world(settings: SecretSettings, seed: int) -> World:
    """Draw a source, a text from it and a canary. The canary does not depend on `repeats`."""
    whole = ("digits", "secret", "length")
    if min(getattr(settings, name) for name in whole) < 1 or settings.repeats < 0:
        raise UserError("digits, secret and length must be at least 1, and repeats not negative")
    if settings.digits > settings.symbols or min(settings.concentration, settings.smoothing) <= 0:
        raise UserError("digits must not exceed symbols; concentration and smoothing must be positive")
    draw, v = np.random.default_rng(seed), settings.symbols
    law = draw.dirichlet(np.full(v, settings.concentration), size=(v, v))
    steps, uniform, text = law.cumsum(-1), draw.random(settings.length), [0, min(1, v - 1)]
    for u in uniform:
        text.append(min(int(np.searchsorted(steps[text[-2], text[-1]], u)), v - 1))
    counts = np.zeros((v, v, v))
    np.add.at(counts, (text[:-2], text[1:-1], text[2:]), 1)
    canary = (*draw.integers(0, v, 2).tolist(), *draw.integers(0, settings.digits, settings.secret).tolist())
    return World(torch.from_numpy(law), torch.from_numpy(counts), canary, settings)


def secret_score(world: World, missed: tuple[int, ...] = ()) -> Tensor:
    """Privacy score [V, V]: 1 in the contexts of the secret's digits, but for those a detector missed (0 to 3)."""
    score = torch.zeros(world.counts.shape[:2], dtype=torch.float64)
    for position, context in enumerate(world.contexts):
        if position not in missed:
            score[context] = 1.0
    return score


def random_score(world: World, generator: torch.Generator) -> Tensor:
    """The control: as many contexts get score 1, but others."""
    secret = secret_score(world).flatten()
    order = torch.randperm(len(secret), generator=generator)
    chosen = order[secret[order] == 0][: int(secret.sum())]
    return torch.zeros_like(secret).index_fill(0, chosen, 1.0).view(world.counts.shape[:2])


def distilled(
    world: World,
    score_VV: Tensor,
    high: float = 6.0,
    low: float = 1.0,
    sigma: float = 0.0,
    generator: torch.Generator | None = None,
    scope: Scope = "context",
    student: Student = "plain",
) -> Tensor:
    """Log-probabilities [V, V, V] of the student at its optimum.

    A score of 1 everywhere is a global temperature. `scope` "context" heats every use of a context; "occurrence" heats
    only those inside the canary: the student then learns the mean of heated and ordinary targets, weighed by counts.
    """
    teacher = world.teacher()
    tau = token_temperature(score_VV, low, high)
    target = soft_targets(teacher, tau)
    if sigma > 0:
        if generator is None:
            raise UserError("noise needs a generator")
        target = noisy_targets(target, score_VV, generator, sigma)
    if scope == "occurrence":
        if student == "heated":
            raise UserError("scope 'occurrence' has no closed form for a heated student; take student='plain'")
        share = _secret_share(world)[..., None]
        target = share * target + (1 - share) * soft_targets(teacher, low)
    elif scope != "context":
        raise UserError(f"scope must be 'context' or 'occurrence', not {scope!r}")
    return optimal_student(target, tau, student)


def _secret_share(world: World) -> Tensor:
    """Part of each context's uses that lies inside the canary [V, V]; 0 where a context is never used."""
    inside = torch.zeros(world.counts.shape[:2], dtype=torch.float64)
    for context in world.contexts:
        inside[context] += world.settings.repeats
    total = inside + world.counts.sum(-1)
    return torch.where(total > 0, inside / total.clamp_min(1), 0.0)


def secret_exposure(world: World, student_VVV: Tensor) -> float:
    """Exposure of the canary's digits in bits, all digit strings ranked by their log-likelihood after the prefix."""
    n, k = world.settings.digits, world.settings.secret
    digits = torch.cartesian_prod(*[torch.arange(n)] * k).view(-1, k).T
    path = [*(torch.full_like(digits[0], symbol) for symbol in world.canary[:2]), *digits]
    loglik = sum(student_VVV[path[i], path[i + 1], path[i + 2]] for i in range(k))
    place = sum(digit * n ** (k - 1 - i) for i, digit in enumerate(world.canary[2:]))
    return exposure(torch.as_tensor(loglik), place)


def source_cross_entropy(world: World, student_VVV: Tensor) -> float:
    """Cross entropy with the true source in nats per symbol, contexts as often as the text has them."""
    weight = world.counts.sum(-1)
    loss = -(world.law * student_VVV).sum(-1)
    return float((weight * loss).sum() / weight.sum())


def perplexity(world: World, student_VVV: Tensor) -> float:
    """exp of the cross entropy."""
    return math.exp(source_cross_entropy(world, student_VVV))
