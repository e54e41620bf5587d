"""maj@k against the enumeration of all subsets, and what ties and missing answers do."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.evaluate.majority import majority_at_k, votes_of


def by_enumeration(answers: list[str | None], correct: list[bool], k: int) -> float:
    right = {a for a, c in zip(answers, correct, strict=True) if c}
    total, subsets = Fraction(0), list(combinations(answers, k))
    for subset in subsets:
        votes = Counter(a for a in subset if a is not None)
        top = [a for a in votes if votes[a] == max(votes.values())]
        total += Fraction(sum(a in right for a in top), max(len(top), 1))
    return float(total / len(subsets))


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=9), st.sets(st.sampled_from("abcd")))
def test_every_k_is_the_mean_over_all_subsets(answers: list[str | None], right: set[str]) -> None:
    correct = [a in right for a in answers]
    ks = range(1, len(answers) + 1)
    expected = [by_enumeration(answers, correct, k) for k in ks]
    assert majority_at_k(len(answers), votes_of(answers, correct), list(ks)) == pytest.approx(expected, abs=1e-9)


def test_by_hand() -> None:
    # right, right, wrong: of the three pairs one is unanimous, two are ties
    assert majority_at_k(3, ((2, True), (1, False)), [1, 2, 3]) == pytest.approx([2 / 3, 1 / 3 + 2 / 3 / 2, 1])
    # wrong, wrong, right: more votes make it worse
    assert majority_at_k(3, ((2, False), (1, True)), [1, 2, 3]) == pytest.approx([1 / 3, 1 / 3, 0], abs=1e-12)


def test_no_answer_never_wins() -> None:
    assert votes_of([None, None, None, "a"], [False, False, False, True]) == ((1, True),)
    # one right answer among four samples: right wherever it is drawn, though "no answer" is more frequent
    assert majority_at_k(4, ((1, True),), [1, 2, 4]) == pytest.approx([1 / 4, 1 / 2, 1])
    assert majority_at_k(4, (), [1, 4]) == [0, 0]


def test_several_right_answers_are_classes_of_their_own() -> None:
    votes = votes_of(["a", "b", "c", "c"], [True, True, False, False])
    assert votes == ((2, False), (1, True), (1, True))
    assert majority_at_k(4, votes, [1, 4]) == pytest.approx([1 / 2, 0], abs=1e-12)


def test_many_samples_agree_with_few() -> None:
    """Beyond 512 samples each k has weights of its own; what two ways give must agree."""
    votes = ((300, True), (200, False), (12, True))
    shared, own = majority_at_k(512, votes, [1, 8, 64, 500]), majority_at_k(513, votes, [1, 8, 64, 500])
    assert own == pytest.approx(shared, abs=2e-3)
    assert majority_at_k(2000, ((1100, True), (900, False)), [1, 2000]) == pytest.approx([0.55, 1.0])


@pytest.mark.parametrize(("votes", "ks"), [(((3, True),), [1]), (((1, True),), [0]), (((1, True),), [3])])
def test_what_cannot_be_is_refused(votes: tuple[tuple[int, bool], ...], ks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"votes|maj@k"):
        majority_at_k(2, votes, ks)
