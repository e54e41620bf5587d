"""What counts as reproduced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.testing.compare import compare, largest

NUMBERS = st.floats(-1e6, 1e6)

SAME = {
    "a tensor and a list": (torch.tensor([[1.0, 2.0]]), [[1.0, 2.0]]),
    "an array and a list": (np.array([1, 2]), [1, 2]),
    "a scalar tensor": (torch.tensor(0.5), 0.5),
    "a mask and zeros and ones": (torch.tensor([True, False]), [1, 0]),
    "a float and a recorded integer": (1.0 + 1e-9, 1),
    "an undefined value as nan": (float("nan"), None),
    "an undefined value as None": ([None], [None]),
    "nan spelled out": (float("nan"), "NaN"),
    "infinity spelled out": (math.inf, "inf"),
    "integer keys": ({1: 0.5}, {"1": 0.5}),
    "text that is left out": ({"x": 1.0}, {"x": 1.0, "label": ["easy", None]}),
    "the same text": ({"label": "easy"}, {"label": "easy"}),
    "more than was recorded": ({"x": 1.0, "y": 2.0}, {"x": 1.0}),
    "nothing in a list": ([], []),
}
DIFFERENT = {
    "a number": (1.0 + 2e-6, 1.0),
    "a large number": (1e4 + 0.02, 1e4),
    "a count": (3, 2),
    "a large count": (10_000_001, 10_000_000),
    "a truth": (True, False),
    "a number for a truth": (0.999999999, True),
    "a length": (torch.zeros(2), [0.0, 0.0, 0.0]),
    "a depth": (torch.zeros(2), [[0.0, 0.0]]),
    "a number for a list": (1.0, [1.0]),
    "a list for a number": ([1.0], 1.0),
    "a list for keys": ([1.0], {"x": 1.0}),
    "an undefined value": (0.0, None),
    "an undefined value that was defined": (float("nan"), 0.0),
    "an infinity": (-math.inf, math.inf),
    "nothing for infinity": (None, math.inf),
    "a missing number": ({}, {"x": 1.0}),
    "a missing null": ({}, {"x": None}),
    "a number among text": ({}, {"x": ["a", 1.0]}),
    "other text": ({"label": "hard"}, {"label": "easy"}),
    "text for a number": ("1.0", 1.0),
}


def problems(actual: Any, expected: Any, tolerance: float = 1e-6) -> list[str]:
    return [d.problem for d in compare(actual, expected, tolerance) if d.problem]


@pytest.mark.parametrize(("actual", "expected"), SAME.values(), ids=SAME)
def test_same(actual: Any, expected: Any) -> None:
    assert problems(actual, expected) == []


@pytest.mark.parametrize(("actual", "expected"), DIFFERENT.values(), ids=DIFFERENT)
def test_different(actual: Any, expected: Any) -> None:
    assert len(problems(actual, expected)) == 1


@given(NUMBERS, st.floats(-3e-6, 3e-6))
def test_tolerance_is_absolute_below_one_and_relative_above(recorded: float, off: float) -> None:
    actual = recorded + off * max(1.0, abs(recorded))
    error = abs(actual - recorded) / max(1.0, abs(recorded))
    assert bool(problems(actual, recorded)) == (error > 1e-6)
    assert largest(compare(actual, recorded, 1e-6)) == pytest.approx(error)


def test_a_difference_names_its_place() -> None:
    found = list(compare({"steps": [{"value": 1.0}, {"value": 2.0}]}, {"steps": [{"value": 1.0}] * 2}, 1e-6))
    (wrong,) = (d for d in found if d.problem)
    assert (wrong.path, wrong.key, wrong.error) == ("steps[1].value", "steps.value", 1.0)


def test_nothing_compared_has_no_error() -> None:
    assert largest(compare({}, {"note": "text"}, 1e-6)) is None
