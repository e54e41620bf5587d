"""The CPL loss: symmetries, limits, gradients, its relation to DPO and to a group of rated responses; refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core import cpl
from rlvr_lab.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, T = 6, 5
L1, L2 = -normal(B, T).abs(), -normal(B, T, seed=1).abs()
LABEL = torch.tensor([0, 1, 1, 0, 0.5, 1], dtype=torch.float64)


@given(seed=st.integers(0, 10_000), bias=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_exchanging_the_segments_exchanges_the_label(seed: int, bias: float) -> None:
    u1, u2, y = normal(B, seed=seed), normal(B, seed=seed + 1), torch.rand(B, dtype=torch.float64)
    assert torch.allclose(cpl.pair_loss(u1, u2, y, bias), cpl.pair_loss(u2, u1, 1 - y, bias))


def test_loss_by_hand() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(cpl.cpl_loss(one * 2, one * 3, one, 0.5)) == pytest.approx(math.log1p(math.exp(-2.0)))
    assert float(cpl.cpl_loss(one * 2, one * 3, one * 0, 0.5)) == pytest.approx(math.log1p(math.exp(-0.5)))
    assert float(cpl.cpl_loss(one, one, one)) == pytest.approx(math.log(2))


def test_gradient_is_the_formula() -> None:
    u1, u2 = normal(B).requires_grad_(), normal(B, seed=1).requires_grad_()
    y, bias = torch.ones(B, dtype=torch.float64), 0.6
    g1, g2 = torch.autograd.grad(cpl.cpl_loss(u1, u2, y, bias), (u1, u2))
    push = torch.sigmoid(-(u2 - bias * u1)) / B
    assert torch.allclose(g2, -push)
    assert torch.allclose(g1, bias * push)


def test_gradient_of_log_probabilities_is_a_finite_difference() -> None:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        return cpl.labelled_loss(first, second, LABEL, cpl.CPLConfig(0.7, 0.5, gamma=0.9))

    assert torch.autograd.gradcheck(loss, (L1.clone().requires_grad_(), L2.clone().requires_grad_()))


@given(shift=st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_only_without_bias_a_common_shift_is_free(shift: float) -> None:
    u1, u2 = normal(B), normal(B, seed=1)
    free = cpl.pair_loss(u1 + shift, u2 + shift, LABEL)
    assert torch.allclose(free, cpl.pair_loss(u1, u2, LABEL))
    certain = torch.ones(B, dtype=torch.float64)
    up = cpl.cpl_loss(u1 + 1.0 + abs(shift), u2 + 1.0 + abs(shift), certain, 0.5)
    assert up < cpl.cpl_loss(u1, u2, certain, 0.5)  # lambda < 1 rewards probability itself


def test_extreme_scores_stay_finite() -> None:
    big = torch.tensor([800.0, -800.0], dtype=torch.float32)
    loss = cpl.pair_loss(big, -big, torch.ones(2))
    assert torch.equal(loss, torch.tensor([1600.0, 0.0]))


def test_one_step_with_reference_is_dpo() -> None:
    ref1, ref2, beta = -normal(B, 1, seed=2).abs(), -normal(B, 1, seed=3).abs(), 0.3
    a, b = L1[:, :1], L2[:, :1]
    found = cpl.labelled_loss(
        a, b, torch.ones(B, dtype=torch.float64), cpl.CPLConfig(beta, 1.0, reference=True), ref1, ref2
    )
    margin = beta * ((b - ref2) - (a - ref1))
    assert float(found) == pytest.approx(float(-torch.sigmoid(margin).log().mean()))


def test_score_sums_with_discount_from_the_first_step() -> None:
    assert torch.allclose(cpl.segment_score(L1, 0.2), 0.2 * L1.sum(1))
    weights = torch.tensor([0.5**t for t in range(1, T + 1)], dtype=torch.float64)
    assert torch.allclose(cpl.segment_score(L1, 2.0, 0.5), 2.0 * (L1 * weights).sum(1))


@pytest.mark.parametrize("filler", [0.0, 1e9, math.nan, -math.inf])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_padding_is_inert(filler: float, gamma: float) -> None:
    mask = torch.ones(B, T + 3, dtype=torch.bool)
    mask[:, :2], mask[:, -1] = False, False  # padding on both sides
    padded = torch.full((B, T + 3), filler, dtype=torch.float64)
    padded[:, 2:-1] = L1
    assert torch.allclose(cpl.segment_score(padded, 0.3, gamma, None, mask), cpl.segment_score(L1, 0.3, gamma))
    with_reference = cpl.segment_score(padded, 0.3, gamma, padded, mask)
    assert torch.equal(with_reference, torch.zeros(B, dtype=torch.float64))


def test_padding_gets_no_gradient() -> None:
    x = L1.clone().requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, -1] = False
    (g,) = torch.autograd.grad(cpl.segment_score(x, 0.3, 1.0, None, mask).sum(), x)
    assert torch.equal(g[:, -1], torch.zeros(B, dtype=torch.float64))
    assert torch.allclose(g[:, :-1], torch.full((B, T - 1), 0.3, dtype=torch.float64))


def test_reference_counts_only_where_the_config_says_so() -> None:
    plain, relative = cpl.CPLConfig(), cpl.CPLConfig(reference=True)
    assert cpl.labelled_loss(L1, L2, LABEL, plain, L1, L2) == cpl.labelled_loss(L1, L2, LABEL, plain)
    assert float(cpl.labelled_loss(L1, L2, LABEL, relative, L1, L2)) == pytest.approx(math.log(2))


def test_rank_loss_is_the_mean_over_pairs() -> None:
    u, rating = normal(5), normal(5, seed=4)
    by_hand = [
        cpl.pair_loss(u[i : i + 1], u[j : j + 1], torch.ones(1, dtype=torch.float64), 0.5)
        for i in range(5)
        for j in range(5)
        if rating[i] < rating[j]
    ]
    assert len(by_hand) == 10
    assert float(cpl.rank_loss(u, rating, 0.5)) == pytest.approx(float(torch.cat(by_hand).mean()))
    order = torch.tensor([3, 1, 4, 0, 2])
    assert float(cpl.rank_loss(u[order], rating[order], 0.5)) == pytest.approx(float(cpl.rank_loss(u, rating, 0.5)))
    assert float(cpl.rank_accuracy(rating, rating)) == 1.0
    assert float(cpl.rank_accuracy(-rating, rating)) == 0.0


def test_equal_ratings_make_no_pair_unless_asked_to() -> None:
    rating = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    worse, better = cpl.rated_pairs(rating)
    assert sorted(zip(worse.tolist(), better.tolist(), strict=True)) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert len(cpl.rated_pairs(rating, ties="as_sorted")[0]) == 6


def test_groups_are_kept_apart() -> None:
    rating = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    group = torch.tensor([7, 7, 2, 2, 5, 5])
    worse, better = cpl.rated_pairs(rating, group)
    assert sorted(zip(worse.tolist(), better.tolist(), strict=True)) == [(0, 1), (2, 3)]
    u = normal(6)
    both = [cpl.rank_loss(u[s], rating[s], 0.5) for s in (slice(0, 2), slice(2, 4))]
    assert float(cpl.rank_loss(u, rating, 0.5, group)) == pytest.approx(float(sum(both)) / 2)


def test_rated_responses_move_towards_the_correct_ones() -> None:
    """A verifier's rewards: the gradient raises every token of a correct response and lowers those of a wrong one."""
    x, reward = L1.clone().requires_grad_(), torch.tensor([0.0, 1, 0, 0, 1, 0], dtype=torch.float64)
    (g,) = torch.autograd.grad(cpl.rated_loss(x, reward, cpl.CPLConfig(0.1, 1.0)), x)
    assert bool((g[reward == 1] < 0).all())
    assert bool((g[reward == 0] > 0).all())
    assert float(g.sum()) == pytest.approx(0.0, abs=1e-12)  # without bias what one side gains, the other loses
    (g,) = torch.autograd.grad(cpl.rated_loss(x, reward, cpl.CPLConfig(0.1, 0.5)), x)
    assert float(g.sum()) < 0


