"""CPL in a small world: the soft optimum's identities, and which learner is right for which labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rlvr_lab.elsewhere import cpl
from rlvr_lab.errors import UserError

BASE = cpl.Settings(updates=300)
WORLD = cpl.random_world(BASE)
BEST = cpl.soft_optimum(WORLD, BASE.gamma, BASE.alpha)


def test_optimal_advantage_is_alpha_times_log_probability() -> None:
    assert torch.allclose(BEST.advantage, BASE.alpha * BEST.log_policy)
    assert torch.allclose((BEST.advantage / BASE.alpha).exp().sum(-1), torch.ones(12, dtype=torch.float64))
    q = WORLD.reward + BASE.gamma * WORLD.move @ BEST.value
    assert torch.allclose(q - BEST.value[:, None], BEST.advantage, atol=1e-9)


def test_no_other_policy_has_a_larger_soft_value() -> None:
    own = cpl.soft_value(WORLD, BEST.log_policy, BASE.gamma, BASE.alpha)
    assert torch.allclose(own, BEST.value, atol=1e-9)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 0.1, 1.0):
        noise = scale * torch.randn(12, 4, generator=generator, dtype=torch.float64)
        other = cpl.soft_value(WORLD, (BEST.log_policy + noise).log_softmax(-1), BASE.gamma, BASE.alpha)
        assert bool((other < BEST.value).all())


def test_the_advantage_is_a_reward_with_the_same_optimum() -> None:
    """Why fitted rewards are right for regret labels as well: A* is the reward, shaped by the value."""
    again = cpl.soft_optimum(cpl.World(WORLD.move, BEST.advantage), BASE.gamma, BASE.alpha)
    assert torch.allclose(again.log_policy, BEST.log_policy, atol=1e-9)
    assert torch.allclose(again.value, torch.zeros(12, dtype=torch.float64), atol=1e-9)


def test_entropy_of_the_optimum_falls_with_alpha() -> None:
    entropies = []
    for alpha in (4.0, 1.0, 0.25, 0.05):
        log_p = cpl.soft_optimum(WORLD, BASE.gamma, alpha).log_policy
        entropies.append(float(-(log_p.exp() * log_p).sum(-1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] < math.log(4)


def test_score_of_the_two_ends() -> None:
    even = torch.full((12, 4), -math.log(4), dtype=torch.float64)
    assert cpl.evaluate(WORLD, BEST.log_policy, BASE) == cpl.Score(pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    score = cpl.evaluate(WORLD, even, BASE)
    assert score.soft_return == pytest.approx(0.0, abs=1e-12)
    assert score.kl > 0.1


def test_labels_follow_their_model() -> None:
    pairs = cpl.preferences(WORLD, BASE, 20_000, "regret", torch.Generator().manual_seed(3))
    total = [BEST.advantage[s, a].sum(1) for s, a in zip(pairs.states, pairs.actions, strict=True)]
    chance = torch.sigmoid(BASE.slope * (total[1] - total[0]))
    for low in (0.1, 0.3, 0.5, 0.7):
        here = (chance > low) & (chance < low + 0.2)
        assert float(pairs.label[here].mean()) == pytest.approx(float(chance[here].mean()), abs=0.05)


def test_cpl_approaches_the_soft_optimum_with_regret_labels() -> None:
    few, many = (cpl.compare(BASE, n, "regret", ("cpl", "clone")) for n in (100, 2000))
    assert many["cpl"].kl < 0.06 < 0.2 < few["cpl"].kl
    assert many["cpl"].soft_return > 0.93
    assert many["clone"].kl > 0.3  # more pairs do not help
    assert abs(many["clone"].kl - few["clone"].kl) < 0.15


def test_bias_trades_a_plateau_for_few_pairs() -> None:
    few, many = (cpl.compare(BASE, n, "regret", ("cpl", "cpl_biased")) for n in (100, 2000))
    assert few["cpl_biased"].kl < few["cpl"].kl
    assert many["cpl_biased"].kl > 0.12 > 0.06 > many["cpl"].kl


def test_return_labels_turn_the_comparison_round() -> None:
    found = cpl.compare(BASE, 2000, "return", ("cpl", "rewards"))
    assert found["cpl"].kl > 0.08 > 0.05 > found["rewards"].kl


def test_same_seed_gives_the_same_result() -> None:
    quick = replace(BASE, updates=5)
    assert cpl.compare(quick, 50) == cpl.compare(quick, 50)
    assert cpl.compare(quick, 50) != cpl.compare(replace(quick, seed=1), 50)


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "states": ("states", lambda: cpl.Settings(states=0)),
    "alpha": ("alpha", lambda: cpl.Settings(alpha=0.0)),
    "slope": ("slope", lambda: cpl.Settings(slope=math.nan)),
    "gamma": ("gamma", lambda: cpl.Settings(gamma=1.0)),
    "alpha of the optimum": ("alpha", lambda: cpl.soft_optimum(WORLD, 0.9, -1.0)),
    "gamma of the optimum": ("gamma", lambda: cpl.soft_optimum(WORLD, 1.0, 1.0)),
    "rewards": ("reward", lambda: cpl.soft_optimum(cpl.World(WORLD.move, WORLD.reward * math.nan), 0.9, 1.0)),
    "a policy": ("log_policy", lambda: cpl.soft_value(WORLD, BEST.log_policy[:3], 0.9, 1.0)),
    "labels": ("labels", lambda: cpl.preferences(WORLD, BASE, 5, "taste", torch.Generator())),  # type: ignore[arg-type]
    "n": ("n", lambda: cpl.preferences(WORLD, BASE, 0, "regret", torch.Generator())),
    "learners": ("learners", lambda: cpl.compare(BASE, 5, "regret", ("magic",))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    argument, call = REFUSED[name]
    with pytest.raises(UserError, match=rf"^{argument} must"):
        call()
