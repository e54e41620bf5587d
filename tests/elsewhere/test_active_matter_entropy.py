"""Entropy production: closed forms, the balance of the flow, minima of the losses, the learned rate of a trap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere import active_matter_entropy as work
from rlvr_lab.elsewhere.active_matter_entropy_demo import Learned, Trap, learn
from rlvr_lab.errors import UserError

seeds = st.integers(0, 1000)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(seed: int, d: int = 3) -> work.LinearProcess:
    factor, noise = normal(seed, d, d), normal(seed + 5000, d, d)
    turn = normal(seed + 9000, d, d)
    pull = factor @ factor.T + 0.5 * torch.eye(d, dtype=torch.float64) + turn - turn.T
    return work.linear_process(pull, noise @ noise.T + 0.5 * torch.eye(d, dtype=torch.float64))


@given(seeds)
def test_the_rate_is_the_trace_formula_and_not_negative(seed: int) -> None:
    found = process(seed)
    assert found.rate == pytest.approx(work.rate_by_trace(found), rel=1e-6, abs=1e-9)
    assert found.rate >= 0
    lyapunov = found.drift @ found.covariance + found.covariance @ found.drift.T
    torch.testing.assert_close(lyapunov, 2 * found.diffusion)


@given(seeds)
def test_detailed_balance_produces_nothing(seed: int) -> None:
    factor = normal(seed, 3, 3)
    stiffness = factor @ factor.T + 0.5 * torch.eye(3, dtype=torch.float64)
    diffusion = torch.diag(normal(seed + 1, 3).exp())
    found = work.linear_process(diffusion @ stiffness, diffusion)  # D times a gradient
    assert found.rate == pytest.approx(0.0, abs=1e-9)
    assert float(found.velocity.abs().max()) < 1e-8


@given(seeds)
def test_stationarity_holds_at_every_point_and_the_entropy_stands_still(seed: int) -> None:
    found, points = process(seed), normal(seed + 1, 7, 3)
    div_v, v_dot_s = work.balance(lambda z: z @ found.velocity.T, lambda z: z @ found.score.T, points)
    # v.s is quadratic and div v constant: both vanish
    torch.testing.assert_close(div_v, torch.zeros_like(div_v), atol=1e-8, rtol=0)
    torch.testing.assert_close(div_v, -v_dot_s, atol=1e-7, rtol=0)


@pytest.mark.parametrize("omega", [-1.0, 0.0, 0.5, 2.0])
def test_the_stirred_trap_has_one_density_and_many_rates(omega: float) -> None:
    found = work.linear_process(*work.rotating_trap(omega))
    torch.testing.assert_close(found.covariance, torch.eye(2, dtype=torch.float64))
    assert found.rate == pytest.approx(2 * omega**2)


def test_the_swimmer_has_the_closed_form_and_diverges_without_noise() -> None:
    for noise in (1.0, 0.1, 0.01):
        found = work.linear_process(*work.trapped_swimmer(2.0, 0.7, 1.3, noise))
        assert found.rate == pytest.approx(work.swimmer_rate(2.0, 0.7, 1.3, noise))
    assert found.rate > 50


def test_particles_own_their_part_of_the_rate() -> None:
    one, diffusion = work.trapped_swimmer(1.5, 1.0, 1.0, 0.5)
    two, _ = work.trapped_swimmer(0.0, 1.0, 1.0, 0.5)  # does not swim
    found = work.linear_process(torch.block_diag(one, two), torch.block_diag(diffusion, diffusion))
    factor = torch.linalg.cholesky(found.covariance)
    points = normal(0, 20000, 4) @ factor.T
    velocity = work.probability_velocity(-points @ found.drift.T, points @ found.score.T, found.diffusion)
    torch.testing.assert_close(velocity, points @ found.velocity.T)
    each = work.entropy_production(velocity, found.diffusion, particles=2).mean(0)
    assert each[0] == pytest.approx(work.swimmer_rate(1.5, 1.0, 1.0, 0.5), rel=0.05)
    assert each[1] == pytest.approx(0.0, abs=1e-9)
    whole = work.entropy_production(velocity, found.diffusion).mean()
    assert float(whole) == pytest.approx(float(each.sum()))


def test_the_divergence_is_exact_and_known_for_constant_fields() -> None:
    points, matrix = normal(1, 5, 3), normal(2, 3, 3)
    found = work.divergence(lambda z: torch.sin(z) @ matrix, points)
    torch.testing.assert_close(found, (torch.cos(points) * matrix.diagonal()).sum(-1))
    assert work.divergence(torch.zeros_like, points).abs().max() == 0


def test_both_losses_are_least_at_the_score() -> None:
    found = process(3, 2)
    points = normal(4, 40000, 2) @ torch.linalg.cholesky(found.covariance).T

    def losses(scale: float) -> tuple[float, float]:
        def score(z: Tensor) -> Tensor:
            return scale * z @ found.score.T

        denoising = work.antithetic_loss(score, points, 0.02, torch.Generator().manual_seed(0))
        return float(work.implicit_loss(score, points)), float(denoising)

    at = {scale: losses(scale) for scale in (0.8, 1.0, 1.2)}
    for kind in (0, 1):
        assert at[1.0][kind] < min(at[0.8][kind], at[1.2][kind])
    assert at[1.0][0] == pytest.approx(float(torch.trace(found.score)), rel=0.05)  # -E|s|^2 = -tr S^-1
    assert at[1.0][0] == pytest.approx(at[1.0][1], rel=0.05)


def test_the_simulator_s_step_can_be_the_noise() -> None:
    trap = work.linear_process(*work.rotating_trap(1.0))
    points, dt = normal(5, 40000, 2), 0.01
    generator = torch.Generator().manual_seed(0)
    step = -dt * points @ trap.drift.T
    at = {
        scale: float(work.antithetic_loss(lambda z, s=scale: -s * z, points, math.sqrt(2 * dt), generator, step))
        for scale in (0.8, 1.0, 1.2)
    }
    assert at[1.0] == min(at.values())


def test_pairs_take_the_variance_out_of_denoising() -> None:
    points, sigma = normal(6, 64, 2), 0.01

    def draws(antithetic: bool) -> Tensor:
        values = []
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            if antithetic:
                values.append(work.antithetic_loss(lambda z: -z, points, sigma, generator))
            else:
                xi = torch.randn(points.shape, generator=generator, dtype=points.dtype)
                score = -(points + sigma * xi)
                values.append((score.square() + 2 * score * xi / sigma).sum(-1).mean())
        return torch.stack(values).std()

    assert draws(False) > 20 * draws(True)


def test_penalties_differ_in_what_they_see() -> None:
    div_v, v_dot_s = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert work.stationarity_penalty(div_v, v_dot_s, "mean_divergence") == 0
    assert work.stationarity_penalty(div_v, v_dot_s, "mean_work") == 0
    assert work.stationarity_penalty(div_v, v_dot_s) == 9


def test_the_released_map_is_the_divergence_of_the_orientation_flow() -> None:
    turning, points = 0.7, normal(7, 4, 3)

    def score(g: Tensor) -> Tensor:
        return -g - 0.1 * g**3

    direct = work.divergence(lambda g: -turning * g - turning * score(g), points)
    torch.testing.assert_close(work.orientation_divergence(work.divergence(score, points), turning, 3), direct)


EYE, POINTS = torch.eye(2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
REFUSED = {
    "drift must be a square": lambda: work.linear_process(torch.zeros(2, 3), EYE),
    "drift must have eigenvalues": lambda: work.linear_process(-EYE, EYE),
    "diffusion must be symmetric": lambda: work.linear_process(EYE, torch.diag(torch.tensor([1.0, 0.0]))),
    "diffusion must be \\[2": lambda: work.linear_process(EYE, torch.eye(3)),
    "finite": lambda: work.linear_process(EYE * math.nan, EYE),
    "pull": lambda: work.rotating_trap(1.0, 0.0),
    "noise": lambda: work.swimmer_rate(1.0, 1.0, 1.0, 0.0),
    "speed": lambda: work.swimmer_rate(math.nan, 1.0, 1.0, 1.0),
    "drift and score": lambda: work.probability_velocity(POINTS, POINTS[:2], EYE),
    "nan": lambda: work.entropy_production(POINTS * math.nan, EYE),
    "particles must": lambda: work.entropy_production(POINTS, EYE, 3),
    "couples": lambda: work.entropy_production(POINTS, EYE + 0.5, 2),
    "points and field": lambda: work.divergence(lambda z: z[..., :1], POINTS),
    "kind": lambda: work.stationarity_penalty(POINTS, POINTS, "none"),  # type: ignore[arg-type]
    "div_v": lambda: work.stationarity_penalty(POINTS, POINTS[:1]),
    "sigma": lambda: work.antithetic_loss(lambda z: z, POINTS, 0.0, torch.Generator()),
    "points and step": lambda: work.antithetic_loss(lambda z: z, POINTS, 1.0, torch.Generator(), POINTS[None, 0]),
    "turning": lambda: work.orientation_divergence(POINTS, 0.0, 2),
    "walkers": lambda: Trap(walkers=0),
    "omegas": lambda: Trap(omegas=()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


@pytest.fixture(scope="module")
def learned() -> Learned:
    return learn(Trap(omegas=(0.0, 1.0, 2.0), seeds=(0,), walkers=4000, steps=700))


def test_a_learned_score_tells_the_rate(learned: Learned) -> None:
    rest, slow, fast = learned.rates()[0].tolist()
    assert rest < 0.1
    assert slow == pytest.approx(2, rel=0.15)
    assert fast == pytest.approx(8, rel=0.15)


def test_samples_alone_cannot_tell(learned: Learned) -> None:
    # the score that was learned at rest gives the rate of any drift, and that of the fast trap gives 0 at rest
    assert float(learned.rates((2.0, 1.0, 2.0))[0, 0]) == pytest.approx(8, rel=0.15)
    assert float(learned.rates((0.0, 1.0, 0.0))[0, 2]) < 0.1
    with pytest.raises(UserError, match="omegas"):
        learned.rates((1.0,))


def test_same_seed_same_result() -> None:
    settings = Trap(omegas=(1.0,), seeds=(3,), walkers=100, time=0.5, steps=5)
    assert torch.equal(learn(settings).rates(), learn(settings).rates())
