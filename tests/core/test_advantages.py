from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import ragged_mask
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.advantages import (
    dead_groups,
    final_token_reward,
    group_advantage,
    opo_advantage,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo_advantage,
    token_returns,
    whiten,
)

GROUPS = st.lists(
    st.tuples(st.integers(0, 3), st.floats(-3, 3, width=32, allow_subnormal=False)), min_size=1, max_size=12
)


def test_a_group_of_one_has_advantage_zero_where_verl_returns_the_raw_reward() -> None:
    reward, group = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([5, 1, 1])
    for std in ("sample", "population", "none"):
        assert group_advantage(reward, group, std)[0] == 0
    verl = reward[0] / (1 + 1e-6)
    assert verl == pytest.approx(0.7, abs=1e-5)  # the convention that is not followed


def test_equal_rewards_give_exactly_zero() -> None:
    reward, group = torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long)
    assert torch.equal(group_advantage(reward, group), torch.zeros(4))


@given(GROUPS)
def test_advantages_sum_to_zero_in_every_group(rows: list[tuple[int, float]]) -> None:
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    for std in ("sample", "population", "none"):
        advantage = group_advantage(reward, group, std, eps=1e-2)
        assert torch.isfinite(advantage).all()
        for g in group.unique():
            assert float(advantage[group == g].sum()) == pytest.approx(0, abs=1e-3)


@given(GROUPS, st.randoms(use_true_random=False), st.integers(1, 1000))
def test_row_order_and_names_of_groups_are_inert(rows: list[tuple[int, float]], random: object, shift: int) -> None:
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    plain = group_advantage(reward, group, eps=1e-2)
    renamed = group_advantage(reward[order], (group[order] * 7 + shift), eps=1e-2)
    torch.testing.assert_close(renamed, plain[order], rtol=1e-4, atol=1e-5)


@given(GROUPS)
def test_dead_groups_are_those_of_one_reward(rows: list[tuple[int, float]]) -> None:
    rewards: dict[int, set[float]] = {}
    for g, r in rows:
        rewards.setdefault(g, set()).add(r)
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    assert dead_groups(reward, group).tolist() == [len(rewards[g]) == 1 for g, _ in rows]


def test_no_responses_give_no_advantages() -> None:
    empty = torch.empty(0)
    assert group_advantage(empty, empty.long()).shape == (0,)
    assert dead_groups(empty, empty.long()).shape == (0,)


D = torch.float64
LENGTHS = st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda lengths: sum(n > 0 for n in lengths) > 1)


def rewards(rows: list[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([r for _, r in rows], dtype=D), torch.tensor([g for g, _ in rows])


def random_values(mask: torch.Tensor, seed: int = 3) -> torch.Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_a_raw_singleton_keeps_its_reward_over_one_plus_eps() -> None:
    reward, group = torch.tensor([0.7, 1.0, 0.0], dtype=D), torch.tensor([5, 1, 1])
    assert float(group_advantage(reward, group, eps=0.5, singleton="raw")[0]) == pytest.approx(0.7 / 1.5)
    assert float(group_advantage(reward, group, "population", 0.5, "raw")[0]) == pytest.approx(0.7 / 1.5)
    assert float(group_advantage(reward, group, "none", singleton="raw")[0]) == 0.7
    # the convention is about groups of one only
    for std in ("sample", "population", "none"):
        raw, zero = (group_advantage(reward, group, std, singleton=s) for s in ("raw", "zero"))  # type: ignore[arg-type]
        assert torch.equal(raw[1:], zero[1:])


def test_standard_deviations_by_hand() -> None:
    reward, group = torch.tensor([1.0, 0, 0, 0, 4, 2], dtype=D), torch.tensor([0, 0, 0, 0, 1, 1])
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, 1, -1], dtype=D)
    deviation = {
        "none": torch.ones(6, dtype=D),
        "sample": torch.tensor([0.5] * 4 + [math.sqrt(2)] * 2, dtype=D),
        "population": torch.tensor([math.sqrt(3) / 4] * 4 + [1.0] * 2, dtype=D),
        "batch": torch.full((6,), math.sqrt((21 - 49 / 6) / 5), dtype=D),
    }
    for std, value in deviation.items():
        eps = 0.0 if std == "none" else 0.25
        torch.testing.assert_close(group_advantage(reward, group, std, eps=0.25), centred / (value + eps))  # type: ignore[arg-type]


