"""The demonstration of `lagrangian_pinns`: u_t + c u_x = 0 from u0 = sin x, solved by networks in either frame.

Three ways to train the same kind of network: on the Eulerian residual; on the Lagrangian residuals, where the second
network is a displacement, X = x + d(x, t); and, as a control, on the solution itself. What the third can hold, the
first could hold too. All speeds and seeds train side by side, as one batch of networks that share nothing but the loop.

Derivatives are carried forward with the values (`_forward`), one more row of the batch for each; nothing is
differentiated twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from . import lagrangian_pinns as work

Way = Literal["eulerian", "lagrangian", "fitted"]
Weights = list[Tensor]
"""Matrices [nets, in, out] and offsets [nets, 1, out] in turn."""


@dataclass(frozen=True)
class Transport:
    """Settings; the card's are 600 points at a learning rate of 0.003, else the same."""

    speeds: tuple[float, ...] = (1.0, 10.0, 30.0, 50.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 32
    layers: int = 3
    steps: int = 1500
    points: int = 200
    start_points: int = 64
    start_weight: float = 100.0
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if not self.speeds or not self.seeds or not all(math.isfinite(c) for c in self.speeds):
            raise UserError("speeds and seeds must not be empty, and speeds must be finite")
        for name in ("width", "layers", "steps", "points", "start_points", "start_weight", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Solved:
    """Trained networks, of every seed and speed."""

    settings: Transport
    way: Way
    state: Weights
    place: Weights | None
    """Displacement networks; None in the Eulerian frame."""

    def at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(place, state), each [seeds, speeds, n], at labels and times [n]; in the Eulerian frame place is x."""
        shape = (len(self.settings.seeds), len(self.settings.speeds), len(x))
        with torch.no_grad():
            u = _forward(self.state, x, t)[0]
            place = x.expand_as(u) if self.place is None else x + _forward(self.place, x, t)[0]
        return place.reshape(shape), u.reshape(shape)

    def errors(self, time: float | None = None, places: int = 64, times: int = 21) -> Tensor:
        """|u - exact| / |exact| [seeds, speeds] over a grid, exact at the *places*; at one time where it is given."""
        t = torch.linspace(0, 1, times) if time is None else torch.tensor([float(time)])
        x = torch.arange(places) * (2 * math.pi / places)
        grid = torch.cartesian_prod(x, t)
        place, u = self.at(grid[:, 0], grid[:, 1])
        exact = torch.sin(place - torch.tensor(self.settings.speeds)[:, None] * grid[:, 1])
        wrong, whole = torch.linalg.vector_norm(u - exact, dim=-1), torch.linalg.vector_norm(exact, dim=-1)
        relative: Tensor = wrong / whole
        return relative


def _initial(settings: Transport, generator: torch.Generator) -> Weights:
    sizes = [3, *[settings.width] * settings.layers, 1]
    made: Weights = []
    for inputs, outputs in pairwise(sizes):
        matrix = torch.randn(len(settings.speeds), inputs, outputs, generator=generator) / math.sqrt(inputs)
        made += [matrix, torch.zeros(len(settings.speeds), 1, outputs)]
    return made


def _stacked(settings: Transport, generators: list[torch.Generator]) -> Weights:
    each = [_initial(settings, generator) for generator in generators]
    return [torch.cat(same).requires_grad_() for same in zip(*each, strict=True)]


def _forward(weights: Weights, x: Tensor, t: Tensor, along: str = "") -> Tensor:
    """Value and the derivatives named in `along` ("t", "xt") [1 + derivatives, nets, n] at points [n].

    Inputs are cos x, sin x and t, so that every value is periodic in x.
    """
    n, nets, zero = len(x), len(weights[0]), torch.zeros_like(x)
    tangent = {"x": [-torch.sin(x), torch.cos(x), zero], "t": [zero, zero, torch.ones_like(x)]}
    inputs = [[torch.cos(x), torch.sin(x), t], *(tangent[name] for name in along)]
    rows = torch.cat([torch.stack(columns, -1) for columns in inputs]).expand(nets, -1, -1)
    for i in range(0, len(weights), 2):
        rows = torch.bmm(rows, weights[i])
        head, tangents = rows[:, :n] + weights[i + 1], rows[:, n:]
        if i + 2 < len(weights):
            head = torch.tanh(head)
            tangents = tangents * (1 - head.square()).repeat(1, len(along), 1)
        rows = torch.cat([head, tangents], 1)
    return rows.reshape(nets, 1 + len(along), n).transpose(0, 1)


def _eulerian(state: Weights, speed: Tensor, x: Tensor, t: Tensor, x0: Tensor, weight: float) -> Tensor:
    u, u_x, u_t = _forward(state, x, t, "xt")
    residual = work.eulerian_residual(u_t, u_x, torch.zeros_like(u), speed.expand_as(u))
    start = _forward(state, x0, torch.zeros_like(x0))[0] - torch.sin(x0)
    return work.eulerian_loss(residual, start, weight)


def _lagrangian(
    state: Weights, place: Weights, speed: Tensor, x: Tensor, t: Tensor, x0: Tensor, weight: float
) -> Tensor:
    (u, u_t), (_, d_t) = _forward(state, x, t, "t"), _forward(place, x, t, "t")
    none = torch.zeros_like(u)  # without viscosity no derivative in the label plays a part
    residuals = work.lagrangian_residuals(u_t, none, none, (d_t, torch.ones_like(u), none), speed.expand_as(u))
    u0, d0 = (_forward(weights, x0, torch.zeros_like(x0))[0] for weights in (state, place))
    return work.lagrangian_loss(residuals, (d0, u0 - torch.sin(x0)), (1.0, 1.0, weight), "mean_square")


def solve(settings: Transport, way: Way) -> Solved:
    """Train every seed and speed in one way; same settings, same result."""
    if way not in get_args(Way):
        raise UserError(f"way must be one of {', '.join(get_args(Way))}, not '{way}'")
    generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
    state = _stacked(settings, generators)
    place = _stacked(settings, generators) if way == "lagrangian" else None
    speed = torch.tensor(settings.speeds).repeat(len(settings.seeds))[:, None]
    optimizer = torch.optim.Adam([*state, *(place or [])], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        x, x0 = (2 * math.pi * torch.rand(n, generator=generators[0]) for n in (settings.points, settings.start_points))
        t = torch.rand(settings.points, generator=generators[0])
        if place is not None:
            loss = _lagrangian(state, place, speed, x, t, x0, settings.start_weight)
        elif way == "eulerian":
            loss = _eulerian(state, speed, x, t, x0, settings.start_weight)
        else:
            loss = work.size(_forward(state, x, t)[0] - torch.sin(x - speed * t), "mean_square")
        optimizer.zero_grad()
        (loss * len(speed)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return Solved(settings, way, [w.detach() for w in state], place and [w.detach() for w in place])
