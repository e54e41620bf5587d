"""Lagrangian networks: residuals of known solutions, the two second derivatives, spectra, and the demonstration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere import lagrangian_pinns as work
from rlvr_lab.elsewhere.lagrangian_pinns_demo import Transport, solve
from rlvr_lab.errors import UserError

X = torch.linspace(0.1, 3.0, 30, dtype=torch.float64)
T = torch.linspace(0.2, 0.9, 30, dtype=torch.float64)


@given(st.floats(-5, 5), st.floats(0, 0.5))
def test_travelling_decaying_wave_solves_both_forms(speed: float, nu: float) -> None:
    def eulerian(x: Tensor, t: Tensor) -> Tensor:
        return torch.exp(-nu * t) * torch.sin(x - speed * t)

    _, u_t, u_x, u_xx = work.derivatives(eulerian, X, T)
    fixed = work.eulerian_residual(u_t, u_x, u_xx, torch.full_like(X, speed), nu)
    assert float(fixed.detach().abs().max()) < 1e-10

    _, v_t, v_x, v_xx = work.derivatives(lambda x, t: torch.exp(-nu * t) * torch.sin(x), X, T)
    _, p_t, p_x, p_xx = work.derivatives(lambda x, t: x + speed * t, X, T)
    for coordinate in ("place", "label"):  # the same under a rigid shift
        place, state = work.lagrangian_residuals(
            v_t, v_x, v_xx, (p_t, p_x, p_xx), torch.full_like(X, speed), nu, coordinate
        )
        assert max(float(r.detach().abs().max()) for r in (place, state)) < 1e-10


def test_the_label_is_not_the_place_where_the_flow_stretches() -> None:
    """u = X^2 has the curvature 2 along the place X = x e^t, and 2 e^2t in the label."""
    _, _, u_x, u_xx = work.derivatives(lambda x, t: (x * torch.exp(t)) ** 2, X, T)
    _, _, p_x, p_xx = work.derivatives(lambda x, t: x * torch.exp(t), X, T)
    torch.testing.assert_close(work.second_derivative(u_x, u_xx, p_x, p_xx), torch.full_like(X, 2.0))
    assert float((u_xx - 2).detach().abs().min()) > 0.5


def test_second_derivative_sees_a_curved_map() -> None:
    def place(x: Tensor, t: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x) * t

    _, _, u_x, u_xx = work.derivatives(lambda x, t: torch.sin(place(x, t)), X, T)
    _, _, p_x, p_xx = work.derivatives(place, X, T)
    torch.testing.assert_close(work.second_derivative(u_x, u_xx, p_x, p_xx), -torch.sin(place(X, T)))


def test_burgers_before_the_shock() -> None:
    """u is constant along X = x + u0(x) t, so that both residuals vanish without viscosity."""
    _, u_t, u_x, u_xx = work.derivatives(lambda x, t: torch.sin(x), X, T)
    _, place_t, place_x, place_xx = work.derivatives(lambda x, t: x + torch.sin(x) * t, X, T)
    place, state = work.lagrangian_residuals(u_t, u_x, u_xx, (place_t, place_x, place_xx), torch.sin(X))
    assert max(float(r.detach().abs().max()) for r in (place, state)) < 1e-12


def test_losses_add_up_and_norms_differ() -> None:
    residual = torch.tensor([3.0, 4.0])
    assert work.size(residual) == 5
    assert work.size(residual, "mean_square") == 12.5
    assert work.eulerian_loss(residual, residual, 100.0) == 101 * 12.5
    assert work.lagrangian_loss((residual, 2 * residual), (residual, residual), (10, 1, 1000)) == 50 + 10 + 10000


def test_the_norm_has_a_gradient_at_zero() -> None:
    zero = torch.zeros(3, requires_grad=True)
    work.size(zero).backward()
    assert bool(zero.grad.isfinite().all())


def test_a_constant_field_has_no_slope() -> None:
    f, f_t, f_x, f_xx = work.derivatives(lambda x, t: torch.ones_like(x), X, T)
    assert float(f.min()) == 1
    assert max(float(d.abs().max()) for d in (f_t, f_x, f_xx)) == 0


def test_what_does_not_move_has_rank_one_and_no_entropy() -> None:
    still = work.snapshots(work.bump, 0.0)
    assert work.spectral_entropy(still) == pytest.approx(0, abs=1e-9)
    assert work.effective_rank(still) == pytest.approx(1)
    assert work.rank_error(still, 1) == pytest.approx(0, abs=1e-7)


def test_a_moving_bump_needs_many_functions_and_a_sine_two() -> None:
    slow, fast = (work.snapshots(work.bump, c) for c in (1.0, 10.0))
    assert work.effective_rank(slow) == pytest.approx(2.7, abs=0.2)
    assert work.effective_rank(fast) == pytest.approx(13.2, abs=0.5)
    assert work.rank_error(slow, 5) < 0.05
    assert work.rank_error(fast, 5) > 0.5
    for speed in (10.0, 50.0):
        sine = work.snapshots(torch.sin, speed)
        assert work.rank_error(sine, 2) < 1e-6
        assert 1.9 < work.effective_rank(sine) <= 2 + 1e-9


@given(st.integers(0, 1000), st.integers(2, 6))
def test_entropy_lies_between_its_bounds_and_ignores_scale_and_rotation(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n + 2, n, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(n + 2, n + 2, generator=generator, dtype=torch.float64))[0]
    entropy = work.spectral_entropy(matrix)
    assert 0 <= entropy <= math.log(n) + 1e-12
    assert work.spectral_entropy(-3 * turn @ matrix) == pytest.approx(entropy)
    assert work.rank_error(matrix, 0) == pytest.approx(1)
    assert work.rank_error(matrix, n) == 0
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = (u[:, :1] * s[:1]) @ v[:1]
    assert work.rank_error(matrix, 1) == pytest.approx(float((matrix - kept).norm() / matrix.norm()))


def test_equal_directions_have_the_entropy_of_their_number() -> None:
    assert work.effective_rank(torch.eye(7)) == pytest.approx(7)


ONES = torch.ones(3)
PLACE = (ONES, ONES, ONES)
REFUSED = {
    "one shape": lambda: work.eulerian_residual(ONES, ONES, ONES[:2], ONES),
    "nan": lambda: work.eulerian_residual(ONES, ONES, ONES * math.nan, ONES),
    "nu must": lambda: work.eulerian_residual(ONES, ONES, ONES, ONES, -1.0),
    "cross": lambda: work.second_derivative(ONES, ONES, 0 * ONES, ONES),
    "coordinate": lambda: work.lagrangian_residuals(ONES, ONES, ONES, PLACE, ONES, 0.1, "time"),  # type: ignore[arg-type]
    "norm must": lambda: work.size(ONES, "max"),  # type: ignore[arg-type]
    "residual must not be empty": lambda: work.size(ONES[:0]),
    "weight must": lambda: work.eulerian_loss(ONES, ONES, -1.0),
    "gamma_u": lambda: work.lagrangian_loss((ONES, ONES), (ONES, ONES), (1, math.nan, 1)),
    "field": lambda: work.derivatives(lambda x, t: x[:1], X, T),
    "places": lambda: work.snapshots(torch.sin, 1.0, places=1),
    "width": lambda: work.bump(ONES, 0.0),
    "snapshots_XT must be": lambda: work.energy_shares(ONES),
    "zero everywhere": lambda: work.effective_rank(torch.zeros(2, 2)),
    "rank must": lambda: work.rank_error(torch.eye(2), 3),
    "way": lambda: solve(Transport(), "upwind"),  # type: ignore[arg-type]
    "steps": lambda: Transport(steps=0),
    "speeds": lambda: Transport(speeds=()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


def test_the_moving_frame_finds_what_the_fixed_one_does_not() -> None:
    settings = Transport(speeds=(1.0, 10.0), seeds=(0,), steps=500, points=128)
    fixed, moving = (solve(settings, way).errors()[0].tolist() for way in ("eulerian", "lagrangian"))
    assert fixed[0] < 0.25  # both work at a low speed
    assert moving[0] < 0.1
    assert fixed[1] > 0.6
    assert moving[1] < 0.2


def test_a_network_of_that_size_can_hold_the_solution() -> None:
    fitted = solve(Transport(speeds=(10.0,), seeds=(0,)), "fitted")
    assert float(fitted.errors()) < 0.3
    place, u = fitted.at(torch.tensor([0.0, 2 * math.pi]), torch.tensor([0.3, 0.3]))
    assert place[0, 0, 1] == pytest.approx(2 * math.pi)
    assert float(u[0, 0, 0]) == pytest.approx(float(u[0, 0, 1]), abs=1e-4)  # periodic by its inputs


def test_same_seed_same_result() -> None:
    settings = Transport(speeds=(2.0,), seeds=(5,), steps=5)
    assert torch.equal(solve(settings, "lagrangian").errors(), solve(settings, "lagrangian").errors())