@given(GROUPS)
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1(rows: list[tuple[int, float]]) -> None:
    reward, group = rewards(rows)
    rloo, centred = rloo_advantage(reward, group), group_advantage(reward, group, "none")
    for i, g in enumerate(group.tolist()):
        size = int((group == g).sum())
        others = [float(reward[j]) for j in range(len(group)) if group[j] == g and j != i]
        if size == 1:
            assert rloo[i] == reward[i]
            assert rloo_advantage(reward, group, "zero")[i] == 0
        else:
            assert float(rloo[i]) == pytest.approx(float(centred[i]) * size / (size - 1), abs=1e-12)
            assert float(rloo[i]) == pytest.approx(float(reward[i]) - sum(others) / (size - 1), abs=1e-12)


@given(GROUPS, st.integers(1, 9))
def test_opo_is_the_centred_reward_where_all_are_equally_long(rows: list[tuple[int, float]], length: int) -> None:
    reward, group = rewards(rows)
    lengths = torch.full((len(rows),), length)
    opo = opo_advantage(reward, lengths, group, singleton="zero")
    torch.testing.assert_close(opo, group_advantage(reward, group, "none"))


def test_opo_weighs_the_baseline_by_length() -> None:
    reward, group = torch.tensor([1.0, 0.0, 0.6], dtype=D), torch.tensor([0, 0, 3])
    lengths = torch.tensor([1, 3, 2])
    raw = torch.tensor([0.75, -0.25, 0.6], dtype=D)
    torch.testing.assert_close(opo_advantage(reward, lengths, group), raw)
    assert opo_advantage(reward, lengths, group, "zero")[2] == 0
    # nobody wrote a token: no baseline, and none needed
    assert torch.isfinite(opo_advantage(reward, torch.zeros(3, dtype=torch.long), group)).all()


def test_the_reward_sits_on_the_last_token() -> None:
    placed = final_token_reward(torch.tensor([2.0, 3.0, 5.0]), ragged_mask([3, 1, 0]))
    assert placed.tolist() == [[0, 0, 2], [3, 0, 0], [0, 0, 0]]
    hole = torch.tensor([[True, False, True, False]])
    assert final_token_reward(torch.tensor([7.0]), hole).tolist() == [[0, 0, 7, 0]]


@given(LENGTHS, st.floats(0, 1))
def test_returns_are_discounted_sums_to_the_end_of_the_response(lengths: list[int], gamma: float) -> None:
    mask = ragged_mask(lengths, 5)
    rho = random_values(mask)
    returns = token_returns(rho.masked_fill(~mask, 1e6), mask, gamma)  # what lies in the padding is not counted
    for i, n in enumerate(lengths):
        for t in range(5):
            expected = sum(gamma ** (s - t) * float(rho[i, s]) for s in range(t, n))
            assert float(returns[i, t]) == pytest.approx(expected, abs=1e-9)


