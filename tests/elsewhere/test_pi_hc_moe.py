"""Hard constraints by cells: the solve and its derivative, well-posedness of cells, and the demonstration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere import pi_hc_moe as work
from rlvr_lab.elsewhere import pi_hc_moe_demo as demo
from rlvr_lab.errors import UserError

seeds = st.integers(0, 1000)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_the_solve_meets_the_normal_equations(seed: int) -> None:
    rows, shared, targets, ridge = normal(seed, 9, 3), normal(seed + 1, 4, 3), normal(seed + 2, 4), 0.1
    found = work.constrained_weights(rows, shared, targets, [torch.arange(9)], ridge)
    w = found.weights[0]
    slope = rows.T @ (rows @ w) + shared.T @ (shared @ w - targets) + ridge**2 * w
    assert float(slope.abs().max()) < 1e-9
    assert float(found.mean_squared_residual[0]) == pytest.approx(float((rows @ w).square().mean()))


@given(seeds, st.integers(1, 5))
def test_cells_cannot_raise_the_residual_of_the_solve(seed: int, experts: int) -> None:
    """Each cell minimises its own sum, the shared rows included: together no more than the whole, plus shared rows."""
    rows, shared, targets = normal(seed, 12, 3), normal(seed + 1, 2, 3), normal(seed + 2, 2)

    def objective(cell: Tensor, w: Tensor) -> float:
        matrix, target = work.constraint_rows(rows[cell], shared, targets, 1e-4)
        return float((matrix @ w - target).square().sum())

    whole = work.constrained_weights(rows, shared, targets, [torch.arange(12)]).weights[0]
    cells = work.split(12, experts)
    local = work.constrained_weights(rows, shared, targets, cells).weights
    assert all(objective(cell, w) <= objective(cell, whole) + 1e-9 for cell, w in zip(cells, local, strict=True))


def test_a_basis_that_holds_the_solution_finds_it_in_every_cell() -> None:
    truth = torch.linspace(1, 2, 6, dtype=torch.float64)
    basis = torch.stack([truth, truth**2], 1)  # R(u) = u - x u_x stands in: it is 0 for the first, -x^2 for the second
    rows = torch.stack([torch.zeros(6, dtype=torch.float64), -(truth**2)], 1)
    shared, targets = work.relative_rows(basis[:1], truth[:1])
    cells = work.split(6, 3)
    found = work.constrained_weights(rows, shared, targets, cells, 1e-7)
    torch.testing.assert_close(work.assemble(basis, found.weights, cells), truth)


def test_the_solve_can_be_trained_through() -> None:
    shared, targets = normal(1, 3, 2), normal(2, 3)

    def weights(rows: Tensor) -> Tensor:
        return work.constrained_weights(rows, shared, targets, work.split(6, 2), 0.1).weights

    assert torch.autograd.gradcheck(weights, normal(0, 6, 2).requires_grad_())


def test_the_implicit_derivative_is_that_of_the_solve() -> None:
    rows, shared, targets, ridge = normal(3, 6, 2), normal(4, 3, 2), normal(5, 3), 0.1

    def stacked(theta: Tensor) -> tuple[Tensor, Tensor]:
        return work.constraint_rows(rows * (1 + theta), shared, targets, ridge)

    theta = torch.zeros(1, dtype=torch.float64)
    matrix, target = stacked(theta)
    w = work.least_squares(matrix, target)

    def pull(at: Tensor) -> Tensor:
        a, b = stacked(at)
        return a.T @ (a @ w - b)

    moved = torch.autograd.functional.jacobian(pull, theta)
    direct = torch.autograd.functional.jacobian(lambda at: work.least_squares(*stacked(at)), theta)
    torch.testing.assert_close(work.gauss_newton_sensitivity(matrix, moved), direct)


def test_of_many_solutions_the_shortest() -> None:
    found = work.least_squares(torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=torch.float64))


@given(st.integers(1, 20), st.integers(1, 20))
def test_cells_are_equal_neighbours(points: int, experts: int) -> None:
    if experts > points:
        with pytest.raises(UserError, match="experts"):
            work.split(points, experts)
        return
    cells = work.split(points, experts)
    assert torch.equal(torch.cat(cells), torch.arange(points))
    assert max(map(len, cells)) - min(map(len, cells)) <= 1


ROWS, ONES = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
PROBLEM = demo.make(demo.Medium(places=16, times=8))
REFUSED = {
    "values must not be 0": lambda: work.relative_rows(ROWS, torch.tensor([1.0, 0.0, 1.0, 1.0])),
    "one row for each point": lambda: work.relative_rows(ROWS, ONES[:2]),
    "basis must have 2": lambda: work.relative_rows(ONES, ONES),
    "nan": lambda: work.relative_rows(ROWS * math.nan, ONES),
    "ridge": lambda: work.constraint_rows(ROWS, ROWS, ONES, -1.0),
    "shared_rows must have 2 columns": lambda: work.constraint_rows(ROWS, ROWS[:, :1], ONES, 0.0),
    "shared_targets": lambda: work.constraint_rows(ROWS, ROWS, ONES[:1], 0.0),
    "target must": lambda: work.least_squares(ROWS, ONES[:1]),
    "cells must hold at least": lambda: work.constrained_weights(ROWS, ROWS, ONES, []),
    "weights must have one row": lambda: work.assemble(ROWS, ROWS, [torch.arange(4)]),
    "each of the 4 points": lambda: work.assemble(ROWS, ROWS[:1], [torch.arange(3)]),
    "moved must": lambda: work.gauss_newton_sensitivity(ROWS, torch.ones(3, 1)),
    "full column rank": lambda: work.gauss_newton_sensitivity(ROWS, torch.ones(2, 1)),
    "basis must be one of": lambda: demo.make(demo.Medium(), "splines"),  # type: ignore[arg-type]
    "cut": lambda: demo.cells(demo.Medium(), 2, "both"),  # type: ignore[arg-type]
    "places": lambda: demo.Medium(places=2),
    "slowest": lambda: demo.Medium(slowest=0.0),
    "duration": lambda: demo.Medium(duration=0.0),
    "field must": lambda: demo.outcome(PROBLEM, torch.zeros(2, 2)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


def test_diffusion_keeps_the_mean_and_its_residual_is_small() -> None:
    problem = demo.make(demo.Medium(seed=3))
    means = problem.truth.mean(0)
    torch.testing.assert_close(means, means[:1].expand_as(means))
    torch.testing.assert_close(problem.operator, problem.operator.T)
    truth = demo.outcome(problem, problem.truth)
    assert truth.error == 0
    assert truth.residual < 0.05 * demo.mean_of_basis(problem).residual  # of the differences in time


def test_in_a_uniform_medium_the_basis_holds_the_answer_and_the_solve_finds_it() -> None:
    settings = demo.Medium(contrast=0.0, slowest=0.005, fastest=0.01)  # 0.01 is the conductivity
    problem = demo.make(settings)
    assert demo.best_in_span(problem).error < 1e-6
    assert demo.constrained(problem, 1).error < 0.02


def outcomes(seed: int) -> dict[str, demo.Outcome]:
    problem = demo.make(demo.Medium(seed=seed))
    waves = demo.make(demo.Medium(seed=seed), "waves")
    return {
        "none": demo.mean_of_basis(problem),
        "global": demo.constrained(problem, 1),
        "eight": demo.constrained(problem, 8),
        "sixteen": demo.constrained(problem, 16),
        "in time": demo.constrained(problem, 8, "time"),
        "waves": demo.constrained(waves, 1),
        "waves in cells": demo.constrained(waves, 8),
        "waves, best": demo.best_in_span(waves, 8),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_constraint_helps_where_cells_are_well_posed(seed: int) -> None:
    found = outcomes(seed)
    assert found["global"].residual < found["none"].residual
    assert found["global"].error > found["none"].error  # the equation alone is satisfied by what decays too fast
    assert found["sixteen"].residual < found["eight"].residual < found["global"].residual
    assert found["eight"].error < 0.9 * found["global"].error
    assert found["in time"].residual < found["global"].residual
    assert found["in time"].error > 2 * found["global"].error
    assert found["waves in cells"].residual < 0.2 * found["waves"].residual
    assert found["waves in cells"].error > 5 * found["waves"].error
    assert found["waves, best"].error < 0.01


def test_without_weight_the_initial_rows_lose() -> None:
    light = demo.constrained(demo.make(demo.Medium(initial_weight=1.0)), 1)
    assert light.residual < 0.05
    assert light.error > 0.95


def test_same_seed_same_result() -> None:
    assert torch.equal(demo.make(demo.Medium(seed=4), "waves").basis, demo.make(demo.Medium(seed=4), "waves").basis)