def test_rated_loss_uses_its_reference_and_its_mask() -> None:
    reward, config = torch.tensor([0.0, 1, 0, 0, 1, 0], dtype=torch.float64), cpl.CPLConfig(0.2, 0.75, reference=True)
    mask = torch.ones(B, T, dtype=torch.bool)
    assert float(cpl.rated_loss(L1, reward, config, L1, mask)) == pytest.approx(math.log(2))
    mask[1, 2:] = False
    assert cpl.rated_loss(L1, reward, config, L2, mask) != cpl.rated_loss(L1, reward, config, L2)


def test_released_average_leaves_out_exact_zeros() -> None:
    u, rating = torch.tensor([-900.0, 0.0, 900.0]), torch.tensor([0.0, 2.0, 1.0])
    assert float(cpl.rank_loss(u, rating)) == pytest.approx(300.0)
    assert float(cpl.rank_loss(u, rating, drop_zero=True)) == pytest.approx(900.0)
    assert float(cpl.rank_loss(u, torch.tensor([0.0, 1.0, 2.0]), drop_zero=True)) == 0.0


def test_accuracy_counts_ties_as_the_release_does() -> None:
    u1, u2 = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert float(cpl.pair_accuracy(u1, u2, torch.tensor([1.0, 0.0, 0.5, 0.5]))) == 0.75


