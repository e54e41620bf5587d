from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.evaluate.passk import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    for k in range(1, n + 1):
        for c in range(n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, [c], k)[0] == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_grows_with_k_and_ends_at_one_or_zero(case: tuple[int, int]) -> None:
    n, c = case
    curve = [pass_at_k(n, [c], k)[0] for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(c / n)
    assert all(b >= a - 1e-12 for a, b in pairwise(curve))
    assert curve[-1] == (1.0 if c else 0.0)


def test_large_counts_do_not_overflow() -> None:
    values = pass_at_k(10_000, np.array([0, 1, 5000, 10_000]), 1000)
    assert values[0] == 0
    assert values[1] == pytest.approx(0.1)
    assert values[2] == pytest.approx(1)
    assert values[3] == 1


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, [1], 5, "pass@5 needs at least 5 samples per problem and k >= 1; there are 4"),
        (4, [1], 0, "pass@0 needs"),
        (4, [5], 1, "correct counts must lie in 0..4"),
        (4, [-1], 1, "correct counts must lie in 0..4"),
    ],
)
def test_impossible_counts_are_refused(n: int, c: list[int], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_no_problems_give_no_values() -> None:
    assert pass_at_k(4, [], 2).shape == (0,)
