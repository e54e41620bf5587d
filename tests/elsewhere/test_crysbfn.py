"""CrysBFN: beliefs on a circle, their update, the schedule, and the demonstration that the step does not suffice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.elsewhere import crysbfn as cb
from rlvr_lab.elsewhere import crysbfn_demo as demo
from rlvr_lab.errors import UserError

angle = st.floats(-3.1, 3.1)
strength = st.floats(0.01, 500.0)


def unit(c: float, m: float) -> np.ndarray:
    return c * np.array([math.cos(m), math.sin(m)])


@given(m=angle, c=strength, y=angle, alpha=strength)
def test_the_update_is_a_sum_of_vectors(m: float, c: float, y: float, alpha: float) -> None:
    mean, after = cb.bayesian_update(m, c, y, alpha)
    np.testing.assert_allclose(unit(float(after), float(mean)), unit(c, m) + unit(alpha, y), atol=1e-9 * (c + alpha))


@given(m=angle, c=strength, y=angle, alpha=strength)
def test_certainty_falls_exactly_where_the_observation_is_opposed_enough(m, c, y, alpha) -> None:
    _, after = cb.bayesian_update(m, c, y, alpha)
    margin = math.cos(y - m) + alpha / (2 * c)
    if abs(margin) > 1e-6:
        assert (after < c) == (margin < 0)
        assert abs(c - alpha) - 1e-9 <= after <= c + alpha + 1e-9


def test_edges_of_the_update() -> None:
    mean, after = cb.bayesian_update(1.0, 0.0, -2.0, 3.0)
    assert float(mean) == pytest.approx(-2.0)
    assert float(after) == pytest.approx(3.0)
    for c, alpha in ((2.0, 5.0), (5.0, 2.0), (1e3, 1e3)):
        assert float(cb.bayesian_update(0.5, c, 0.5 + math.pi, alpha)[1]) == pytest.approx(abs(c - alpha), abs=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.3, 4.0, 60.0])
def test_entropy_is_that_of_the_density(c: float) -> None:
    x = np.linspace(-np.pi, np.pi, 20000, endpoint=False)
    p = np.exp(c * (np.cos(x) - 1))
    p /= p.mean() * 2 * np.pi
    direct = -(p * np.log(p)).mean() * 2 * np.pi
    assert float(cb.belief_entropy(c)) == pytest.approx(direct, abs=1e-9)
    assert float(cb.mean_cosine(c)) == pytest.approx((p * np.cos(x)).mean() * 2 * np.pi, abs=1e-9)


def test_entropy_at_the_limits() -> None:
    assert float(cb.belief_entropy(0.0)) == pytest.approx(math.log(2 * math.pi))
    assert float(cb.belief_entropy(1e6)) == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 1e6), abs=1e-6)
    c = np.geomspace(1e-3, 1e5, 30)
    np.testing.assert_allclose(cb.concentration_of(cb.belief_entropy(c)), c, rtol=1e-6)
    assert (np.diff(cb.belief_entropy(c)) < 0).all()


@given(m1=angle, c1=strength, m2=angle, c2=strength)
def test_divergence_is_zero_only_at_equality(m1, c1, m2, c2) -> None:
    assert float(cb.kl_von_mises(m1, c1, m1, c1)) == pytest.approx(0.0, abs=1e-9)
    assert float(cb.kl_von_mises(m1, c1, m2, c2)) >= -1e-9
    uniform = cb.kl_von_mises(m1, c1, m2, 0.0)
    assert float(uniform) == pytest.approx(cb.FLAT - float(cb.belief_entropy(c1)), abs=1e-8)


def test_loss_is_the_divergence_of_sender_and_receiver() -> None:
    x, x_hat, alpha = torch.tensor(0.3), torch.tensor(1.7), torch.tensor(2.5, dtype=torch.float64)
    loss = cb.step_loss(x_hat.double(), x.double(), alpha, 10)
    assert float(loss) == pytest.approx(10 * float(cb.kl_von_mises(0.3, 2.5, 1.7, 2.5)), rel=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "wrapped"])
def test_loss_knows_the_circle_and_has_a_gradient(distance: cb.Distance) -> None:
    x, alpha = torch.tensor([3.1, -3.1], dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64)
    x_hat = torch.tensor([-3.1, 2.9], dtype=torch.float64, requires_grad=True)
    turned = cb.step_loss(x_hat + 2 * torch.pi, x, alpha, 5, distance)
    torch.testing.assert_close(cb.step_loss(x_hat, x, alpha, 5, distance), turned)
    assert bool((turned < 5).all())
    assert torch.autograd.gradcheck(lambda z: cb.step_loss(z, x, alpha, 5, distance), x_hat)


def test_schedule_reproduces_the_released_accuracies() -> None:
    np.testing.assert_allclose(cb.accuracy_schedule(10), cb.RELEASED_10, rtol=1e-3)


def test_schedule_is_linear_in_entropy_for_targets_and_not_for_beliefs() -> None:
    beta = cb.target_concentrations(10)
    assert np.ptp(np.diff(cb.belief_entropy(beta))) < 1e-6
    _, c = cb.flow(np.zeros(4000), cb.accuracy_schedule(10), np.random.default_rng(0))
    share = c.mean(0) / beta
    assert share[0] == pytest.approx(1.0)
    assert (share[1:4] < 0.95).all()
    assert share[-1] > 0.98
    assert (c.mean(0)[1:] < np.cumsum(cb.accuracy_schedule(10))[1:]).all(), "accuracies do not add"


def test_one_cumulative_sum_equals_one_update_after_the_other() -> None:
    alphas, x = np.array([0.5, 2.0, 1.0, 7.0]), np.array([0.2, -2.0])
    means, concentrations = cb.flow(x, alphas, np.random.default_rng(3))
    y = np.random.default_rng(3).vonmises(x[:, None], alphas, (2, 4))
    m, c = np.zeros(2), np.zeros(2)
    for i, alpha in enumerate(alphas):
        m, c = cb.bayesian_update(m, c, y[:, i], alpha)
        np.testing.assert_allclose(m, means[:, i], atol=1e-12)
        np.testing.assert_allclose(c, concentrations[:, i], atol=1e-12)


def test_given_the_concentration_the_mean_is_von_mises_around_the_datum() -> None:
    m, c = cb.flow(np.full(40000, 0.7), np.full(6, 0.8), np.random.default_rng(0))
    group = (c[:, -1] > 2.0) & (c[:, -1] < 2.2)
    assert np.cos(m[group, -1] - 0.7).mean() == pytest.approx(float(cb.mean_cosine(2.1)), abs=0.02)


def test_network_input_is_between_prior_and_end() -> None:
    assert float(cb.normalised_log_concentration(0.0, 1000.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(cb.normalised_log_concentration(1000.0, 1000.0)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("restart", [False, True])
def test_sampler_ends_at_the_estimate(restart: bool) -> None:
    told = []

    def network(m: np.ndarray, c: np.ndarray, step: int) -> np.ndarray:
        told.append((step, float(c.max())))
        return np.full_like(m, 1.2)

    alphas = cb.accuracy_schedule(10)
    x, entropies = cb.generate(network, alphas, 50, np.random.default_rng(0), restart)
    assert (x == 1.2).all()
    assert entropies.shape == (10, 50)
    assert told[0] == (1, 0.0)
    assert told[1][1] == pytest.approx(alphas[0])
    assert entropies[-1].mean() == pytest.approx(float(cb.belief_entropy(1000.0)), abs=0.05)


def test_entropy_rises_in_many_updates_although_its_mean_falls() -> None:
    alphas = cb.accuracy_schedule(1000)
    rising = demo.rising_share(alphas, 1000, np.random.default_rng(0))
    assert rising[0] == 0
    assert 0.25 < rising[1:300].min() < rising[1:300].max() < 0.55
    assert rising[900:].max() < 0.05
    few = demo.rising_share(cb.accuracy_schedule(10), 4000, np.random.default_rng(0))
    assert 0.1 < few[1] < 0.18
    assert few[4:].max() < 0.01
    assert demo.rising_share_gaussian(alphas).max() == 0


def test_an_oracle_told_the_step_loses_and_with_ten_steps_soon_ties() -> None:
    many = demo.oracle_gap(demo.Settings(updates=(80, 160), draws=1500))
    assert (many.gap > 0.015).all()
    few = demo.oracle_gap(demo.Settings(steps=10, updates=(6, 8, 10), draws=1500))
    assert (np.abs(few.gap) < 0.004).all()
    assert many.spread[0] > 5 * few.spread[0]


def test_demonstration_is_repeatable_and_its_posterior_is_a_posterior() -> None:
    settings = demo.Settings(steps=10, updates=(3,), draws=400)
    assert demo.oracle_gap(settings).gap == demo.oracle_gap(settings).gap
    _, log_p = demo.ring(settings)
    assert float(np.exp(log_p).sum()) == pytest.approx(1.0)
    predict = demo.exact_network(settings)
    sharp = predict(np.array([-2.0, 0.4]), np.array([1e4, 1e4]), 9)
    np.testing.assert_allclose(sharp, [-2.0, 0.4], atol=0.02)
    shares, widths = demo.shares_and_widths(np.array([-2.0, -2.0, 0.5, 1.6]), settings)
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25])
    np.testing.assert_allclose(widths, [0.0, 0.1, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cb.belief_entropy(-1.0), "c must"),
        (lambda: cb.belief_entropy(float("nan")), "c must"),
        (lambda: cb.belief_entropy(1e9), "c must"),
        (lambda: cb.belief_entropy([]), "c is empty"),
        (lambda: cb.concentration_of(2.0), "entropy must"),
        (lambda: cb.bayesian_update(0.0, 1.0, 0.0, -1.0), "alpha must"),
        (lambda: cb.bayesian_update(float("inf"), 1.0, 0.0, 1.0), "m must"),
        (lambda: cb.bayesian_update([0.0, 1.0], 1.0, [0.0, 1.0, 2.0], 1.0), "shapes"),
        (lambda: cb.kl_von_mises(0.0, -1.0, 0.0, 1.0), "c1 must"),
        (lambda: cb.step_loss(torch.zeros(2), torch.zeros(3), torch.ones(1), 5), "shapes"),
        (lambda: cb.step_loss(torch.zeros(2), torch.zeros(2), torch.ones(1), 0), "steps must"),
        (lambda: cb.step_loss(torch.zeros(2), torch.zeros(2), -torch.ones(1), 1), "alpha must"),
        (lambda: cb.step_loss(torch.zeros(2), torch.zeros(2), torch.ones(1), 1, "l1"), "distance must"),  # type: ignore[arg-type]
        (lambda: cb.step_loss(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1), 1), "x_hat must"),
        (lambda: cb.target_concentrations(0), "steps must"),
        (lambda: cb.accuracy_schedule(10, 0.0), "final must"),
        (lambda: cb.normalised_log_concentration(1.0, -1.0), "final must"),
        (lambda: cb.flow([], [1.0], np.random.default_rng(0)), "x is empty"),
        (lambda: cb.flow([0.0], [-1.0], np.random.default_rng(0)), "alphas must"),
        (lambda: cb.generate(lambda m, c, i: m, [1.0], 0, np.random.default_rng(0)), "count must"),
        (lambda: demo.Settings(updates=(2000,)), "updates must"),
        (lambda: demo.Settings(weights=(0.5, 0.5)), "centres and weights"),
        (lambda: demo.Settings(draws=1), "draws"),
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(UserError, match=word):
        call()
