"""Dale meets Langevin: identities of the two rules, and the sampler against what forgets sign or Ito term."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.dynamics import natural_gradient_step
from rlvr_lab.elsewhere import dale_langevin as dl
from rlvr_lab.errors import UserError

SMALL = dl.Settings(samples=1500)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 1000), eta=st.floats(0.01, 2.0))
@settings(max_examples=30, deadline=None)
def test_exponentiated_gradient_minimises_the_mirror_objective(seed: int, eta: float) -> None:
    w, g = normal(4, seed=seed).exp(), normal(4, seed=seed + 1)

    def objective(v: torch.Tensor) -> float:
        return float((g * v).sum() + dl.bregman_kl(v, w) / eta)

    best = dl.exponentiated_gradient(w, g, eta)
    for k in range(5):
        assert objective(best * (0.1 * normal(4, seed=seed + 2 + k)).exp()) > objective(best)


def test_mirror_divergence_is_zero_only_at_itself() -> None:
    w = normal(6).exp()
    assert float(dl.bregman_kl(w, w)) == pytest.approx(0.0, abs=1e-12)
    assert float(dl.bregman_kl(w * 1.1, w)) > 0


def test_simplex_step_adds_to_logits() -> None:
    logits, advantage = normal(5), normal(5, seed=1)
    p = dl.exponentiated_gradient_simplex(logits.softmax(0), -advantage, 0.3)
    assert torch.allclose(p, (logits + 0.3 * advantage).softmax(0))
    q = dl.exponentiated_gradient_simplex(logits.softmax(0), -advantage + 7.0, 0.3)
    assert torch.allclose(p, q)  # a constant of the gradient does not matter
    step = natural_gradient_step(logits, advantage, 0.3)
    assert torch.allclose(p, (logits + step).softmax(0))


def test_simplex_step_keeps_zeros() -> None:
    p = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    after = dl.exponentiated_gradient_simplex(p, torch.tensor([-9.0, 0.0, 0.0], dtype=torch.float64), 1.0)
    assert float(after[0]) == 0.0
    assert float(after.sum()) == pytest.approx(1.0)


def test_only_exponentiated_gradient_keeps_signs() -> None:
    eg, gd = dl.random_steps(4000, 400, 0.05, torch.Generator().manual_seed(0))
    assert bool((eg > 0).all())
    assert 0.13 < float((gd < 0).double().mean()) < 0.20
    assert abs(dl.skewness(eg.log())) < 0.15
    assert dl.skewness(eg) > 2.5
    assert abs(dl.skewness(gd)) < 0.15


def test_forward_walk_has_no_drift_in_logarithm() -> None:
    x = dl.forward_sample(torch.full((40_000,), 2.0, dtype=torch.float64), normal(40_000), 0.7, 0.5)
    assert float(x.log().mean()) == pytest.approx(math.log(2), abs=0.01)
    assert float(x.log().std()) == pytest.approx(0.7 * math.sqrt(0.5), rel=0.02)


def test_target_is_the_conditional_score() -> None:
    x0, eps, sigma, t = torch.tensor(1.7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64), 0.6, 0.8
    x = dl.forward_sample(x0, eps, sigma, t).requires_grad_()
    log_p = -((x.log() - x0.log()) ** 2) / (2 * sigma**2 * t) - x.log()
    (slope,) = torch.autograd.grad(log_p, x)
    assert float((x * slope).detach()) == pytest.approx(float(dl.mdsm_target(eps, sigma, t)))


def test_denoising_loss_is_least_at_the_exact_score() -> None:
    mixture, sigma, t, n = dl.Mixture(), 1.0, 0.5, 60_000
    eps = normal(n, 2, seed=3)
    x = dl.forward_sample(mixture.sample(n, torch.Generator().manual_seed(2)), eps, sigma, t)
    h = mixture.score(x, sigma, t)
    residual = h - dl.mdsm_target(eps, sigma, t)
    for probe in (torch.ones_like(x), x.log(), x.log() ** 3):
        noise = (residual * probe).std() / math.sqrt(2 * n)
        assert abs(float((residual * probe).mean())) < 5 * float(noise)
    best = dl.mdsm_loss(h, eps, sigma, t)
    assert best < dl.mdsm_loss(h + 0.1, eps, sigma, t)
    assert best < dl.mdsm_loss(h * 0.9, eps, sigma, t)


def test_explicit_and_denoising_losses_differ_by_a_constant() -> None:
    """For h = a + b ln x the two losses, as functions of (a, b), have the same differences."""
    mixture, sigma, t, n = dl.Mixture(), 1.0, 0.5, 400_000
    eps = normal(n, 2, seed=5)
    x = dl.forward_sample(mixture.sample(n, torch.Generator().manual_seed(4)), eps, sigma, t)

    def both(a: float, b: float) -> tuple[float, float]:
        h = a + b * x.log()
        return float(dl.mdsm_loss(h, eps, sigma, t)), float(dl.explicit_loss(h, torch.full_like(x, b)))

    d0, e0 = both(0.0, 0.0)
    for a, b in ((-1.0, 0.0), (-1.0, -1.0), (0.5, 0.3)):
        d, e = both(a, b)
        assert d - d0 == pytest.approx(e - e0, abs=0.02)


def test_score_of_one_bump_by_hand() -> None:
    one, x = dl.Mixture(centres=((0.3,),), log_sd=0.5), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert torch.allclose(one.score(x, 2.0, 0.25), (0.3 - x.log()) / (0.25 + 1.0) - 1)


def test_small_steps_of_the_two_samplers_agree_and_the_third_does_not() -> None:
    x, h, z = normal(1000).exp(), normal(1000, seed=1), normal(1000, seed=2)

    def mean_move(rule: dl.Rule, dt: float) -> float:
        paired = [dl.reverse_step(x, h, s * z, 1.0, dt, rule) / x - 1 for s in (1, -1)]
        return float((sum(paired) / (2 * dt)).mean())

    z = z / z.square().mean().sqrt()
    exact = float((1.5 + h).mean())
    assert mean_move("ambient", 1e-4) == pytest.approx(exact, abs=1e-6)
    assert mean_move("sign_kept", 1e-4) == pytest.approx(exact, abs=5e-3)
    assert mean_move("no_ito", 1e-4) == pytest.approx(exact - 1.5, abs=1e-6)


def test_sampler_keeps_signs_and_converges() -> None:
    few, many = (dl.draw(SMALL, "sign_kept", n) for n in (10, 200))
    assert few.crossed == many.crossed == 0.0
    assert dl.distance(SMALL, many) < 0.5 * dl.distance(SMALL, few)
    assert dl.distance(SMALL, many) < 3 * dl.data_floor(SMALL)


def test_ambient_sampler_crosses_zero_in_large_steps() -> None:
    few = dl.draw(SMALL, "ambient", 10)
    assert 0.3 < few.crossed < 0.6
    assert dl.draw(SMALL, "ambient", 200).crossed == 0.0


def test_without_the_ito_term_smaller_steps_do_not_help() -> None:
    assert dl.distance(SMALL, dl.draw(SMALL, "no_ito", 200)) > 0.5
    assert dl.distance(SMALL, dl.draw(SMALL, "no_ito", 400)) > 0.5


def test_same_seed_gives_the_same_sample() -> None:
    assert torch.equal(dl.draw(SMALL, "sign_kept", 5).x, dl.draw(SMALL, "sign_kept", 5).x)
    other = dl.Settings(samples=1500, seed=1)
    assert not torch.equal(dl.draw(SMALL, "sign_kept", 5).x, dl.draw(other, "sign_kept", 5).x)


def test_skewness_of_a_constant_is_undefined() -> None:
    assert math.isnan(dl.skewness(torch.ones(5)))


W = torch.ones(3, dtype=torch.float64)
REFUSED = {
    "eta": lambda: dl.exponentiated_gradient(W, W, 0.0),
    "eta ": lambda: dl.exponentiated_gradient_simplex(W / 3, W, -1.0),
    "gradient": lambda: dl.exponentiated_gradient(W, W[:2], 0.1),
    "gradient ": lambda: dl.exponentiated_gradient(W, W * math.nan, 0.1),
    "p": lambda: dl.exponentiated_gradient_simplex(W, W, 0.1),
    "w": lambda: dl.bregman_kl(W, -W),
    "v": lambda: dl.bregman_kl(-W, W),
    "x0": lambda: dl.forward_sample(W * 0, W, 1.0, 1.0),
    "eps": lambda: dl.forward_sample(W, W[:1], 1.0, 1.0),
    "t": lambda: dl.mdsm_target(W, 1.0, 0.0),
    "sigma": lambda: dl.mdsm_target(W, math.nan, 1.0),
    "h": lambda: dl.mdsm_loss(W[:2], W, 1.0, 1.0),
    "x_dh_dx": lambda: dl.explicit_loss(W, W[:2]),
    "dt": lambda: dl.reverse_step(W, W, W, 1.0, 0.0),
    "z": lambda: dl.reverse_step(W, W, W[:2], 1.0, 0.1),
    "rule": lambda: dl.reverse_step(W, W, W, 1.0, 0.1, "euler"),  # type: ignore[arg-type]
    "x": lambda: dl.Mixture().score(-W[:2].unsqueeze(0), 1.0, 0.5),
    "t ": lambda: dl.Mixture().score(W[:2].unsqueeze(0), 1.0, -0.5),
    "n": lambda: dl.Mixture().sample(0, torch.Generator()),
    "steps": lambda: dl.draw(SMALL, "sign_kept", 0),
    "a and b": lambda: dl.sliced_w1(W, W, 2, torch.Generator()),
    "directions": lambda: dl.sliced_w1(W[:, None], W[:, None], 0, torch.Generator()),
    "steps ": lambda: dl.random_steps(3, 0, 0.1, torch.Generator()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name.strip()} must"):
        REFUSED[name]()
