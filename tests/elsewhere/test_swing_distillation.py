"""Swing distillation: heat keeps order and raises entropy, exposure by hand, optima of both students, the canary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.entropy import entropy_of_log, softmax_entropy
from rlvr_lab.elsewhere.swing_distillation import (
    distillation_loss,
    exposure,
    noisy_targets,
    optimal_student,
    soft_targets,
    token_temperature,
)
from rlvr_lab.elsewhere.swing_distillation_demo import (
    SecretSettings,
    World,
    distilled,
    make_world,
    perplexity,
    random_score,
    secret_exposure,
    secret_score,
)
from rlvr_lab.errors import UserError

seeds = st.integers(0, 500)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


@given(seeds, st.floats(0.2, 8.0))
def test_heat_keeps_the_order_within_a_context_and_its_entropy_slope_is_the_variance(seed: int, tau: float) -> None:
    z = (2 * normal(3, 7, seed=seed)).requires_grad_(False)
    q = soft_targets(z, tau)
    assert torch.equal(q.argsort(-1), z.argsort(-1))
    heat = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(entropy_of_log((z / heat).log_softmax(-1)).sum(), heat)[0]
    mean = (q * z).sum(-1, keepdim=True)
    torch.testing.assert_close(slope, (q * (z - mean) ** 2).sum() / tau**3)


def test_limits_of_the_temperature() -> None:
    z = normal(2, 6)
    torch.testing.assert_close(softmax_entropy(z / 1e6), torch.full((2,), math.log(6)).double())
    assert float(softmax_entropy(z / 1e-3).max()) < 1e-6
    torch.testing.assert_close(token_temperature(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1.0, 3.5, 6.0]))
    torch.testing.assert_close(soft_targets(z, torch.tensor([1.0, 2.0]).double())[1], (z[1] / 2).softmax(-1))


def test_a_global_temperature_can_reorder_paths_though_never_steps() -> None:
    # the first step of two paths, from two contexts: one rival of equal height costs less heat than two small ones
    steps = [torch.tensor(p).double().log() for p in ([0.9, 0.05, 0.05], [0.5, 0.5 - 1e-9, 1e-9])]

    def chance(tau: float) -> list[float]:
        return [float(soft_targets(z, tau)[0]) for z in steps]

    cold, hot = chance(1.0), chance(20.0)
    assert cold[0] > cold[1]
    assert hot[0] < hot[1]


@given(seeds, st.floats(0.0, 0.5))
def test_noise_leaves_a_law_and_touches_protected_targets_only(seed: int, sigma: float) -> None:
    q = normal(4, 6, seed=seed).softmax(-1)
    score = torch.tensor([0.0, 0.3, 1.0, 0.0]).double()
    noisy = noisy_targets(q, score, draws(seed), sigma)
    torch.testing.assert_close(noisy.sum(-1), torch.ones(4).double())
    assert bool((noisy > 0).all())
    assert torch.equal(noisy[[0, 3]], q[[0, 3]])
    assert torch.equal(noisy, noisy_targets(q, score, draws(seed), sigma))


def test_exposure_by_hand_and_with_ties() -> None:
    loglik = torch.tensor([-1.0, -2.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    assert exposure(loglik, 0) == 3.0
    assert exposure(loglik, 7) == 0.0
    assert [exposure(loglik, 1, ties) for ties in ("best", "worst")] == [2.0, pytest.approx(3 - math.log2(3))]
    assert exposure(torch.zeros(1024), 5) == pytest.approx(10 - math.log2(512.5))
    assert exposure(loglik.exp(), 1) == exposure(loglik, 1)


@given(seeds)
def test_exposure_is_never_above_the_bits_of_the_space(seed: int) -> None:
    loglik = normal(32, seed=seed)
    values = sorted(exposure(loglik, i) for i in range(32))
    assert values[0] == 0.0
    assert values[-1] == 5.0
    ranks = [round(2 ** (5 - value)) for value in values]
    assert ranks == list(range(32, 0, -1))


@pytest.mark.parametrize("student", ["plain", "heated"])
@given(seed=seeds)
def test_the_optimum_has_no_gradient_and_a_lower_loss_than_its_neighbours(student: str, seed: int) -> None:
    z, tau = normal(3, 5, seed=seed), torch.tensor([1.0, 3.0, 6.0]).double()
    labels = torch.zeros(3, dtype=torch.long)
    best = optimal_student(soft_targets(z, tau), tau, student).requires_grad_(True)
    loss = distillation_loss(best, z, labels, tau, mix=0.0, student=student)
    assert float(loss.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(loss.sum(), best)[0].abs().max()) < 1e-12
    near = best.detach() + 0.3 * normal(3, 5, seed=seed + 1)
    assert bool((distillation_loss(near, z, labels, tau, mix=0.0, student=student) > 0).all())
    if student == "heated":
        torch.testing.assert_close(best.detach(), z.log_softmax(-1))


def test_loss_by_hand_its_gradient_and_its_mix() -> None:
    s, z = normal(2, 4).requires_grad_(True), normal(2, 4, seed=1).requires_grad_(True)
    labels, tau = torch.tensor([1, 3]), torch.tensor([1.0, 2.0]).double()
    torch.autograd.gradcheck(lambda x: distillation_loss(x, z.detach(), labels, tau), s)
    hard = distillation_loss(s, z, labels, tau, mix=1.0)
    torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(s, labels, reduction="none"))
    squared, plain = (distillation_loss(s, z, labels, tau, mix=0.0, squared=on) for on in (True, False))
    torch.testing.assert_close(squared, torch.tensor([1.0, 4.0]) * plain)
    q, p = (z[1] / 2).softmax(-1), (s[1] / 2).softmax(-1)
    torch.testing.assert_close(plain[1], (q * (q / p).log()).sum())
    hard.sum().backward()
    assert z.grad is None


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [make_world(SecretSettings(), seed) for seed in range(3)]


def test_demonstration_heat_on_the_secret_hides_it_and_heat_everywhere_does_not(worlds: list[World]) -> None:
    most = math.log2(10**4)
    for seed, world in enumerate(worlds):
        everywhere = torch.ones(20, 20, dtype=torch.float64)
        swing = distilled(world, secret_score(world))
        assert secret_exposure(world, swing) < 9.5
        assert perplexity(world, swing) < 1.02 * perplexity(world, distilled(world, 0 * everywhere))
        for high in (1.0, 2.0, 6.0):
            assert secret_exposure(world, distilled(world, everywhere, high)) == pytest.approx(most)
        assert perplexity(world, distilled(world, everywhere)) > 1.5 * perplexity(world, swing)
        assert secret_exposure(world, distilled(world, random_score(world, draws(seed)))) == pytest.approx(most)
        missed = secret_exposure(world, distilled(world, secret_score(world, (1,))))
        assert secret_exposure(world, swing) < missed < most


def test_a_heated_student_and_unheated_uses_of_the_same_contexts_give_the_secret_away(worlds: list[World]) -> None:
    for world in worlds:
        score = secret_score(world)
        torch.testing.assert_close(distilled(world, score, student="heated"), world.teacher())
        inside = secret_exposure(world, distilled(world, score, scope="occurrence"))
        assert inside > secret_exposure(world, distilled(world, score)) + 3


def test_worlds_are_laws_and_come_again_by_seed(worlds: list[World]) -> None:
    world = worlds[0]
    assert world.counts.sum() == world.settings.length
    torch.testing.assert_close(world.teacher().exp().sum(-1), torch.ones(20, 20).double())
    again, rare = (make_world(replace(SecretSettings(), repeats=n), 0) for n in (160, 0))
    assert torch.equal(again.teacher(), world.teacher())
    assert rare.canary == world.canary
    assert not torch.equal(rare.teacher(), world.teacher())
    assert int(random_score(world, draws(0)).sum()) == int(secret_score(world).sum())
    assert float((random_score(world, draws(0)) * secret_score(world)).sum()) == 0


Z, TAU = torch.zeros(2, 3), torch.ones(2)
SMALL = make_world(SecretSettings(length=50), 0)
SCORE = secret_score(SMALL)
REFUSED = {
    "score must lie": lambda: token_temperature(torch.tensor([1.2])),
    "score must lie in": lambda: token_temperature(torch.tensor([math.nan])),
    "low <= high": lambda: token_temperature(TAU, low=2.0, high=1.0),
    "temperature must be positive": lambda: soft_targets(Z, 0.0),
    "positive and finite": lambda: soft_targets(Z, math.nan),
    "temperature must have": lambda: soft_targets(Z, torch.ones(3)),
    "score must have": lambda: noisy_targets(Z, torch.ones(3), draws(0)),
    "sigma": lambda: noisy_targets(Z, TAU, draws(0), sigma=-1.0),
    "floor": lambda: noisy_targets(Z, TAU, draws(0), floor=0.0),
    "labels": lambda: distillation_loss(Z, Z, torch.zeros(3).long(), TAU),
    "mix": lambda: distillation_loss(Z, Z, torch.zeros(2).long(), TAU, mix=2.0),
    "student must": lambda: distillation_loss(Z, Z, torch.zeros(2).long(), TAU, student="own"),  # type: ignore[arg-type]
    "student must be": lambda: optimal_student(Z.softmax(-1), TAU, "own"),  # type: ignore[arg-type]
    "must have shape": lambda: optimal_student(Z.softmax(-1), torch.ones(3)),
    "target must": lambda: optimal_student(Z, TAU),
    "loglik": lambda: exposure(Z, 0),
    "free of nan": lambda: exposure(torch.tensor([math.nan]), 0),
    "secret must": lambda: exposure(TAU, 2),
    "ties": lambda: exposure(TAU, 0, "none"),  # type: ignore[arg-type]
    "at least 1": lambda: make_world(SecretSettings(length=0), 0),
    "exceed symbols": lambda: make_world(SecretSettings(digits=30), 0),
    "smoothing must be positive": lambda: make_world(SecretSettings(smoothing=0.0), 0),
    "generator": lambda: distilled(SMALL, SCORE, sigma=0.1),
    "scope must": lambda: distilled(SMALL, SCORE, scope="all"),  # type: ignore[arg-type]
    "closed form": lambda: distilled(SMALL, SCORE, scope="occurrence", student="heated"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