def test_cloning_takes_all_or_the_preferred() -> None:
    assert float(cpl.cloning_loss(L1, L2)) == pytest.approx(float(-(L1.mean() + L2.mean()) / 2))
    kept = torch.cat([L1[[0, 3, 4]], L2[[1, 2, 4, 5]]])
    assert float(cpl.cloning_loss(L1, L2, LABEL, "preferred")) == pytest.approx(float(-kept.mean()))


def test_gaussian_head_of_the_release_has_twice_the_slope() -> None:
    mean, action = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    exact = torch.distributions.Normal(mean, 1.0).log_prob(action).sum(-1)
    assert torch.allclose(cpl.gaussian_logprob(mean, action, released=False), exact)
    (released,) = torch.autograd.grad(cpl.gaussian_logprob(mean, action).sum(), mean, retain_graph=True)
    (own,) = torch.autograd.grad(exact.sum(), mean)
    assert torch.allclose(released, 2 * own)


def test_presets_differ_from_the_paper() -> None:
    losses = {name: float(cpl.labelled_loss(L1, L2, LABEL, preset, L2, L1)) for name, preset in cpl.PRESETS.items()}
    assert len({round(value, 6) for value in losses.values()}) == 4


ONES, CONFIG = torch.ones(3, dtype=torch.float64), cpl.CPLConfig()
MATRIX = torch.zeros(3, 2, dtype=torch.float64)
REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "alpha of a config": ("alpha", lambda: cpl.CPLConfig(alpha=0.0)),
    "alpha without bound": ("alpha", lambda: cpl.CPLConfig(alpha=math.inf)),
    "bias above one": ("bias", lambda: replace(CONFIG, bias=1.5)),
    "gamma nan": ("gamma", lambda: replace(CONFIG, gamma=math.nan)),
    "alpha of a score": ("alpha", lambda: cpl.segment_score(MATRIX, -1.0)),
    "gamma of a score": ("gamma", lambda: cpl.segment_score(MATRIX, 1.0, 0.0)),
    "a vector": ("logprob", lambda: cpl.segment_score(ONES, 1.0)),
    "nan": ("logprob", lambda: cpl.segment_score(MATRIX * math.nan, 1.0)),
    "no row": ("logprob", lambda: cpl.segment_score(MATRIX[:0], 1.0)),
    "a mask of floats": ("mask", lambda: cpl.segment_score(MATRIX, 1.0, 1.0, None, MATRIX)),
    "another reference": ("reference", lambda: cpl.segment_score(MATRIX, 1.0, 1.0, MATRIX[:2])),
    "bias zero": ("bias", lambda: cpl.pair_loss(ONES, ONES, ONES, 0.0)),
    "scores of two sizes": ("score_2", lambda: cpl.pair_loss(ONES, ONES[:2], ONES)),
    "an infinite score": ("score_1", lambda: cpl.pair_loss(ONES * math.inf, ONES, ONES)),
    "labels of another size": ("label", lambda: cpl.pair_loss(ONES, ONES, ONES[:2])),
    "a label of two": ("label", lambda: cpl.pair_loss(ONES, ONES, 2 * ONES)),
    "a label in the accuracy": ("label", lambda: cpl.pair_accuracy(ONES, ONES, ONES[:1])),
    "equal ratings": ("rating", lambda: cpl.rated_pairs(ONES)),
    "nan ratings": ("rating", lambda: cpl.rated_pairs(ONES * math.nan)),
    "ties": ("ties", lambda: cpl.rated_pairs(ONES, ties="random")),  # type: ignore[arg-type]
    "groups": ("group_id", lambda: cpl.rated_pairs(ONES, ONES[:2])),
    "scores and ratings": ("score", lambda: cpl.rank_loss(ONES[:2], ONES)),
    "cloned data": ("data", lambda: cpl.cloning_loss(MATRIX, MATRIX, ONES, "some")),  # type: ignore[arg-type]
    "cloned labels": ("label", lambda: cpl.cloning_loss(MATRIX, MATRIX, None, "preferred")),
    "a missing reference": ("reference", lambda: cpl.labelled_loss(MATRIX, MATRIX, ONES, cpl.PRESETS["released_kl"])),
    "a missing reference of ratings": ("reference", lambda: cpl.rated_loss(MATRIX, ONES, cpl.PRESETS["released_kl"])),
    "actions": ("action", lambda: cpl.gaussian_logprob(MATRIX, MATRIX[:2])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    argument, call = REFUSED[name]
    with pytest.raises(UserError, match=rf"^{argument} must"):
        call()
