"""The demonstration of `active_matter_entropy`: a score learned from samples of a stirred trap tells the rate 2 w^2.

The density is N(0, I) at every speed w, so that samples alone cannot tell how irreversible the process is. Networks for
several speeds and seeds train side by side, as one batch of small networks that share nothing but the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from . import active_matter_entropy as work
from ._networks import forward

Weights = list[Tensor]
"""Matrices [nets, in, out] and offsets [nets, 1, out] in turn."""


@dataclass(frozen=True)
class Trap:
    """Settings; the card's are walkers 20,000, width 64 and 2,500 steps at sigma 0.1."""

    omegas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    walkers: int = 8000
    time: float = 4.0
    """Simulated time before samples are taken; the slowest mode decays as exp(-time)."""
    dt: float = 0.01
    sigma: float = 0.1
    width: int = 32
    steps: int = 1500
    batch: int = 192
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not self.omegas or not self.seeds:
            raise UserError("omegas and seeds must not be empty")
        for name in ("walkers", "time", "dt", "sigma", "width", "steps", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Learned:
    """Scores of all speeds and seeds, and the samples that they were learned from."""

    settings: Trap
    samples: Tensor
    """[seeds, omegas, walkers, 2]."""
    weights: Weights

    def score(self, points: Tensor) -> Tensor:
        """Every network at its own points [seeds, omegas, n, 2], or at the same ones [n, 2]."""
        seeds, omegas = len(self.settings.seeds), len(self.settings.omegas)
        own = points.expand(seeds, omegas, *points.shape[-2:]).flatten(0, 1)
        return _forward(self.weights, own).reshape(seeds, omegas, *points.shape[-2:])

    def velocity(self, points: Tensor, omegas: tuple[float, ...] | None = None) -> Tensor:
        """v = b - s [seeds, omegas, n, 2], with drifts of `omegas` in place of the own ones where they are given."""
        speeds = self.settings.omegas if omegas is None else omegas
        if len(speeds) != len(self.settings.omegas):
            raise UserError(f"omegas must be {len(self.settings.omegas)} speeds, one for each network")
        score = self.score(points)
        drift = torch.stack([_drift(points.expand_as(score)[:, i], w) for i, w in enumerate(speeds)], dim=1)
        return work.probability_velocity(drift, score, torch.eye(2))

    def rates(self, omegas: tuple[float, ...] | None = None) -> Tensor:
        """Mean entropy production [seeds, omegas] over the samples (D = I), nats per time."""
        with torch.no_grad():
            velocity = self.velocity(self.samples, omegas)
            return work.entropy_production(velocity, torch.eye(2)).mean((-1, -2))


def _drift(points: Tensor, omega: float) -> Tensor:
    return -points @ work.rotating_trap(omega)[0].T.to(points.dtype)


def simulate(omega: float, settings: Trap, generator: torch.Generator) -> Tensor:
    """Walkers [walkers, 2] after `time`, by Euler steps from the centre of the trap."""
    z = torch.zeros(settings.walkers, 2)
    for _ in range(round(settings.time / settings.dt)):
        z = z + settings.dt * _drift(z, omega)
        z = z + math.sqrt(2 * settings.dt) * torch.randn(z.shape, generator=generator)
    return z


def _forward(weights: Weights, points: Tensor) -> Tensor:
    return forward(weights, points, torch.nn.functional.silu)


def _initial(nets: int, width: int, generator: torch.Generator) -> Weights:
    sizes = [(2, width), (width, width), (width, 2)]
    made: Weights = []
    for inputs, outputs in sizes:
        made.append(torch.randn(nets, inputs, outputs, generator=generator) / math.sqrt(inputs))
        made.append(torch.zeros(nets, 1, outputs))
    return [w.requires_grad_() for w in made]


def learn(settings: Trap) -> Learned:
    """Simulate, then train all scores by antithetic denoising around the samples; same settings, same result."""
    generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
    samples = torch.stack([torch.stack([simulate(w, settings, g) for w in settings.omegas]) for g in generators])
    each = [_initial(len(settings.omegas), settings.width, g) for g in generators]
    weights = [torch.cat([w.detach() for w in same]).requires_grad_() for same in zip(*each, strict=True)]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    points = samples.flatten(0, 1)
    for _ in range(settings.steps):
        rows = torch.randint(settings.walkers, (settings.batch,), generator=generators[0])
        loss = work.antithetic_loss(lambda z: _forward(weights, z), points[:, rows], settings.sigma, generators[0])
        optimizer.zero_grad()
        (loss * len(points)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return Learned(settings, samples, [w.detach() for w in weights])
