"""Comparisons at matched steps and matched accuracy, against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import contest_rows
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.arena import (
    all_at_accuracy,
    at_accuracy,
    between_curves,
    blocks,
    difference,
    early_stopped,
    held,
    matched,
    step_cost,
    token_cost,
)
from rlvr_lab.errors import UserError


def curve(*points: tuple[float, float | None]) -> list[dict[str, Any]]:
    return [{"step": i, "pass@1": a, "distinct_correct": d} for i, (a, d) in enumerate(points)]


FALLING = curve((0.2, 2.0), (0.4, 1.0), (0.3, 1.5), (0.6, 0.5))


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (0.2, 2.0),  # the start itself
        (0.1, 2.0),  # below it: no less trained policy is known
        (0.3, 1.5),  # half way along the first stretch
        (0.4, 1.0),  # at an evaluation
        (0.5, pytest.approx(1.5 - 2 / 3)),  # the way back to 0.3 does not count
        (0.6, 0.5),
        (0.61, None),
    ],
)
def test_a_curve_is_read_where_it_first_reaches_an_accuracy(accuracy: float, expected: Any) -> None:
    assert at_accuracy(FALLING, accuracy, "distinct_correct") == expected


def test_a_plateau_is_read_at_its_beginning() -> None:
    flat = curve((0.2, 2.0), (0.4, 1.5), (0.4, 1.0), (0.5, 0.5))
    assert at_accuracy(flat, 0.4, "distinct_correct") == 1.5
    assert at_accuracy(curve((0.4, 1.5), (0.4, 1.0)), 0.4, "distinct_correct") == 1.5
    assert at_accuracy([], 0.4, "distinct_correct") is None


def test_an_undefined_figure_is_not_a_missing_match() -> None:
    broken = curve((0.2, None), (0.4, 1.0))
    for accuracy in (0.2, 0.3):
        there = at_accuracy(broken, accuracy, "distinct_correct")
        assert there is not None
        assert math.isnan(there)
    assert at_accuracy(broken, 0.5, "distinct_correct") is None


def test_an_arm_is_matched_with_grpo_of_its_seed() -> None:
    found = matched(contest_rows.results(), "kl_cov", "distinct_correct")
    # grpo at 0.4 of seed 0: half way from 1.8 to 1.0; at 0.5 of seed 1: half way from 1.6 to 1.2; seed 2 ends at 0.4
    assert found.per_seed == (pytest.approx(0.5), pytest.approx(0.3), None)
    assert found.beyond == 1
    assert found.mean == pytest.approx(0.4)
    assert found.half == pytest.approx(12.706 * np.std([0.5, 0.3], ddof=1) / math.sqrt(2), rel=1e-3)
    assert found.leaves_curve is False


def test_leaving_the_curve_takes_an_interval_above_it() -> None:
    curves = {"grpo": contest_rows.CURVES["grpo"], "kl_cov": {s: [(0, 0.2, 2.0), (10, 0.3, 1.95)] for s in range(3)}}
    found = matched(contest_rows.results(curves), "kl_cov", "distinct_correct")
    assert found.per_seed == (pytest.approx(0.15), pytest.approx(0.05), pytest.approx(0.05))
    assert found.leaves_curve is False
    curves["kl_cov"] = {0: [(10, 0.3, 2.3)], 1: [(10, 0.4, 2.1)], 2: [(10, 0.3, 2.4)]}
    assert matched(contest_rows.results(curves), "kl_cov", "distinct_correct").leaves_curve is True
    curves["kl_cov"] = {0: [(10, 0.3, 1.3)], 1: [(10, 0.4, 1.1)], 2: [(10, 0.3, 1.4)]}
    assert matched(contest_rows.results(curves), "kl_cov", "distinct_correct").leaves_curve is False


def test_no_seed_or_one_gives_no_verdict() -> None:
    curves = {"grpo": {0: contest_rows.CURVES["grpo"][0]}, "kl_cov": {0: [(10, 0.4, 1.9)], 1: [(10, 0.4, 1.9)]}}
    found = matched(contest_rows.results(curves), "kl_cov", "distinct_correct")
    assert found.per_seed == (pytest.approx(0.5), None)  # grpo was not run with seed 1
    assert found.leaves_curve is None
    alone = matched(contest_rows.results(curves | {"kl_cov": {1: [(10, 0.4, 1.9)]}}), "kl_cov", "distinct_correct")
    assert math.isnan(alone.mean)
    assert alone.leaves_curve is None


@given(st.lists(st.tuples(st.floats(0.01, 0.9), st.floats(0.0, 3.0)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
def test_the_reference_lies_on_its_own_curve(points: list[tuple[float, float]]) -> None:
    rising = [(step, accuracy, distinct) for step, (accuracy, distinct) in enumerate(sorted(points))]
    found = matched(contest_rows.results({"grpo": {0: rising, 1: rising}}), "grpo", "distinct_correct")
    assert found.per_seed == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))


def test_a_method_minus_its_control_is_paired() -> None:
    found = contest_rows.results()
    assert difference(found, "kl_cov", "kl_cov_random", "distinct_correct") == pytest.approx(
        (0.1, 4.303 * 0.1 / math.sqrt(3)), rel=1e-3
    )
    both = difference(found, "kl_cov", "kl_cov", "distinct_correct")
    assert both == pytest.approx((0.0, 0.0))
    found.evaluations[-1]["distinct_correct"] = None
    assert math.isnan(difference(found, "kl_cov", "kl_cov_random", "distinct_correct")[0])
    with pytest.raises(UserError, match=r"no 'distinct'.*distinct_correct"):
        difference(found, "kl_cov", "kl_cov_random", "distinct")


def test_all_arms_at_one_accuracy_with_the_seeds_that_reach_it() -> None:
    table = all_at_accuracy(contest_rows.results(), 0.45, "distinct_correct")
    assert table["grpo"][2] == 2  # seed 2 ends at 0.4
    # steps 0 and 10 alone, as of the others: 0.45 lies 5/6 and 5/8 along the way
    assert table["grpo"][0] == pytest.approx((2.0 - 5 / 6 + 2.2 - 5 / 8) / 2)
    assert table["kl_cov_random"][2] == 0
    assert math.isnan(table["kl_cov_random"][0])


def test_curves_are_compared_where_both_get() -> None:
    found = between_curves(contest_rows.results(), "kl_cov", "distinct_correct")
    # straight lines from a common start: at the lower of both ends the distance is largest, and its mean is half of it
    ends = [1.9 - (2.0 - 2 / 3), 1.7 - (2.2 - 3 / 4), (2.1 - 0.3 * 2 / 3) - 1.4]
    assert found.per_seed == tuple(pytest.approx(end / 2) for end in ends)
    assert between_curves(contest_rows.results(), "grpo", "distinct_correct").per_seed == (0.0, 0.0, 0.0)
    still = {"grpo": contest_rows.CURVES["grpo"], "kl_cov": {0: [(0, 0.2, 2.0), (10, 0.2, 1.0)]}}
    assert between_curves(contest_rows.results(still), "kl_cov", "distinct_correct").per_seed == (None,)
    still["kl_cov"] = {7: [(0, 0.2, 2.0), (10, 0.3, 1.0)]}  # a seed that grpo does not have
    assert between_curves(contest_rows.results(still), "kl_cov", "distinct_correct").per_seed == (None,)


def test_a_run_that_ended_early_does_not_shorten_the_others() -> None:
    curves = {**contest_rows.CURVES, "siren": {0: [(0, 0.2, 2.0), (5, 0.3, 1.5)]}}
    before = all_at_accuracy(contest_rows.results(), 0.3, "distinct_correct")
    after = all_at_accuracy(contest_rows.results(curves), 0.3, "distinct_correct")
    assert after["kl_cov"] == before["kl_cov"]
    assert after["siren"][2] == 0  # only its step 0 is one that all have


def test_a_held_entropy_is_its_relative_deviation() -> None:
    mean, half = held(contest_rows.results(), "grpo", 0.1, last=2)
    assert mean == pytest.approx((0.2 - 0.085) / 0.1 - 1)  # steps 8 and 9
    assert half == pytest.approx(0.0, abs=1e-9)


def test_costs_are_relative_to_grpo_of_the_same_seed() -> None:
    found = contest_rows.results()
    assert step_cost(found, "grpo") == (1.0, 0.0)
    ratios = [(3 + 0.1 * seed) / (2 + 0.1 * seed) for seed in range(3)]
    assert step_cost(found, "kl_cov")[0] == pytest.approx(np.mean(ratios))
    for row in found.steps:
        if row["arm"] == "kl_cov":
            row["tokens"] *= 1.5
    assert token_cost(found, "kl_cov") == pytest.approx((1.5, 0.0))


def test_seconds_of_different_machines_are_not_compared() -> None:
    found = contest_rows.results()
    found.contest["machines"] = {f"{arm} seed {s}": {"processor": "p"} for arm in found.arms for s in range(3)}
    found.contest["machines"]["kl_cov seed 0"] = {"processor": "q"}
    ratios = [(3 + 0.1 * seed) / (2 + 0.1 * seed) for seed in (1, 2)]
    assert step_cost(found, "kl_cov")[0] == pytest.approx(np.mean(ratios))
    found.contest["machines"] |= {f"kl_cov seed {s}": {"processor": "q"} for s in range(3)}
    assert math.isnan(step_cost(found, "kl_cov")[0])
    assert token_cost(found, "kl_cov")[0] == pytest.approx(1.0)


def test_blocks_are_means_within_a_seed_before_the_interval() -> None:
    found = contest_rows.results()
    middle, mean, half = blocks(found, "grpo", "reward", 4)
    assert middle.tolist() == [1.5, 5.5]  # the two steps left over are no block
    assert mean == pytest.approx([0.115, 0.155])
    assert half == pytest.approx([4.303 * 0.1 / math.sqrt(3)] * 2, rel=1e-3)


def test_the_band_of_grpo_spans_what_all_its_seeds_reach() -> None:
    grid, mean, half = early_stopped(contest_rows.results(), "distinct_correct", points=3)
    assert grid == pytest.approx([0.2, 0.3, 0.4])  # seed 2 ends at 0.4
    assert mean == pytest.approx([2.1, (1.8 + 1.9 + 1.9) / 3, (1.4 + 1.6 + 1.4) / 3])
    assert np.isfinite(half).all()
    nothing = early_stopped(contest_rows.results({"grpo": {0: [(0, 0.5, 1.0)]}}), "distinct_correct")
    assert [len(part) for part in nothing] == [0, 0, 0]
