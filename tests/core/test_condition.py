"""Condition numbers: against singular values in float64, at the edges, in blocks; and what they are by chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core import condition
from rlvr_lab.core.condition import condition_number, extreme_singular_values, gaussian_median, live_shape


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values: Tensor, rows: int) -> Tensor:
    n = len(values)
    left, right = (torch.linalg.qr(gaussian(m, n, seed=m)).Q for m in (rows, n))
    return left * values @ right.T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_it_is_the_ratio_of_singular_values_and_knows_no_scale_and_no_side(m: int, n: int, seed: int, c: float) -> None:
    weight = gaussian(m, n, seed=seed)
    values = torch.linalg.svdvals(weight)
    expected = float(values[0] / values[-1])
    assert condition_number(weight, eps=0.0) == pytest.approx(expected, rel=1e-9)
    assert condition_number(c * weight.T, eps=0.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kappa", [3.0, 1e3, 1e5, 1e9])
def test_large_matrices_go_by_blocks_and_lose_nothing(kappa: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition, "BLOCK", 1 << 12)
    monkeypatch.setattr(condition, "DIRECT", 1 << 10)
    weight = with_spectrum(torch.logspace(0, -math.log10(kappa), 40, dtype=torch.float64), 700)
    assert len(condition._blocks(weight)) > 5
    for one in (weight, weight.T):
        assert condition_number(one, eps=0.0) == pytest.approx(kappa, rel=1e-5)


def test_the_gram_matrix_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_spectrum(torch.logspace(0, -9, 40, dtype=torch.float64), 700)
    high, low = condition._by_gram(weight)
    assert low == 0 or abs(high / low / 1e9 - 1) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_are_measured_as_they_are(dtype: torch.dtype) -> None:
    weight = gaussian(24, 16, dtype=dtype)
    assert condition_number(weight) == pytest.approx(condition_number(weight.double()), rel=1e-9)


def test_singular_matrices_are_infinite_and_not_a_huge_number() -> None:
    low_rank = gaussian(12, 3) @ gaussian(3, 8)
    assert condition_number(low_rank) == condition_number(low_rank.float()) == math.inf
    assert condition_number(low_rank, eps=0.0) > 1e12
    zero = torch.zeros(4, 3)
    assert condition_number(zero) == math.inf
    assert condition_number(zero, added=1e-8) == 0.0
    assert condition_number(torch.eye(5), added=0.5) == pytest.approx(1 / 1.5)


def test_vectors_written_as_matrices_have_kappa_one() -> None:
    assert condition_number(gaussian(1, 7)) == condition_number(gaussian(7, 1)) == 1.0


def test_entries_that_are_not_finite_have_no_condition_number() -> None:
    weight = gaussian(4, 4)
    for bad in (math.nan, math.inf):
        weight[1, 2] = bad
        assert math.isnan(condition_number(weight))
        assert math.isnan(condition_number(weight, added=1e-8))


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3)])
def test_what_is_no_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs a matrix with entries, not shape"):
        extreme_singular_values(weight)


def test_padding_by_zeros_is_no_shape() -> None:
    padded = torch.zeros(8, 6)
    padded[1:5, :4] = gaussian(4, 4)
    assert live_shape(padded) == (4, 4)
    assert live_shape(torch.zeros(3, 2)) == (0, 0)


# the card's own medians, of fewer draws: 218, 487, 5.3, 2.9
@pytest.mark.parametrize(("shape", "card"), [((64, 64), 218), ((128, 128), 487), ((64, 128), 5.3), ((64, 256), 2.9)])
def test_the_median_of_random_matrices_is_that_of_the_card(shape: tuple[int, int], card: float) -> None:
    assert gaussian_median(*shape) == pytest.approx(card, rel=0.12 if shape[0] == shape[1] else 0.02)


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (60, 12), (2, 2)])
def test_the_median_agrees_with_random_matrices_themselves(shape: tuple[int, int]) -> None:
    """Another way to the same law: singular values of drawn matrices. Sampling errors of both are below 5 %."""
    drawn = torch.linalg.svdvals(gaussian(4000, *shape))
    direct = float((drawn[:, 0] / drawn[:, -1]).median())
    assert gaussian_median(*shape, draws=4000, seed=1) == pytest.approx(direct, rel=0.1)


def test_the_median_of_a_long_matrix_is_the_edge_of_its_spectrum() -> None:
    a, b = 4096**0.5, 256**0.5
    assert gaussian_median(256, 4096) == pytest.approx((a + b) / (a - b), rel=0.02)
    assert gaussian_median(256, 4096) == gaussian_median(4096, 256)


def test_the_median_at_its_edges() -> None:
    assert gaussian_median(1, 50) == 1.0
    assert math.isnan(gaussian_median(0, 0))
    assert gaussian_median(16, 16, seed=1) != gaussian_median(16, 16, seed=2)
