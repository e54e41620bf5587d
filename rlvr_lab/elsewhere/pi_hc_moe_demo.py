"""The demonstration of `pi_hc_moe`: diffusion in a medium of varying conductivity, from a basis that ignores it.

    u_t = (D(x) u_x)_x, periodic, D(x) = 0.01 exp(1.2 sin(4 pi x + phase)), x in [0, 1), u(x, 0) a random wave

The "network output" are eight solutions of the equation with constant D_j. All satisfy the initial condition, so that
the initial rows ask for sum w = 1 and nothing else. Cells are slabs of space, each with its own piece of the initial
condition. Two controls are meant to fail: slabs of time, where all but the first lack the initial condition, and 64
random waves as basis. In both the equation can be satisfied inside a cell and the solution missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from . import pi_hc_moe as work

Basis = Literal["solutions", "waves"]
Cut = Literal["time", "space"]


@dataclass(frozen=True)
class Medium:
    """Settings of one problem."""

    seed: int = 0
    places: int = 128
    times: int = 64
    duration: float = 0.5
    functions: int = 8
    """Of the basis of solutions."""
    waves: int = 64
    """Of the basis of waves: enough to hold the solution, as `best_in_span` shows."""
    slowest: float = 0.002
    fastest: float = 0.05
    contrast: float = 1.2
    ridge: float = 1e-4
    initial_weight: float = 100.0
    """Of the initial rows; with 1, the equation's 8,192 rows win and u = 0 satisfies all of them."""

    def __post_init__(self) -> None:
        for name, least in (("places", 8), ("times", 4), ("functions", 1), ("waves", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not (self.duration > 0 and self.initial_weight > 0):
            raise UserError("duration and initial_weight must be positive")
        if not 0 < self.slowest <= self.fastest or not self.contrast >= 0 or not self.ridge >= 0:
            raise UserError("slowest and fastest must be positive and in order, contrast and ridge not negative")

    @property
    def dt(self) -> float:
        """Time between columns of a field."""
        return self.duration / (self.times - 1)


@dataclass(frozen=True)
class Problem:
    """Conductivity, truth and basis on the grid; fields are [places, times]."""

    settings: Medium
    conductivity: Tensor
    """[places]."""
    operator: Tensor
    """(D u_x)_x as a matrix [places, places]."""
    truth: Tensor
    basis: Tensor
    """[places, times, functions]."""


@dataclass(frozen=True)
class Outcome:
    """What one way of choosing coefficients gives."""

    field: Tensor
    """[places, times]."""
    residual: float
    """Root mean square of u_t - (D u_x)_x inside the cells, which is what the solves see."""
    across: float
    """The same of the assembled field, jumps between cells included."""
    error: float
    """|u - truth| / |truth|."""


def diffusion_operator(conductivity: Tensor) -> Tensor:
    """u -> (D u_x)_x on a periodic grid of [0, 1): conservative differences with D between the points."""
    n = len(conductivity)
    right = (conductivity + conductivity.roll(-1)) / 2 * n**2
    eye = torch.eye(n, dtype=conductivity.dtype)
    forward = right[:, None] * (eye.roll(1, 1) - eye)  # D (u[i + 1] - u[i]) / h^2
    return forward - forward.roll(1, 0)


def evolve(operator: Tensor, start: Tensor, dt: float, times: int) -> Tensor:
    """exp(t L) u0 [places, times] at t = 0, dt, 2 dt ..."""
    step = torch.matrix_exp(operator * dt)
    states = [start]
    for _ in range(times - 1):
        states.append(step @ states[-1])
    return torch.stack(states, 1)


def residual(field: Tensor, operator: Tensor, dt: float) -> Tensor:
    """u_t - (D u_x)_x of fields [places, times, ...]; time by central differences, one-sided at both ends."""
    (u_t,) = torch.gradient(field, spacing=dt, dim=1, edge_order=2)
    return u_t - torch.einsum("ij,j...->i...", operator, field)


def make(settings: Medium, basis: Basis = "solutions") -> Problem:
    """The problem of a seed; same settings, same numbers."""
    if basis not in get_args(Basis):
        raise UserError(f"basis must be one of {', '.join(get_args(Basis))}, not '{basis}'")
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.arange(settings.places, dtype=torch.float64) / settings.places
    phase = 2 * math.pi * torch.rand(1, generator=generator, dtype=torch.float64)
    conductivity = 0.01 * torch.exp(settings.contrast * torch.sin(4 * math.pi * x + phase))
    operator = diffusion_operator(conductivity)
    wave = torch.arange(1, 4, dtype=torch.float64)
    draws = torch.randn(2, 3, generator=generator, dtype=torch.float64) / wave
    angle = 2 * math.pi * x[:, None] * wave
    start = (draws[0] * torch.cos(angle) + draws[1] * torch.sin(angle)).sum(1)
    truth = evolve(operator, start, settings.dt, settings.times)
    if basis == "solutions":
        rates = torch.logspace(
            math.log10(settings.slowest), math.log10(settings.fastest), settings.functions, dtype=torch.float64
        )
        laplace = diffusion_operator(torch.ones_like(x))
        functions = torch.stack([evolve(rate * laplace, start, settings.dt, settings.times) for rate in rates], -1)
    else:
        functions = _waves(settings, x, generator)
    return Problem(settings, conductivity, operator, truth, functions)


def _waves(settings: Medium, x: Tensor, generator: torch.Generator) -> Tensor:
    """Random Fourier features cos(2 pi k x + omega t + phase), k = 0 ... 4."""
    t = torch.linspace(0, settings.duration, settings.times, dtype=torch.float64)
    n = settings.waves
    k = torch.randint(0, 5, (n,), generator=generator)
    omega = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.cos(2 * math.pi * k * x[:, None, None] + omega * t[:, None] + phase)


def cells(settings: Medium, experts: int, cut: Cut = "space") -> list[Tensor]:
    """Points of each expert, as indices of a flattened field [places * times]: slabs of time, or of space."""
    if cut not in get_args(Cut):
        raise UserError(f"cut must be 'time' or 'space', not '{cut}'")
    index = torch.arange(settings.places * settings.times).reshape(settings.places, settings.times)
    rows = index.T if cut == "time" else index
    return [rows[part].reshape(-1) for part in work.split(len(rows), experts)]


def outcome(problem: Problem, field: Tensor, within: float | None = None) -> Outcome:
    """Residual and error of a field; `within` is the residual inside cells, where the field has any."""
    if field.shape != problem.truth.shape:
        raise UserError(f"field must be {list(problem.truth.shape)}, not {list(field.shape)}")
    norm = torch.linalg.vector_norm
    rms = float(residual(field, problem.operator, problem.settings.dt).square().mean().sqrt())
    return Outcome(
        field, rms if within is None else within, rms, float(norm(field - problem.truth) / norm(problem.truth))
    )


def mean_of_basis(problem: Problem) -> Outcome:
    """No constraint: equal coefficients."""
    return outcome(problem, problem.basis.mean(-1))


def _assembled(problem: Problem, rows: Tensor, weights: Tensor, parts: list[Tensor]) -> Outcome:
    field = work.assemble(problem.basis.flatten(0, 1), weights, parts).reshape(problem.truth.shape)
    return outcome(problem, field, float(work.assemble(rows, weights, parts).square().mean().sqrt()))


def best_in_span(problem: Problem, experts: int = 1, cut: Cut = "space") -> Outcome:
    """The fit to the truth itself in every cell: no choice of coefficients has a smaller error."""
    flat, truth = problem.basis.flatten(0, 1), problem.truth.flatten()
    parts = cells(problem.settings, experts, cut)
    weights = torch.stack([work.least_squares(flat[cell], truth[cell]) for cell in parts])
    return _assembled(problem, residual_rows(problem), weights, parts)


def residual_rows(problem: Problem) -> Tensor:
    """R_f [places * times, functions]: the residual of every basis function, on the whole field."""
    return residual(problem.basis, problem.operator, problem.settings.dt).flatten(0, 1)


def constrained(problem: Problem, experts: int, cut: Cut = "space") -> Outcome:
    """Coefficients from the constraint, with one solve for each of `experts` cells."""
    start = problem.truth[:, 0]
    far = start.abs() > 0.1 * start.abs().max()  # relative rows are for places where u0 is not near 0
    relative = work.relative_rows(problem.basis[far, 0], start[far])
    shared, targets = (problem.settings.initial_weight * part for part in relative)
    rows, parts = residual_rows(problem), cells(problem.settings, experts, cut)
    solved = work.constrained_weights(rows, shared, targets, parts, problem.settings.ridge)
    return _assembled(problem, rows, solved.weights, parts)
