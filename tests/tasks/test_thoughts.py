"""Steps and their labels: cuts by markers, exact judgement of Countdown traces, controls that keep what they should."""

from __future__ import annotations

from itertools import groupby
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.thoughts import (
    Labelled,
    cut_steps,
    find_sequence,
    judge_countdown,
    noisy,
    operations,
    shuffled_runs,
)

BREAK, CLOSE = 90, (91, 92)


def spans(ids, separators=((BREAK,),), close=CLOSE, separates=lambda token: False):
    return cut_steps(ids, separators, close, separates)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, BREAK, 3, 91, 92, 4], [(0, 3), (3, 4), (4, 7)]),
        ([1, BREAK, BREAK, 2], [(0, 3), (3, 4)]),  # two separators belong to one step
        ([1, 2, 3], [(0, 3)]),  # no marker at all
        ([91, 92, 5], [(0, 3)]),  # no thinking
        ([1, 91, 92, 2, 91, 92, 3], [(0, 1), (1, 7)]),  # several closings: the first ends the thinking
        ([1, BREAK, 91, 92, 4], [(0, 2), (2, 5)]),
        ([1, 91, 4], [(0, 3)]),  # half a closing is none
        ([], []),
    ],
)
def test_steps_end_with_their_separators(ids, expected):
    assert spans(ids) == expected


def test_a_separator_may_be_several_tokens_or_part_of_one():
    assert spans([1, 7, 8, 2, 7, 3], separators=((7, 8),)) == [(0, 3), (3, 6)]
    assert spans([1, 55, 2], separators=(), separates=lambda token: token == 55) == [(0, 2), (2, 3)]
    assert find_sequence([1, 2, 1, 2, 3], (1, 2, 3)) == 2
    assert find_sequence([1], ()) == -1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, BREAK, 91, 92]), max_size=30))
def test_spans_cover_every_token_once(ids):
    found = spans(ids)
    assert [i for a, b in found for i in range(a, b)] == list(range(len(ids)))


def test_operations_of_an_expression():
    assert operations("( 10 + 1 ) * 4") == {(1, "+", 10), (4, "*", 11)}
    assert operations("8 - ( 9 / 3 )") == {(9, "/", 3), (8, "-", 3)}
    assert operations("7") == set()
    assert operations("( 10 + ") is None


def labels(text, correct):
    words = text.split()
    found = judge_countdown(words, correct)
    assert sum(b - a for a, b in found.spans) == len(words)
    return "".join(map(str, found.per_token()[0])), found.judged


def test_an_attempt_that_was_undone_is_incorrect_in_a_right_response():
    text = "8 + 4 = 12 12 - 1 = 11 no 8 * 4 = 32 yes </think> 8 * 4 <eos>"
    assert labels(text, True) == ("0000000000" + "1" + "11111" + "1" + "11111", True)


def test_the_last_attempt_is_not_undone_whatever_its_verdict():
    assert labels("8 * 4 = 32 no </think> 8 * 4 <eos>", True) == ("1" * 11, True)


def test_a_slip_of_arithmetic_is_incorrect():
    assert labels("8 + 4 = 13 12 * 2 = 24 yes </think> ( 8 + 4 ) * 2 <eos>", True)[0] == "00000" + "1" * 15


def test_a_wrong_response_is_blamed_for_what_its_answer_used():
    text = "8 + 4 = 12 no 4 * 8 = 32 32 - 1 = 31 no </think> ( 8 * 4 ) - 1 <eos>"
    assert labels(text, False) == ("11111" + "1" + "0" * 10 + "0" + "0" * 9, True)


@pytest.mark.parametrize("text", ["8 + 4 = 12 no", "8 + 4 = 12 yes </think> 8 + <eos>", "", "</think> 3 <eos>"])
def test_what_cannot_be_matched_has_the_label_of_its_answer(text):
    for correct in (False, True):
        found = judge_countdown(text.split(), correct)
        if not correct or "=" not in text:
            assert not found.judged
            assert set(found.labels) <= {int(correct)}


WORDS = ["3", "4", "7", "+", "-", "/", "=", "yes", "no", "</think>", "(", "<eos>", "<unk>"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=30), st.booleans())
def test_any_words_are_judged(words, correct):
    found = judge_countdown(words, correct)
    assert [i for a, b in found.spans for i in range(a, b)] == list(range(len(words)))
    assert len(found.labels) == len(found.spans)
    if "</think>" in words:
        assert found.labels[-1] == int(correct)


def test_the_labels_of_true_traces_are_those_of_their_attempts():
    import numpy as np

    seen = 0
    for tokens in countdown.traces(60, countdown.RETRIES, np.random.default_rng(0)):
        words = [countdown.VOCABULARY[i] for i in tokens[countdown.PROMPT_TOKENS :]]
        if "yes" not in words:
            continue
        per_token = judge_countdown(words, True).per_token()[0]
        retries = words.count("no")
        seen += retries
        assert words[len(per_token) - 1] == "<eos>"
        runs = [(label, len(list(run))) for label, run in groupby(per_token)]
        assert sum(label == 0 for label, _ in runs) == retries
        # the `no` of each attempt stands alone, the last one before the attempt that solved it
        assert [n for label, n in runs if label == 1][:-1] == [1] * max(retries - 1, 0)
    assert seen > 20


LABELS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def labelled(values):
    return Labelled(tuple((i, i + 1) for i in range(len(values))), tuple(values))


@settings(max_examples=80, deadline=None)
@given(LABELS, st.integers(0, 1000))
def test_shuffled_runs_keep_their_lengths_and_the_answer(values, seed):
    found = shuffled_runs(labelled(values), 0.5, Random(seed))
    lengths = lambda row: sorted(len(list(run)) for _, run in groupby(row[:-1]))  # noqa: E731
    assert lengths(found.labels) == lengths(values)
    assert found.labels[-1] == values[-1]


def test_a_noisy_judge_is_right_as_often_as_asked():
    values = [0, 1] * 2000
    found = noisy(labelled(values), 0.7, Random(0))
    share = sum(a == b for a, b in zip(values[:-1], found.labels[:-1], strict=True)) / (len(values) - 1)
    assert share == pytest.approx(0.7, abs=0.03)
    assert noisy(labelled(values), 1.0, Random(0)).labels == tuple(values)
    assert noisy(labelled([0, 0, 1]), 0.0, Random(0)).labels == (1, 1, 1)
