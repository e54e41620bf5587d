"""Maximum entropy: the die, nested constraints, response and fluctuation, and what a Markov step loses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.elsewhere import maxent_statmech as ms
from rlvr_lab.errors import UserError

FACES = np.arange(1.0, 7.0)
EVEN = (FACES % 2 == 0).astype(float)
KNOWN = np.array([FACES, FACES**2, EVEN]), [4.5, 22.5, 0.4]


def random_kernel(n: int, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).random((n, n)) + 0.05
    return weights / weights.sum(1, keepdims=True)


def test_the_die_of_the_card() -> None:
    fit = ms.maximum_entropy([FACES], [4.5])
    assert fit.p == pytest.approx([0.0544, 0.0788, 0.1142, 0.1654, 0.2398, 0.3475], abs=5e-5)
    assert fit.multipliers[0] == pytest.approx(-0.3710, abs=5e-5)
    assert fit.covariance[0, 0] == pytest.approx(2.2982, abs=5e-5)
    assert [f.entropy for f in ms.successive(*KNOWN)] == pytest.approx([1.6136, 1.6133, 1.5234], abs=5e-5)


@given(mean=st.floats(1.2, 5.8), tilt=st.floats(0.0, 3.0))
@settings(max_examples=40, deadline=None)
def test_constraints_are_met_and_entropy_is_the_formula(mean: float, tilt: float) -> None:
    q = np.exp(-tilt * np.linspace(0, 1, 6) ** 2)
    q /= q.sum()
    fit = ms.maximum_entropy([FACES], [mean], q)
    assert fit.p @ FACES == pytest.approx(mean, abs=1e-8)
    assert fit.p.sum() == pytest.approx(1.0)
    formula = fit.log_partition + fit.multipliers @ [mean] - fit.p @ np.log(q)
    assert fit.entropy == pytest.approx(formula, abs=1e-8)
    assert fit.kl_to_reference == pytest.approx(-fit.log_partition - fit.multipliers @ [mean], abs=1e-8)


def test_a_constraint_that_already_holds_changes_nothing() -> None:
    fit = ms.maximum_entropy([FACES], [3.5])
    assert fit.multipliers == pytest.approx([0.0], abs=1e-9)
    assert fit.entropy == pytest.approx(math.log(6))


def test_steps_of_information_add_up() -> None:
    q = np.array([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    chain = ms.successive(*KNOWN, q)
    for k in (1, 2):
        before, after = chain[k - 1], chain[k]
        assert after.kl_to_reference == pytest.approx(ms.kl(after.p, before.p) + before.kl_to_reference, abs=1e-8)
    again = ms.maximum_entropy(KNOWN[0], KNOWN[1], chain[0].p)  # what is known may enter in any order
    assert again.p == pytest.approx(chain[2].p, abs=1e-8)
    entropies = [f.entropy for f in ms.successive(*KNOWN)]
    assert entropies == sorted(entropies, reverse=True)


def test_every_other_distribution_with_the_averages_has_less_entropy() -> None:
    fit = ms.maximum_entropy([FACES], [4.5])
    others = ms.alternatives(fit, [FACES], 1000, np.random.default_rng(0))
    assert others @ FACES == pytest.approx(np.full(1000, 4.5))
    assert max(ms.entropy(p) for p in others) < fit.entropy
    assert np.abs(others - fit.p).max() > 0.1


def test_response_is_minus_the_fluctuation() -> None:
    fit, h = ms.maximum_entropy(*KNOWN), 1e-5
    for k in range(3):
        step = h * np.eye(3)[k]
        up, down = (ms.tilt(np.full(6, 1 / 6), KNOWN[0], fit.multipliers + s * step)[0] for s in (1, -1))
        assert KNOWN[0] @ (up - down) / (2 * h) == pytest.approx(-fit.covariance[k], abs=1e-5)


def test_redundant_constraints_are_no_obstacle() -> None:
    fit = ms.maximum_entropy([FACES, 2 * FACES + 1, np.ones(6)], [4.5, 10.0, 1.0])
    assert fit.p == pytest.approx(ms.maximum_entropy([FACES], [4.5]).p, abs=1e-8)


def test_excluded_states_stay_excluded() -> None:
    q = np.array([0.0, 0.25, 0.25, 0.25, 0.25, 0.0])
    fit = ms.maximum_entropy([FACES], [4.0], q)
    assert fit.p[[0, 5]].tolist() == [0.0, 0.0]
    assert fit.p @ FACES == pytest.approx(4.0)


@given(beta=st.floats(0.01, 100.0), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_soft_optimum_is_one_constraint_and_beats_every_other(beta: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, r = rng.dirichlet(np.ones(5)), rng.standard_normal(5)
    p = ms.soft_optimal(q, r, beta)
    assert p == pytest.approx(ms.tilt(q, [r], [-1 / beta])[0])

    def objective(x: np.ndarray) -> float:
        return float(x @ r - beta * ms.kl(x, q))

    assert objective(p) == pytest.approx(beta * ms.tilt(q, [r], [-1 / beta])[1], abs=1e-6)
    for other in (q, rng.dirichlet(np.ones(5)), 0.99 * p + 0.01 * q):
        assert objective(other) <= objective(p) + 1e-12


def test_limits_of_the_temperature() -> None:
    q, reward = np.array([0.5, 0.3, 0.15, 0.05]), [0.0, 0.0, 1.0, 1.0]
    assert ms.soft_optimal(q, reward, 1e6) == pytest.approx(q, abs=1e-6)
    assert ms.soft_optimal(q, reward, 1e-3) == pytest.approx([0, 0, 0.75, 0.25])  # q among the best, not one of them
    assert ms.soft_optimal(q, [0.0, 0.0, 1.0, 1.01], 1e-4) == pytest.approx([0, 0, 0, 1.0])


def test_reward_rises_by_its_variance() -> None:
    q, r, h = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 1.0, -1.0, 2.0]), 1e-5
    up, down = (ms.soft_optimal(q, r, 1 / (1.5 + s * h)) for s in (1, -1))
    p = ms.soft_optimal(q, r, 1 / 1.5)
    assert (up - down) @ r / (2 * h) == pytest.approx(ms.covariance(p, [r])[0, 0], abs=1e-6)


@given(seed=st.integers(0, 200), n=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_a_step_never_gains_information(seed: int, n: int) -> None:
    kernel, start = random_kernel(n, seed), np.eye(n)[0]
    falls = ms.relaxation(kernel, start, 8)
    assert (np.diff(falls) <= 1e-12).all()
    assert falls[0] == pytest.approx(-math.log(ms.stationary(kernel)[0]))
    assert ms.stationary(kernel) @ kernel == pytest.approx(ms.stationary(kernel))
    assert ms.entropy_production(kernel) >= -1e-12


@given(seed=st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_detailed_balance_produces_no_entropy(seed: int) -> None:
    weights = np.random.default_rng(seed).random((5, 5)) + 0.05
    even = weights + weights.T
    reversible = even / even.sum(1, keepdims=True)
    assert ms.entropy_production(reversible) == pytest.approx(0.0, abs=1e-12)
    assert ms.entropy_production(weights / weights.sum(1, keepdims=True)) > 1e-4


def test_driven_ring_by_hand() -> None:
    assert ms.entropy_production(ms.ring(3, 0.45, 0.2)) == pytest.approx(0.25 * math.log(0.45 / 0.2))
    assert ms.entropy_production(ms.ring(5, 0.3, 0.3)) == pytest.approx(0.0, abs=1e-12)


def test_one_way_step_produces_infinite_entropy() -> None:
    assert ms.entropy_production([[0, 1, 0], [0, 0, 1], [1, 0, 0]]) == math.inf


@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_current_responds_by_its_correlation_over_time(mu: float) -> None:
    kernel, h = random_kernel(4, 1), 1e-4
    current = np.random.default_rng(2).standard_normal((4, 4))
    up, down = (ms.mean_current(ms.tilted_chain(kernel, current, mu + s * h)[0], current) for s in (1, -1))
    chain, log_rho = ms.tilted_chain(kernel, current, mu)
    assert (up - down) / (2 * h) == pytest.approx(-ms.green_kubo(chain, current), abs=1e-6)
    assert chain.sum(1) == pytest.approx(np.ones(4))
    slope = (ms.tilted_chain(kernel, current, mu + h)[1] - ms.tilted_chain(kernel, current, mu - h)[1]) / (2 * h)
    assert -slope == pytest.approx(ms.mean_current(chain, current), abs=1e-6)
    assert (log_rho == pytest.approx(0.0)) == (mu == 0.0)


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "mean at the end": ("targets", lambda: ms.maximum_entropy([FACES], [6.0])),
    "mean beyond": ("targets", lambda: ms.maximum_entropy([FACES], [0.5])),
    "mean beyond the support": ("targets", lambda: ms.maximum_entropy([FACES], [5.5], [0.5, 0.5, 0, 0, 0, 0])),
    "a contradiction": ("targets", lambda: ms.maximum_entropy([FACES, FACES**2], [4.5, 20.0])),
    "another constant": ("targets", lambda: ms.maximum_entropy([np.ones(6)], [2.0])),
    "empty targets": ("targets", lambda: ms.maximum_entropy([FACES], [])),
    "nan": ("features", lambda: ms.maximum_entropy([FACES * math.nan], [4.5])),
    "two targets": ("features", lambda: ms.maximum_entropy([FACES], [4.5, 1.0])),
    "no distribution": ("reference", lambda: ms.maximum_entropy([FACES], [4.5], FACES)),
    "multipliers": ("features", lambda: ms.tilt(np.ones(6) / 6, [FACES], [1.0, 2.0])),
    "beta zero": ("beta", lambda: ms.soft_optimal([0.5, 0.5], [0, 1], 0.0)),
    "beta nan": ("beta", lambda: ms.soft_optimal([0.5, 0.5], [0, 1], math.nan)),
    "reward": ("reward", lambda: ms.soft_optimal([0.5, 0.5], [0, math.inf], 1.0)),
    "negative p": ("p", lambda: ms.entropy([1.5, -0.5])),
    "unequal sizes": ("q", lambda: ms.kl([0.5, 0.5], [1.0])),
    "rows": ("kernel", lambda: ms.stationary([[0.5, 0.6], [0.5, 0.5]])),
    "not square": ("kernel", lambda: ms.stationary([[0.5, 0.5]])),
    "two islands": ("kernel", lambda: ms.stationary(np.eye(3))),
    "start": ("start", lambda: ms.relaxation(ms.ring(3, 0.3, 0.3), [0.5, 0.5], 3)),
    "ring": ("n", lambda: ms.ring(2, 0.3, 0.3)),
    "ring too fast": ("n", lambda: ms.ring(3, 0.7, 0.5)),
    "current": ("current", lambda: ms.tilted_chain(ms.ring(3, 0.3, 0.3), np.ones((2, 2)), 0.0)),
    "mean of a current": ("current", lambda: ms.mean_current(ms.ring(3, 0.3, 0.3), np.ones((1, 3)))),
    "fluctuation of a current": ("current", lambda: ms.green_kubo(ms.ring(3, 0.3, 0.3), np.ones((1, 3)))),
    "mu": ("mu", lambda: ms.tilted_chain(ms.ring(3, 0.3, 0.3), np.ones((3, 3)), math.nan)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    argument, call = REFUSED[name]
    with pytest.raises(UserError, match=rf"^{argument} must"):
        call()
