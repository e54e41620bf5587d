"""Symphony's regulariser, losses and weights, and a cart pushed with and without swaddling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere import symphony as sy
from rlvr_lab.elsewhere import symphony_demo as demo
from rlvr_lab.errors import UserError

inside = st.floats(0.02, 0.98)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("start", [(0.95, 0.9), (0.01, 0.01), (0.5, 0.5), (0.9, 0.01)])
def test_swaddling_alone_comes_to_rest_near_one_over_e(start: tuple[float, float]) -> None:
    scale, beta = sy.descend(*start)[-1]
    assert (scale, beta) == pytest.approx(sy.rest_point(), abs=1e-4)
    assert scale == pytest.approx(1 / math.e, abs=0.006)
    assert beta == pytest.approx(1 / (4 * math.e), abs=0.001)


def test_the_first_order_point_is_where_well_and_pull_balance_without_the_wall() -> None:
    scale, beta = 1 / math.e, 1 / (4 * math.e)
    assert math.log(scale) + 1 == pytest.approx(0)
    assert scale * math.log(scale) + 4 * beta == pytest.approx(0)
    slopes = sy.swaddling_slopes(scale, beta)
    assert 0 < slopes[0] < 2e-3  # what is left of the wall pushes the scale down
    assert abs(slopes[1]) < 1e-4


@given(scale=inside, beta=inside)
def test_slopes_are_those_of_autograd(scale: float, beta: float) -> None:
    s, b = t(scale).requires_grad_(), t(beta).requires_grad_()
    ds, db = torch.autograd.grad(sy.swaddling(s, b), (s, b))
    assert sy.swaddling_slopes(scale, beta) == pytest.approx((float(ds), float(db)), rel=1e-9, abs=1e-12)


def test_the_exponent_gives_beta_no_gradient() -> None:
    s, b = t(0.9), t(0.5).requires_grad_()
    (slope,) = torch.autograd.grad(sy.swaddling(s, b), b)
    assert float(slope) == pytest.approx(0.9 * math.log(0.9) + 4 * 0.5 / (1 - 0.5**4))
    whole = (sy.swaddling(s, t(0.5 + 1e-6)) - sy.swaddling(s, t(0.5 - 1e-6))) / 2e-6
    assert abs(float(whole) - float(slope)) > 0.1


@given(scale=inside, beta=st.floats(0.01, 0.3))
def test_terms_have_their_signs(scale: float, beta: float) -> None:
    wall, well, pull = (float(term[0]) for term in sy.swaddling_terms(t(scale), t(beta)))
    assert wall >= 0
    assert pull > 0
    assert -beta / math.e - 1e-12 <= well < 0


@given(x=st.floats(-20, 20))
def test_the_two_losses_are_even_and_odd_and_agree_in_size(x: float) -> None:
    assert float(sy.rehse(t(x))) == float(sy.rehse(t(-x)))
    assert float(sy.rehae(t(x))) == -float(sy.rehae(t(-x)))
    assert abs(float(sy.rehae(t(x)))) == pytest.approx(float(sy.rehse(t(x))))


def test_losses_are_quadratic_near_zero_and_absolute_far_away() -> None:
    assert float(sy.rehse(t(1e-3))) == pytest.approx(0.5e-6, rel=1e-5)
    assert float(sy.rehse(t(40.0))) == pytest.approx(40)


@pytest.mark.parametrize("count", [2, 6, 48])
def test_atom_weights_fall_and_the_soft_value_lies_below_the_mean(count: int) -> None:
    weights = sy.atom_weights(count)
    assert float(weights.sum()) == pytest.approx(1)
    assert bool((weights.diff() <= 1e-12).all())
    atoms = torch.randn(7, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = sy.soft_value(atoms)
    assert bool((value < atoms.mean(-1)).all())
    assert bool((value > atoms.min(-1).values).all())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(sy.soft_value(atoms[:, order]), value)
    assert torch.allclose(sy.soft_value(atoms + 3), value + 3)


def test_replay_never_draws_the_oldest_and_hardly_distinguishes_the_newer_half() -> None:
    chances = sy.fading_probabilities(100)
    assert float(chances[0]) == 0
    assert float(chances.sum()) == pytest.approx(1)
    assert bool((chances.diff() >= 0).all())
    assert float(chances[50] / chances[99]) > 0.99
    assert float(chances[5] / chances[99]) < 0.01


def test_heads_are_clamped_and_ordered() -> None:
    action, scale, beta = sy.heads(t(-1.0, 0.0, -50.0))
    assert float(action) == pytest.approx(math.tanh(-0.5))
    assert (float(scale), float(beta)) == (sy.LEAST, sy.MOST)


def test_noise_is_bounded_by_one_and_loudness_is_a_factor() -> None:
    normal = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    noise = sy.bounded_noise(normal)
    assert float(noise.abs().max()) == pytest.approx(1)
    assert torch.allclose(sy.bounded_noise(normal, 2.0), 2 * noise)


def test_advantage_keeps_the_whole_gradient_and_the_sign() -> None:
    value = t(2.0, 0.5).requires_grad_()
    gain, base = sy.temporal_advantage(value, t(1.0), floor=0.0)
    assert gain.sign().tolist() == [1, -1]
    assert not base.requires_grad
    assert (gain * base.abs()).tolist() == pytest.approx((sy.PHI * (value - 1)).tolist())
    (slope,) = torch.autograd.grad(gain.sum(), value)
    assert torch.allclose(slope, 1 / base.abs())


def test_a_value_near_zero_needs_the_floor() -> None:
    assert (
        torch.isinf(sy.temporal_advantage(t(0.0, 1.0), t(0.0), floor=0.0)[0]).any()
        or torch.isnan(sy.temporal_advantage(t(0.0, 1.0), t(0.0), floor=0.0)[0]).any()
    )
    assert torch.isfinite(sy.temporal_advantage(t(0.0, 1.0), t(0.0))[0]).all()


def test_a_stronger_signal_costs_entropy_and_the_quadrature_agrees_with_draws() -> None:
    signal = torch.linspace(0, 1, 6)
    change = sy.squashed_entropy_change(signal)
    assert bool((change < 0).all())
    assert bool((change.diff() < 0).all())
    assert torch.allclose(change, sy.squashed_entropy_change(-signal))
    draws = sy.bounded_noise(torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for s, exact in zip(signal.tolist(), change.tolist(), strict=True):
        assert float((1 - torch.tanh(s + draws).square()).log().mean()) == pytest.approx(exact, abs=4e-3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sy.heads(torch.zeros(2, 4)), "output"),
        (lambda: sy.bounded_noise(torch.zeros(2), -1.0), "loudness"),
        (lambda: sy.swaddling(t(0.5), t(0.5, 0.5)), "beta"),
        (lambda: sy.swaddling(t(1.0), t(0.5)), "scale"),
        (lambda: sy.swaddling(t(0.5), t(0.0)), "beta"),
        (lambda: sy.swaddling(t(math.nan), t(0.5)), "scale"),
        (lambda: sy.swaddling_slopes(0.0, 0.5), "scale"),
        (lambda: sy.descend(0.5, 0.5, rate=0.0), "steps"),
        (lambda: sy.rehse(torch.zeros(0)), "errors"),
        (lambda: sy.rehae(t(math.inf)), "advantages"),
        (lambda: sy.atom_weights(1), "count"),
        (lambda: sy.fading_probabilities(1), "count"),
        (lambda: sy.soft_value(t(1.0)), "atoms"),
        (lambda: sy.soft_value(t(1.0, math.nan)), "atoms"),
        (lambda: sy.temporal_advantage(t(1.0), t(1.0), floor=-1.0), "floor"),
        (lambda: sy.squashed_entropy_change(t(math.nan)), "signal"),
        (lambda: demo.Arm(-1.0), "swaddling"),
        (lambda: demo.Arm(penalty=math.nan), "penalty"),
        (lambda: demo.Task(runs=0), "runs"),
        (lambda: demo.Task(steps=10), "warm_up"),
        (lambda: demo.Task(width=30), "width"),
        (lambda: demo.Task(rate=0.0), "rate"),
    ],
)
def test_refuses(call: object, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}"):
        call()  # type: ignore[operator]


def small(seed: int = 0, **settings: int) -> dict[str, demo.Outcome]:
    return demo.run(demo.Task(seed=seed, runs=2, steps=150, warm_up=120, width=16, **settings))


def test_equal_seeds_give_equal_runs_and_arms_start_from_equal_weights() -> None:
    one, two, other = small(), small(), small(seed=1)
    for arm in demo.ARMS:
        assert torch.equal(one[arm].path, two[arm].path)
        assert not torch.equal(one[arm].path, other[arm].path)
    task = demo.Task(runs=2)
    actor = demo.Agent(task, list(demo.ARMS.values()), torch.Generator().manual_seed(0)).actor
    assert all(torch.equal(p[:2], p[2:4]) for p in actor.parameters)


def test_the_cart_moves_by_the_stated_law() -> None:
    after = demo.advance(torch.tensor([[1.0, -0.5]]), torch.tensor([[0.2]]))
    assert after[0].tolist() == pytest.approx([0.95, -0.48])
    assert float(demo.reward(after)[0]) == pytest.approx(1 - 0.95**2 - 0.1 * 0.48**2)
    assert float(demo.advance(torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0]])).max()) == demo.LIMIT


def test_the_optimiser_has_no_bias_correction() -> None:
    p = torch.tensor([1.0], requires_grad=True)
    demo.ReleasedAdam([p], 0.1).step((2 * p).sum())
    m, v = 2 * (1 - sy.PHI), 4 * 0.005
    assert p.item() == pytest.approx(1 - 0.1 * (m / math.sqrt(v) + 0.01), abs=1e-5)


@pytest.mark.slow
def test_swaddled_actions_are_smoother() -> None:
    """The card shows this run and asserts only the analysis; the margins are wide."""
    found = demo.run(demo.Task(runs=3))
    jerk = {arm: one.jerk.numpy() for arm, one in found.items()}
    assert jerk["swaddled"].max() < 0.05
    assert np.median(jerk["not swaddled"]) > 1.3 * np.median(jerk["swaddled"])
    assert float(found["swaddled"].reward.mean()) > 0.85
