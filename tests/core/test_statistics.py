from __future__ import annotations

import math

import numpy as np
import pytest

from rlvr_lab.core.statistics import bootstrap_interval, seed_interval


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0.0, 1.0, 60), rng, draws=400)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_bootstrap_interval_has_the_width_of_the_standard_error() -> None:
    x = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(x, np.random.default_rng(2))
    assert low < x.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    narrow = bootstrap_interval(x, np.random.default_rng(2), level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_same_seed_gives_the_same_interval() -> None:
    x = [0.0, 1.0, 1.0, 0.25]
    first, second = (bootstrap_interval(x, np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_one_value_is_a_point_and_none_an_error() -> None:
    assert bootstrap_interval([0.4], np.random.default_rng(0)) == pytest.approx((0.4, 0.4))
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([], np.random.default_rng(0))


def test_seed_interval_is_students() -> None:
    mean, half = seed_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    mean, half = seed_interval(list(map(float, range(30))))
    assert half == pytest.approx(1.96 * np.std(range(30), ddof=1) / math.sqrt(30))


def test_the_spread_of_fewer_than_two_seeds_is_undefined() -> None:
    mean, half = seed_interval([3.0])
    assert mean == 3
    assert math.isnan(half)
    assert all(map(math.isnan, seed_interval([])))
