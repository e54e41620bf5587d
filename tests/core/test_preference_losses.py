"""Losses on pairs and grades: identities, gradients by finite differences, inert padding, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.preference_losses import (
    degree_loss,
    dpo_loss,
    implicit_reward,
    pool_hidden,
    sequence_logprob,
    spo_loss,
)
from rlvr_lab.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four(seed: int, n: int = 5) -> tuple[Tensor, ...]:
    return tuple(-5 * normal(4, n, seed=seed).abs())


@given(st.integers(0, 500), st.floats(0.01, 3.0))
def test_swapping_a_pair_changes_dpo_by_its_margin(seed: int, beta: float) -> None:
    w, losing, ref_w, ref_l = four(seed)
    margin = implicit_reward(w, ref_w, beta) - implicit_reward(losing, ref_l, beta)
    swapped = dpo_loss(losing, w, ref_l, ref_w, beta)
    torch.testing.assert_close(swapped - dpo_loss(w, losing, ref_w, ref_l, beta), margin)


@given(st.integers(0, 500))
def test_dpo_is_ln_2_at_the_reference_and_knows_no_constant_of_the_prompt(seed: int) -> None:
    w, losing, ref_w, ref_l = four(seed)
    torch.testing.assert_close(dpo_loss(w, losing, w, losing), torch.full_like(w, math.log(2)))
    moved = dpo_loss(w + 1.7, losing + 1.7, ref_w - 0.4, ref_l - 0.4)
    torch.testing.assert_close(moved, dpo_loss(w, losing, ref_w, ref_l))


def test_dpo_by_hand_and_without_overflow() -> None:
    one = dpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.5]), torch.tensor([-1.5]), beta=0.5)
    assert float(one) == pytest.approx(math.log(1 + math.exp(-0.5)))
    far = dpo_loss(torch.tensor([-1e5]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1)
    assert float(far) == pytest.approx(1e4)


def test_gradients_are_those_of_finite_differences_and_none_reaches_the_reference() -> None:
    w, losing, ref_w, ref_l = (t.clone().requires_grad_(True) for t in four(3))
    torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, ref_w.detach(), ref_l.detach(), 0.7), (w, losing))
    dpo_loss(w, losing, ref_w, ref_l, 0.7).sum().backward()
    assert ref_w.grad is None
    assert ref_l.grad is None
    torch.testing.assert_close(w.grad, -losing.grad)
    pooled, head, bias = (t.requires_grad_(True) for t in (normal(4, 3, 6), normal(3, 6, seed=1), normal(3, seed=2)))
    torch.autograd.gradcheck(degree_loss, (pooled, head, bias))


@given(st.integers(2, 7), st.integers(0, 500))
def test_degree_loss_is_ln_d_for_a_blank_head_and_no_less_for_equal_copies(degrees: int, seed: int) -> None:
    pooled, head = normal(4, degrees, 6, seed=seed), normal(degrees, 6, seed=seed + 1)
    blank = degree_loss(pooled, torch.zeros_like(head))
    torch.testing.assert_close(blank, torch.full_like(blank, math.log(degrees)))
    equal = pooled[:, :1].expand_as(pooled)
    assert bool((degree_loss(equal, head) >= math.log(degrees) - 1e-12).all())


def test_degree_loss_vanishes_where_a_head_tells_the_copies_apart_and_labels_are_positions() -> None:
    pooled = torch.eye(3, dtype=torch.float64)[None]
    assert float(degree_loss(pooled, 50 * torch.eye(3, dtype=torch.float64))) < 1e-12
    assert float(degree_loss(pooled.flip(1), 50 * torch.eye(3, dtype=torch.float64))) == pytest.approx(100 / 3)
    shifted = degree_loss(pooled, torch.eye(3).double(), torch.full((3,), 9.0).double())
    torch.testing.assert_close(shifted, degree_loss(pooled, torch.eye(3).double()))


@given(st.integers(0, 300), st.integers(1, 6))
def test_padding_is_inert(seed: int, length: int) -> None:
    hidden, logprob = normal(3, 6, 4, seed=seed), -normal(3, 6, seed=seed).abs()
    mask = torch.arange(6).expand(3, 6) < length
    spoiled = hidden.masked_fill(~mask[..., None], math.nan), logprob.masked_fill(~mask, -math.inf)
    torch.testing.assert_close(pool_hidden(spoiled[0], mask), hidden[:, :length].mean(1))
    torch.testing.assert_close(sequence_logprob(spoiled[1], mask), logprob[:, :length].sum(1))


def test_spo_adds_the_mean_over_graded_responses_only() -> None:
    pair, degree = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.5, math.nan, 1.5])
    graded = torch.tensor([True, False, True])
    assert float(spo_loss(pair, degree, graded, 0.1)) == pytest.approx(3.1)
    assert float(spo_loss(pair, degree, torch.zeros(3).bool(), 0.1)) == 3.0
    assert float(spo_loss(pair, degree, graded, 0.0)) == 3.0
    leaf = torch.tensor([0.5, 2.0, 1.5], requires_grad=True)
    spo_loss(pair, leaf, graded, 0.4).backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([0.2, 0.0, 0.2]))


ONE = torch.zeros(2)
REFUSED = {
    "beta": lambda: dpo_loss(ONE, ONE, ONE, ONE, beta=0.0),
    "beta must": lambda: implicit_reward(ONE, ONE, beta=math.nan),
    "reference": lambda: implicit_reward(ONE, torch.zeros(3)),
    "rejected": lambda: dpo_loss(ONE, torch.zeros(3), ONE, torch.zeros(3)),
    "mask must": lambda: sequence_logprob(torch.zeros(2, 3), torch.ones(2, 2).bool()),
    "boolean": lambda: sequence_logprob(torch.zeros(2, 3), torch.ones(2, 3)),
    "mask must be": lambda: pool_hidden(torch.zeros(2, 3, 4), torch.ones(2, 4).bool()),
    "without a token": lambda: pool_hidden(torch.zeros(2, 3, 4), torch.tensor([[True] * 3, [False] * 3])),
    "pooled": lambda: degree_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4)),
    "2 degrees": lambda: degree_loss(torch.zeros(2, 1, 4), torch.zeros(1, 4)),
    "gamma": lambda: spo_loss(ONE, ONE, ONE.bool(), -0.1),
    "graded": lambda: spo_loss(ONE, ONE, torch.zeros(3).bool(), 0.1),
    "empty": lambda: spo_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0).bool(), 0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
