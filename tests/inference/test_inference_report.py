"""Reports of test-time methods: ratios of sums, paired intervals, and what is undefined."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.inference.report import Report, mean_interval, saving_interval


def report(**changes) -> Report:
    columns = {
        "problem": ["a", "b", "c"],
        "text": ["1", "2", "3"],
        "tokens": [10, 20, 30],
        "baseline_tokens": [20, 20, 60],
        "correct": [1.0, 0.0, 1.0],
        "baseline_correct": [1.0, 1.0, 0.0],
    }
    return Report("method", **(columns | changes))


def test_the_saving_is_a_ratio_of_sums() -> None:
    found = report().tokens_saved
    assert found.value == pytest.approx(0.4)  # not the mean of 0.5, 0, 0.5
    assert found.low <= found.value <= found.high


def test_tokens_beside_the_response_count_in_the_net_saving_only() -> None:
    found = report(extra_tokens=[20, 20, 20])
    assert found.tokens_saved.value == pytest.approx(0.4)
    assert found.tokens_saved_net.value == pytest.approx(-0.2)
    assert "-0.200" in str(found)
    assert "with these" not in str(report())


def test_a_change_is_paired_over_problems() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200).astype(float)
    better = np.clip(base + (rng.random(200) < 0.1), 0, 1)
    found = report(
        problem=["p"] * 200, text=["t"] * 200, tokens=[1] * 200, baseline_tokens=[1] * 200,
        correct=better, baseline_correct=base,
    )  # fmt: skip
    change = found.accuracy_change
    assert change.value == pytest.approx(found.accuracy.value - found.baseline_accuracy.value)
    assert change.excludes_zero is True
    # the intervals of the two accuracies overlap: only their pairing tells them apart
    assert found.accuracy.low < found.baseline_accuracy.high


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=20), st.integers(0, 5))
def test_the_interval_does_not_depend_on_what_is_scaled(rows, seed) -> None:
    used, base = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    one, ten = saving_interval(used, base, seed), saving_interval(10 * used, 10 * base, seed)
    assert one == pytest.approx(ten)
    assert saving_interval(base, base, seed) == pytest.approx((0.0, 0.0, 0.0))
    assert one.high <= 1


def test_the_interval_of_the_saving_covers_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        base = rng.exponential(10.0, 60)
        used = base * rng.uniform(0.2, 1.0, 60)  # 40 % are saved
        low, high = saving_interval(used, base, trial)[1:]
        hits += low <= 0.4 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_what_was_not_verified_is_undefined_and_never_zero() -> None:
    found = report(correct=None, baseline_correct=None)
    assert math.isnan(found.accuracy.value)
    assert found.accuracy_change.excludes_zero is None
    assert "undefined" in str(found)
    assert "correct" not in found.rows()[0]
    assert math.isnan(report(baseline_tokens=[0, 0, 0]).tokens_saved.value)
    assert math.isnan(mean_interval([]).value)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["accuracy"]["value"] is None
    assert plain["tokens_saved"]["value"] == pytest.approx(0.4)


def test_rows_carry_the_notes() -> None:
    found = report(notes={"strategy": ["easy", "hard", "hard"]})
    assert found.rows()[1] == {
        "problem": "b", "text": "2", "tokens": 20, "baseline_tokens": 20, "correct": 0.0, "baseline_correct": 1.0,
        "strategy": "hard",
    }  # fmt: skip


def test_bad_reports_name_the_column() -> None:
    with pytest.raises(UserError, match="column 'tokens' has 2 entries for 3 problems"):
        report(tokens=[1, 2])
    with pytest.raises(UserError, match="column 'strategy' has 1 entries"):
        report(notes={"strategy": ["easy"]})
    with pytest.raises(UserError, match="problems is empty"):
        Report("method", [], [], [], [])
    with pytest.raises(ValueError, match="2 figures against 3"):
        saving_interval([1, 2], [1, 2, 3])
