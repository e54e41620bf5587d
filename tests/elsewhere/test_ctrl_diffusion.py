"""Soft-optimal denoising: the exact posterior, the bias of an initial law that is kept, and what alpha does."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.elsewhere import ctrl_diffusion as cd
from rlvr_lab.elsewhere.maxent_statmech import entropy, kl, soft_optimal
from rlvr_lab.errors import UserError

LINE = cd.Line()
REWARD = cd.log_label(LINE.label())
INITIAL, KERNELS = cd.reverse_kernels(LINE.data(), LINE.noising(), LINE.steps)


def random_chain(states: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    noising = rng.random((states, states)) + 0.05
    return rng.dirichlet(np.ones(states)), noising / noising.sum(1, keepdims=True), rng.uniform(0.01, 1, states)


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), alpha=st.floats(0.05, 20), gamma=st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_controlled_sampler_draws_from_the_target(seed: int, steps: int, alpha: float, gamma: float) -> None:
    data, noising, label = random_chain(5, steps, seed)
    initial, kernels = cd.reverse_kernels(data, noising, steps)
    assert cd.run(initial, kernels) == pytest.approx(data)
    best = cd.soft_control(initial, kernels, cd.log_label(label), alpha, gamma)
    target = data * label ** (gamma / alpha)
    target /= target.sum()
    assert cd.run(best.initial, best.kernels) == pytest.approx(target, abs=1e-10)
    assert cd.tilted_target(data, cd.log_label(label), alpha, gamma) == pytest.approx(target, abs=1e-10)
    assert best.log_partition == pytest.approx(math.log(data @ label ** (gamma / alpha)), abs=1e-9)
    for kernel in best.kernels:
        assert kernel.sum(1) == pytest.approx(np.ones(5))


def test_equal_weights_give_bayes_posterior() -> None:
    best = cd.soft_control(INITIAL, KERNELS, REWARD, 0.7, 0.7)
    posterior = LINE.data() * LINE.label()
    assert kl(cd.run(best.initial, best.kernels), posterior / posterior.sum()) == pytest.approx(0.0, abs=1e-12)


def test_only_the_ratio_of_the_weights_matters() -> None:
    one, other = (cd.soft_control(INITIAL, KERNELS, REWARD, a, g) for a, g in ((0.5, 1.0), (2.0, 4.0)))
    assert one.initial == pytest.approx(other.initial)
    assert all(np.allclose(a, b) for a, b in zip(one.kernels, other.kernels, strict=True))


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (0.3, 2.0)])
def test_optimal_value_is_the_partition_and_no_other_policy_beats_it(alpha: float, gamma: float) -> None:
    data, noising, label = random_chain(4, 3, 7)
    base = cd.reverse_kernels(data, noising, 3)
    reward = cd.log_label(label)
    best = cd.soft_control(*base, reward, alpha, gamma)
    top = cd.objective((best.initial, best.kernels), base, reward, alpha, gamma)
    assert top == pytest.approx(alpha * best.log_partition)
    assert cd.objective(base, base, reward, alpha, gamma) == pytest.approx(gamma * data @ reward)
    rng = np.random.default_rng(0)
    for share in (0.01, 0.3):
        others = [(1 - share) * k + share * rng.dirichlet(np.ones(4), 4) for k in best.kernels]
        start = (1 - share) * best.initial + share * rng.dirichlet(np.ones(4))
        assert cd.objective((start, best.kernels), base, reward, alpha, gamma) < top
        assert cd.objective((best.initial, others), base, reward, alpha, gamma) < top


def test_kept_start_is_biased_and_a_long_chain_forgets_it() -> None:
    gaps = [cd.outcome(cd.Line(steps=steps), 1.0).kept_start_to_target for steps in (6, 12, 40, 160)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0.08 < gaps[1] < 0.3
    assert gaps[-1] < 1e-3


def test_figures_of_the_card() -> None:
    found = [cd.outcome(LINE, alpha) for alpha in (4.0, 2.0, 1.0, 0.5, 0.1, 0.02)]
    assert max(abs(one.kl_to_target) for one in found) < 1e-12
    assert all(one.kept_start_to_target > 0.03 for one in found)
    assert [one.kl_to_posterior < 1e-12 for one in found] == [False, False, True, False, False, False]
    entropies, rewards = [one.entropy for one in found], [one.reward for one in found]
    assert entropy(LINE.data()) > entropies[0]
    assert entropies == sorted(entropies, reverse=True)
    assert rewards == sorted(rewards)
    assert entropies[0] - entropies[-1] > 1.0
    assert rewards[-1] > -0.05


def test_two_tokens_are_a_chain_of_prefixes() -> None:
    """Rectangular kernels: first token, then one of nine prefixes; the tilted chain is pi_ref exp(r/beta)."""
    rng = np.random.default_rng(3)
    first, second, reward, beta = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3), rng.random(9), 0.2
    kernel = np.zeros((3, 9))
    for token in range(3):
        kernel[token, 3 * token : 3 * token + 3] = second[token]
    best = cd.soft_control(first, [kernel], reward, beta)
    assert cd.run(best.initial, best.kernels) == pytest.approx(soft_optimal(first @ kernel, reward, beta))


def test_forbidden_states_are_left_out() -> None:
    best = cd.soft_control(INITIAL, KERNELS, np.where(np.arange(21) < 10, -np.inf, 0.0))
    law = cd.run(best.initial, best.kernels)
    assert law[:10].max() == 0.0
    assert law[10:] == pytest.approx(LINE.data()[10:] / LINE.data()[10:].sum())
    start, kernel = [0.5, 0.5], np.eye(2)  # the first state has no allowed end: it is never entered
    best = cd.soft_control(start, [kernel], [-np.inf, 0.0])
    assert best.initial.tolist() == [0.0, 1.0]
    assert np.isfinite(best.kernels[0]).all()


def test_step_kl_and_the_weight_that_acts() -> None:
    mean, base, sigma = np.array([1.0, 2.0, 0.0, 0.0]), np.zeros(4), 2.0
    assert cd.gaussian_step_kl(mean, base, sigma) == pytest.approx(5 / 8)
    assert cd.gaussian_step_kl(mean, base, sigma, average=True) == pytest.approx(5 / 32)
    assert cd.gaussian_step_kl(mean, base, 0.0) == 0.0
    reward, w_kl, w_reward = 0.8, 0.01, 0.1
    released = w_reward * reward - w_kl * cd.gaussian_step_kl(mean, base, sigma, average=True)
    alpha = cd.released_alpha(w_kl, w_reward, 4)
    assert released == pytest.approx(w_reward * (reward - alpha * cd.gaussian_step_kl(mean, base, sigma)))


def test_guidance_is_the_best_shift_of_a_normal_step() -> None:
    """max over mu of E r - alpha KL with r linear of slope s: the shift is sigma^2 s / alpha."""
    sigma, slope, alpha = 0.7, 1.3, 0.5
    shifts = np.linspace(-1, 3, 4001)
    worth = [slope * m - alpha * cd.gaussian_step_kl([m], [0.0], sigma) for m in shifts]
    assert shifts[int(np.argmax(worth))] == pytest.approx(sigma**2 * slope / alpha, abs=2e-3)


def test_label_with_and_without_floor() -> None:
    assert cd.log_label([0.0, 1.0]).tolist() == [-math.inf, 0.0]
    assert cd.log_label([0.0], floor=1e-6)[0] == pytest.approx(math.log(1e-6))


EYE, HALF = np.eye(2), [0.5, 0.5]
REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "data": ("data", lambda: cd.forward_laws([0.5, 0.4], EYE, 2)),
    "noising": ("noising", lambda: cd.forward_laws(HALF, np.eye(3), 2)),
    "noising rows": ("noising", lambda: cd.forward_laws(HALF, 2 * EYE, 2)),
    "steps": ("steps", lambda: cd.forward_laws(HALF, EYE, 0)),
    "an unreachable state": ("noising", lambda: cd.reverse_kernels([1.0, 0.0], EYE, 2)),
    "initial": ("initial", lambda: cd.run([1.0, math.nan], [EYE])),
    "alpha": ("alpha", lambda: cd.soft_control(HALF, [EYE], [0.0, 0.0], 0.0)),
    "gamma": ("gamma", lambda: cd.soft_control(HALF, [EYE], [0.0, 0.0], 1.0, math.nan)),
    "sizes": ("kernels", lambda: cd.soft_control(HALF, [np.eye(3)], [0.0, 0.0, 0.0])),
    "reward size": ("kernels", lambda: cd.soft_control(HALF, [EYE], [0.0])),
    "reward nan": ("reward", lambda: cd.soft_control(HALF, [EYE], [0.0, math.nan])),
    "all forbidden": ("reward", lambda: cd.soft_control(HALF, [EYE], [-math.inf, -math.inf])),
    "probability": ("probability", lambda: cd.log_label([1.2])),
    "means": ("mean", lambda: cd.gaussian_step_kl([1.0], [1.0, 2.0], 1.0)),
    "sigma": ("sigma", lambda: cd.gaussian_step_kl([1.0], [1.0], -1.0)),
    "weights": ("w_kl", lambda: cd.released_alpha(0.0, 0.1, 4)),
    "reach": ("reach", lambda: cd.Line(reach=0).noising()),
    "width": ("width", lambda: cd.Line(width=0.0).data()),
    "slope": ("slope", lambda: cd.Line(slope=-1.0).label()),
    "kernels of a policy": ("policy", lambda: cd.objective((HALF, []), (HALF, [EYE]), [0.0, 0.0])),
    "a policy": ("policy", lambda: cd.objective((HALF, [2 * EYE]), (HALF, [EYE]), [0.0, 0.0])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    argument, call = REFUSED[name]
    with pytest.raises(UserError, match=rf"^{argument} (and \w+ )?must"):
        call()
