"""Which groups carry a signal, and what a response's length costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.groups import informative_groups, overlong_reward

ROWS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12)


@given(ROWS)
def test_a_group_is_kept_where_some_but_not_all_are_right_or_where_it_has_one_response(
    rows: list[tuple[int, bool]],
) -> None:
    outcomes: dict[int, list[bool]] = {}
    for g, right in rows:
        outcomes.setdefault(g, []).append(right)
    keep = informative_groups(torch.tensor([r for _, r in rows]), torch.tensor([g for g, _ in rows]))
    expected = [0 < sum(outcomes[g]) < len(outcomes[g]) or len(outcomes[g]) == 1 for g, _ in rows]
    assert keep.tolist() == expected


def test_equal_values_whose_mean_rounds_are_no_signal() -> None:
    value = torch.full((3,), 0.1, dtype=torch.float64)
    assert float(((value - value.mean()) ** 2).mean()) > 0  # what a computed standard deviation would say
    assert not informative_groups(value, torch.zeros(3, dtype=torch.long)).any()


def test_an_undefined_metric_is_no_signal() -> None:
    metric = torch.tensor([math.nan, 1.0, 0.0, 1.0])
    assert informative_groups(metric, torch.tensor([0, 0, 1, 1])).tolist() == [False, False, True, True]


def test_no_responses_are_no_groups() -> None:
    assert informative_groups(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_the_punishment_by_hand() -> None:
    lengths = torch.tensor([0, 60, 61, 80, 100, 140])
    torch.testing.assert_close(
        overlong_reward(lengths, max_length=100, buffer=40), torch.tensor([0.0, 0, -0.025, -0.5, -1, -1])
    )
    no_floor = overlong_reward(lengths, max_length=100, buffer=40, factor=2.0, floor=False)
    torch.testing.assert_close(no_floor, torch.tensor([0.0, 0, -0.05, -1, -2, -4]))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(1, 100), st.floats(0, 3))
def test_the_floor_only_matters_beyond_the_limit(lengths: list[int], buffer: int, factor: float) -> None:
    length = torch.tensor(lengths, dtype=torch.float64)
    floored = overlong_reward(length, 100, buffer, factor, floor=True)
    free = overlong_reward(length, 100, buffer, factor, floor=False)
    assert floored.dtype == torch.float64
    assert (floored >= -factor).all()
    assert (floored <= 0).all()
    assert torch.equal(floored[length <= 100], free[length <= 100])
    assert (free <= floored).all()


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_outside_the_length_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer must lie in"):
        overlong_reward(torch.tensor([1]), 100, buffer)
