"""Dichotomy of control: identities of the information, the threshold of beta, consistency, and the two signs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere.dichotomy_of_control import (
    best_energy,
    condition_on_best,
    conditional_information,
    contrastive_estimate,
    mean_gap,
    objective,
    outcome_entropy,
    posteriors,
    weights,
)
from rlvr_lab.elsewhere.dichotomy_of_control_demo import LuckSettings, bandit, learn, return_conditioned
from rlvr_lab.errors import UserError

seeds = st.integers(0, 1000)


def table(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed: int, a: int = 3, r: int = 2, z: int = 4) -> tuple[Tensor, Tensor]:
    joint = table(seed, a * r).softmax(0).view(a, r)
    return joint, table(seed + 1, a, r, z, scale=2.0).softmax(-1)


@given(seeds)
def test_information_is_the_card_s_sum_and_lies_between_zero_and_the_luck(seed: int) -> None:
    joint, encoder = case(seed)
    w = joint[..., None] * encoder
    ratio = w * w.sum((1, 2))[:, None, None] / (w.sum(1)[:, None] * w.sum(2)[..., None])
    found = float(conditional_information(w))
    assert found == pytest.approx(float((w * ratio.log()).sum()))
    assert -1e-12 <= found <= float(outcome_entropy(joint)) + 1e-12


def test_an_encoder_of_the_action_holds_no_luck_and_one_of_the_outcome_holds_all() -> None:
    joint, _ = case(0)
    blind = torch.eye(3, dtype=torch.float64)[:, None].expand(3, 2, 3)
    sees = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    assert float(conditional_information(weights(joint, blind))) == pytest.approx(0, abs=1e-12)
    assert float(conditional_information(weights(joint, sees))) == pytest.approx(float(outcome_entropy(joint)))


@given(seeds)
def test_the_critic_is_a_lower_bound_that_its_best_energy_attains(seed: int) -> None:
    joint, encoder = case(seed)
    top = contrastive_estimate(joint, encoder, best_energy(joint, encoder))
    mutual = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    torch.testing.assert_close(top, conditional_information(weights(joint, encoder)) + mutual)
    assert contrastive_estimate(joint, encoder, table(seed + 5, 3, 2, 4)) <= top + 1e-12
    shifted = best_energy(joint, encoder) + table(seed, 3, 1, 4)
    torch.testing.assert_close(contrastive_estimate(joint, encoder, shifted), top)


@given(seeds, st.floats(0.0, 4.0))
def test_the_loss_is_never_below_luck_plus_beta_minus_one_times_information(seed: int, beta: float) -> None:
    joint, encoder = case(seed)
    found = objective(joint, encoder, *posteriors(joint, encoder), beta)
    assert found.loss >= outcome_entropy(joint) + (beta - 1) * found.information - 1e-12
    other = objective(joint, encoder, table(seed, 4, 3).softmax(-1), table(seed, 4, 2).softmax(-1), beta)
    assert other.loss >= found.loss


@pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
def test_at_beta_one_knowing_everything_and_knowing_the_action_tie(beta: float) -> None:
    joint = bandit([0.1])[0]
    whole = torch.eye(4, dtype=torch.float64).view(2, 2, 4)
    action = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, 2)
    everything, skill = (objective(joint, q, *posteriors(joint, q), beta).loss for q in (whole, action))
    luck = outcome_entropy(joint)
    torch.testing.assert_close(everything, beta * luck)
    torch.testing.assert_close(skill, luck)


@given(seeds)
def test_the_mean_gap_is_bounded_by_the_root_of_half_the_information(seed: int) -> None:
    joint, encoder = case(seed)
    gap, bound = mean_gap(joint, encoder, torch.tensor([-1.0, 2.0], dtype=torch.float64))
    assert 0 < float(gap) <= float(bound)


def test_an_encoder_blind_to_luck_is_consistent() -> None:
    joint, _ = case(1)
    noisy = table(2, 3, 1, 4).softmax(-1).expand(3, 2, 4)
    outcomes = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(mean_gap(joint, noisy, outcomes)[0]) < 1e-12
    found = condition_on_best(joint, noisy, *posteriors(joint, noisy), outcomes)
    assert float(found.gap) == pytest.approx(0, abs=1e-12)


def test_negligible_latents_are_not_chosen() -> None:
    joint = bandit([0.2])[0]
    encoder = torch.tensor([1 - 1e-4, 1e-4], dtype=torch.float64).expand(2, 2, 2)
    policy, value = torch.full((2, 2), 0.5).double(), torch.tensor([[0.6, 0.4], [0.0, 1.0]]).double()
    found = condition_on_best(joint, encoder, policy, value, torch.tensor([0.0, 1.0]).double())
    assert int(found.latent) == 0
    assert float(found.promised) == pytest.approx(0.4)


def test_a_batch_is_its_rows_and_gradients_are_those_of_finite_differences() -> None:
    joint, encoder = (torch.stack(pair) for pair in zip(case(1), case(2), strict=True))
    policy, value = posteriors(joint, encoder)
    together = objective(joint, encoder, policy, value, torch.tensor([0.5, 2.0]).double()).loss
    for i, beta in enumerate((0.5, 2.0)):
        torch.testing.assert_close(together[i], objective(joint[i], encoder[i], policy[i], value[i], beta).loss)
    logits = [t[0].log().requires_grad_(True) for t in (encoder, policy, value)]
    torch.autograd.gradcheck(lambda q, p, v: objective(joint[0], *(t.softmax(-1) for t in (q, p, v)), 1.5).loss, logits)


def test_asking_for_a_payment_earns_a_half_whatever_the_luck() -> None:
    torch.testing.assert_close(return_conditioned(bandit([0.01, 0.1, 0.4])), torch.full((3,), 0.5).double())


def test_demonstration_promised_equals_achieved_only_where_the_encoder_lowers_the_information() -> None:
    small = LuckSettings(luck=(0.1, 0.3), betas=(0.0, 10.0), seeds=3, steps=700, learning_rate=0.05)
    found, released = learn(small), learn(LuckSettings(**{**vars(small), "betas": (10.0,), "sign": "released"}))
    best = torch.tensor([0.9, 0.7]).double()[:, None]
    luck = outcome_entropy(bandit(small.luck))[:, None]
    assert bool((found.information[:, 1] < 0.01).all())
    assert bool(((found.conditioned.promised[:, 1] - best).abs() < 0.03).all())
    assert bool(((found.conditioned.achieved[:, 1] - best).abs() < 0.03).all())
    assert bool((found.conditioned.promised[:, 0] > 0.97).all())
    # a latent that promises 1 may stand for any arm: the gap is p at least, where it happens to be the better one
    assert bool((found.conditioned.gap[:, 0] > torch.tensor([[0.07], [0.27]])).all())
    assert bool((found.conditioned.gap[:, 0].mean(1) > 0.3).all())
    assert bool((released.information[:, 0] > 0.97 * luck).all())
    assert bool((released.conditioned.promised[:, 0] > 0.97).all())


def test_the_same_settings_give_the_same_result() -> None:
    short = LuckSettings(seeds=2, steps=20)
    assert torch.equal(learn(short).information, learn(short).information)
    assert not torch.equal(learn(short).information, learn(LuckSettings(seeds=2, steps=20, seed=1)).information)


J, Q = case(0)
P, V = posteriors(J, Q)
OUT = torch.tensor([0.0, 1.0]).double()
REFUSED = {
    "joint must": lambda: weights(2 * J, Q),
    "joint needs": lambda: weights(J[0], Q),
    "encoder must": lambda: weights(J, -Q),
    "encoder must hold": lambda: weights(J, math.nan * Q),
    "same actions": lambda: weights(J[:, :1] * 0 + 1 / 3, Q),
    "w must": lambda: conditional_information(Q),
    "policy": lambda: objective(J, Q, P[:3], V, 1.0),
    "value": lambda: objective(J, Q, P, P, 1.0),
    "beta": lambda: objective(J, Q, P, V, -1.0),
    "beta must": lambda: objective(J, Q, P, V, math.nan),
    "energy": lambda: contrastive_estimate(J, Q, Q[:2]),
    "rho must have": lambda: contrastive_estimate(J, Q, Q, torch.ones(3).double() / 3),
    "rho must hold": lambda: contrastive_estimate(J, Q, Q, torch.ones(2).double()),
    "positive everywhere": lambda: best_energy(J, torch.eye(2).double().expand(3, 2, 2)),
    "outcomes": lambda: condition_on_best(J, Q, P, V, OUT[:1]),
    "action probability 0": lambda: mean_gap(torch.tensor([[0.0, 0.0], [0.5, 0.5]]).double(), Q[:2], OUT),
    "luck": lambda: bandit([0.0, 0.2]),
    "seeds": lambda: learn(LuckSettings(seeds=0)),
    "sign": lambda: learn(LuckSettings(sign="other", seeds=1, steps=1)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