def test_returns_of_nothing() -> None:
    assert token_returns(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("weigh", ["token", "response"])
@given(lengths=LENGTHS, garbage=st.sampled_from([math.nan, math.inf, 1e30]))
def test_whitened_values_have_mean_0_and_variance_1(weigh: Any, lengths: list[int], garbage: float) -> None:
    mask = ragged_mask(lengths, 5)
    values = random_values(mask)
    white = whiten(values.masked_fill(~mask, garbage), mask, eps=0.0, weigh=weigh)
    assert (white[~mask] == 0).all()
    rows, marked = mask.sum(1, keepdim=True), mask.to(D)
    share = marked / mask.sum() if weigh == "token" else marked / rows.clamp_min(1) / (rows > 0).sum()
    count = int(mask.sum() if weigh == "token" else (rows > 0).sum())
    assert float((share * white).sum()) == pytest.approx(0, abs=1e-9)
    assert float((share * white.square()).sum()) == pytest.approx((count - 1) / count, abs=1e-9)


def test_whitening_weighs_long_responses_more_unless_told_otherwise() -> None:
    mask = ragged_mask([3, 1])
    values = torch.tensor([[1.0, 1, 1], [0, 0, 0]], dtype=D)
    # mean 3/4, variance 1/4 over tokens; mean 1/2, variance 1/2 over responses
    by_token, by_response = whiten(values, mask, 0.0), whiten(values, mask, 0.0, "response")
    assert by_token[:, 0].tolist() == pytest.approx([0.5, -1.5])
    assert by_response[:, 0].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    # eps stands under the root
    assert float(whiten(values, mask, 0.75)[0, 0]) == pytest.approx(0.25)


def test_equal_values_whiten_to_zero() -> None:
    mask = ragged_mask([2, 3])
    assert whiten(torch.full((2, 3), 0.3, dtype=D), mask).abs().max() < 1e-10


@pytest.mark.parametrize("lengths", [[1, 0], [0, 0]])
def test_fewer_than_two_tokens_have_no_variance(lengths: list[int]) -> None:
    mask = ragged_mask(lengths, 2)
    with pytest.raises(ValueError, match="at least two marked tokens, not"):
        whiten(torch.ones(2, 2), mask)
    with pytest.raises(ValueError, match="at least two marked responses, not 1"):
        whiten(torch.ones(2, 2), ragged_mask([2, 0], 2), weigh="response")


def test_reinforce_plus_plus_by_hand() -> None:
    mask = ragged_mask([2, 1])
    advantage = reinforce_plus_plus(torch.tensor([[0.0, 1.0], [0.0, 5.0]], dtype=D), mask, gamma=0.5, eps=0.0)
    # returns 0.5, 1, 0: mean 0.5, unbiased variance 0.25
    torch.testing.assert_close(advantage, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D))


def test_the_baseline_variant_centres_first() -> None:
    mask = ragged_mask([2, 2, 1])
    reward, group = torch.tensor([1.0, 0.0, 3.0], dtype=D), torch.tensor([0, 0, 1])
    raw = reinforce_plus_plus_baseline(reward, group, mask)
    centred = torch.tensor([0.5, -0.5, 3.0], dtype=D)[:, None].expand(3, 2)
    torch.testing.assert_close(raw, whiten(centred, mask))
    zero = reinforce_plus_plus_baseline(reward, group, mask, singleton="zero")
    assert zero[2, 0] == 0
    assert raw[2, 0] > 1


@given(GROUPS, st.randoms(use_true_random=False))
def test_row_order_is_inert_for_every_estimator(rows: list[tuple[int, float]], random: Any) -> None:
    reward, group = rewards(rows)
    lengths = [(7 * i) % 4 + 1 for i in range(len(rows))]
    mask = ragged_mask(lengths, 4)
    order = list(range(len(rows)))
    random.shuffle(order)
    for f in (
        lambda r, g, m: group_advantage(r, g, "batch", 0.1),
        lambda r, g, m: group_advantage(r, g, "sample", 0.1, "raw"),
        lambda r, g, m: rloo_advantage(r, g),
        lambda r, g, m: opo_advantage(r, m.sum(1), g),
        lambda r, g, m: reinforce_plus_plus_baseline(r, g, m, 0.1) if m.sum() > 1 else r,
        lambda r, g, m: reinforce_plus_plus(final_token_reward(r, m), m, 0.9, 0.1) if m.sum() > 1 else r,
    ):
        plain = f(reward, group, mask)
        torch.testing.assert_close(f(reward[order], group[order], mask[order]), plain[order])
        assert plain.dtype == D


def test_no_responses_give_no_advantages_by_any_estimator() -> None:
    empty, group = torch.empty(0), torch.empty(0, dtype=torch.long)
    assert group_advantage(empty, group, "batch").shape == (0,)
    assert rloo_advantage(empty, group).shape == (0,)
    assert opo_advantage(empty, empty, group).shape == (0,)
