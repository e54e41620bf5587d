from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import ragged_mask
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.reduce import OVER_CONSTANT, REDUCTIONS, masked_mean, reduce, reduction_weights

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
CONSTANT = 7.0


def values_like(mask: torch.Tensor) -> torch.Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))


@given(LENGTHS)
def test_weights_of_means_sum_to_one(lengths: list[int]) -> None:
    mask = ragged_mask(lengths, 5)
    for reduction in ("token_mean", "sequence_mean_of_token_mean"):
        weights = reduction_weights(mask, reduction)  # type: ignore[arg-type]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
        assert (weights[~mask] == 0).all()
        assert (weights[mask] > 0).all()


@given(LENGTHS)
def test_weights_of_sums_are_one_per_response_or_per_constant(lengths: list[int]) -> None:
    mask = ragged_mask(lengths, 5)
    non_empty = sum(length > 0 for length in lengths)
    weights = reduction_weights(mask, "sequence_mean_of_token_sum")
    torch.testing.assert_close(weights, mask / non_empty)
    weights = reduction_weights(mask, "sequence_mean_of_token_sum_over_constant", CONSTANT)
    torch.testing.assert_close(weights, mask / (len(lengths) * CONSTANT))
    torch.testing.assert_close(reduction_weights(mask, "token_sum_over_constant", CONSTANT), mask / CONSTANT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(lengths=LENGTHS, garbage=GARBAGE)
def test_padding_is_inert(reduction: str, lengths: list[int], garbage: float) -> None:
    mask = ragged_mask(lengths, 5)
    values = values_like(mask)
    spoilt = values.masked_fill(~mask, garbage).requires_grad_()
    clean = values.masked_fill(~mask, 0.0)
    loss = reduce(spoilt, mask, reduction, CONSTANT)  # type: ignore[arg-type]
    assert torch.equal(loss, reduce(clean, mask, reduction, CONSTANT))  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    assert spoilt.grad is not None
    assert (spoilt.grad[~mask] == 0).all()
    # neither does wider padding
    wide = torch.nn.functional.pad(spoilt.detach(), (0, 3), value=garbage)
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(reduce(wide, wide_mask, reduction, CONSTANT), loss.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(lengths=LENGTHS, random=st.randoms(use_true_random=False))
def test_row_order_is_inert(reduction: str, lengths: list[int], random: object) -> None:
    mask = ragged_mask(lengths, 5)
    values = values_like(mask)
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = reduce(values[order], mask[order], reduction, CONSTANT)  # type: ignore[arg-type]
    torch.testing.assert_close(shuffled, reduce(values, mask, reduction, CONSTANT))  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average_over_is_an_error(reduction: str) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="every token of this minibatch is masked"):
        reduce(torch.ones(2, 3), nothing, reduction, CONSTANT)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", OVER_CONSTANT)
@pytest.mark.parametrize("constant", [None, 0, -1.0])
def test_the_constant_is_needed_where_it_divides(reduction: Any, constant: float | None) -> None:
    with pytest.raises(ValueError, match=f"^{reduction} needs a positive constant"):
        reduction_weights(torch.ones(1, 2, dtype=torch.bool), reduction, constant)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mean", "did you mean 'token_mean'"),
        ("token-mean", "did you mean 'token_mean'"),
        ("seq-mean-token-mean", "did you mean 'sequence_mean_of_token_mean'"),
        ("sum", "choose one of: sequence_mean_of_token_mean, "),
    ],
)
def test_an_unknown_reduction_is_refused_with_the_nearest_name(name: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown reduction '{name}'; {hint}"):
        reduction_weights(torch.ones(1, 2, dtype=torch.bool), name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_precision_is_kept(reduction: Any) -> None:
    mask = ragged_mask([1, 3, 3])
    values = values_like(mask).double()
    constant = {"constant": CONSTANT} if reduction in OVER_CONSTANT else {}
    loss = reduce(values, mask, reduction, **constant)
    divisor = {
        "token_mean": [7, 7, 7],
        "sequence_mean_of_token_mean": [3, 9, 9],
        "sequence_mean_of_token_sum": [3, 3, 3],
        "sequence_mean_of_token_sum_over_constant": [21, 21, 21],
        "token_sum_over_constant": [7, 7, 7],
    }[reduction]
    exact = sum(float(row[m].sum()) / d for row, m, d in zip(values, mask, divisor, strict=True))
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(exact, abs=1e-14)
    assert reduce(values.bfloat16(), mask, reduction, **constant).dtype == torch.float32


def test_reductions_by_hand() -> None:
    mask = ragged_mask([1, 3])
    values = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert float(reduce(values, mask, "token_mean")) == pytest.approx(10 / 4)
    assert float(reduce(values, mask, "sequence_mean_of_token_mean")) == pytest.approx((4 + 2) / 2)
    assert float(reduce(values, mask, "sequence_mean_of_token_sum")) == pytest.approx((4 + 6) / 2)
    over_constant = reduce(values, mask, "sequence_mean_of_token_sum_over_constant", 10)
    assert float(over_constant) == pytest.approx((4 + 6) / 20)
    assert float(reduce(values, mask, "token_sum_over_constant", 10)) == pytest.approx((4 + 6) / 10)


def test_an_empty_response_counts_only_where_all_responses_do() -> None:
    mask = ragged_mask([0, 3])
    values = torch.tensor([[9.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
    expected = {
        "token_mean": 2.0,
        "sequence_mean_of_token_mean": 2.0,
        "sequence_mean_of_token_sum": 6.0,
        "sequence_mean_of_token_sum_over_constant": 6 / (2 * 10),
        "token_sum_over_constant": 6 / 10,
    }
    assert set(expected) == set(REDUCTIONS)
    for reduction, value in expected.items():
        assert float(reduce(values, mask, reduction, 10)) == pytest.approx(value)  # type: ignore[arg-type]


def test_an_undefined_mean_is_nan() -> None:
    values = torch.tensor([math.inf, 2.0, 4.0])
    assert math.isnan(masked_mean(values, torch.zeros(3, dtype=torch.bool)))
    assert float(masked_mean(values, torch.tensor([False, True, True]))) == 3
