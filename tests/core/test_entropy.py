from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import ragged_mask
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core import entropy as e

V = 6
ROW = st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)
MEANS = (e.pooled_token_entropy, e.sequence_mean_token_entropy, e.sequence_entropy)


def exact_entropy(z: np.ndarray) -> float:
    """Independent reference in float64: log Z - sum p z."""
    z = z - z[np.isfinite(z)].max()
    p = np.exp(z) / np.exp(z).sum()
    return float(np.log(np.exp(z).sum()) - sum(a * b for a, b in zip(p, z, strict=True) if a > 0))


@given(ROW, st.floats(0.1, 5))
def test_token_entropy_lies_between_0_and_log_v(row: list[float], temperature: float) -> None:
    value = float(e.softmax_entropy(torch.tensor(row), temperature))
    assert -1e-6 <= value <= math.log(V) + 1e-5
    assert value == pytest.approx(exact_entropy(np.array(row) / temperature), abs=1e-4)


def test_the_bounds_are_reached() -> None:
    assert float(e.softmax_entropy(torch.zeros(V))) == pytest.approx(math.log(V), abs=1e-6)
    certain = torch.full((V,), -math.inf)
    certain[2] = 0.0
    assert float(e.softmax_entropy(certain)) == 0


@given(ROW)
def test_the_gradient_is_the_finite_difference_in_float64(row: list[float]) -> None:
    z = np.array(row) / 5  # moderate logits: the float32 gradient is what is tested, not its underflow
    logits = torch.tensor(z[None, None], dtype=torch.float32, requires_grad=True)
    logprob, entropy = e.token_statistics(logits, torch.tensor([[1]]))
    (entropy.sum() + 2 * logprob.sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    h = 1e-5

    def objective(x: np.ndarray) -> float:
        return exact_entropy(x) + 2 * float(x[1] - x.max() - np.log(np.exp(x - x.max()).sum()))

    numeric = [(objective(z + h * unit) - objective(z - h * unit)) / (2 * h) for unit in np.eye(V)]
    np.testing.assert_allclose(logits.grad[0, 0].numpy(), numeric, atol=2e-5)


def test_forbidden_tokens_contribute_nothing_and_get_no_gradient() -> None:
    free = torch.tensor([[[0.3, -1.0, 0.5]]], requires_grad=True)
    barred = torch.cat([free.detach(), torch.full((1, 1, 2), -math.inf)], -1).requires_grad_()
    ids = torch.tensor([[2]])
    plain, with_barred = e.token_statistics(free, ids), e.token_statistics(barred, ids)
    torch.testing.assert_close(with_barred[0], plain[0])
    torch.testing.assert_close(with_barred[1], plain[1])
    plain[1].sum().backward()  # type: ignore[no-untyped-call]
    with_barred[1].sum().backward()  # type: ignore[no-untyped-call]
    assert free.grad is not None
    assert barred.grad is not None
    torch.testing.assert_close(barred.grad[..., :3], free.grad)
    assert torch.equal(barred.grad[..., 3:], torch.zeros(1, 1, 2))


@given(st.floats(-50, 50, width=32), ROW)
def test_a_shift_of_all_logits_changes_nothing(shift: float, row: list[float]) -> None:
    logits = torch.tensor(row)
    torch.testing.assert_close(e.softmax_entropy(logits + shift), e.softmax_entropy(logits), rtol=1e-3, atol=1e-3)


def test_statistics_are_at_the_temperature_that_is_asked_for() -> None:
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    hot = e.token_statistics(logits, ids, temperature=0.5)
    scaled = e.token_statistics(logits * 2, ids)
    torch.testing.assert_close(hot[0], scaled[0])
    torch.testing.assert_close(hot[1], scaled[1])
    torch.testing.assert_close(hot[0], torch.distributions.Categorical(logits=logits * 2).log_prob(ids))


@pytest.mark.parametrize("mean", MEANS)
@given(lengths=LENGTHS, garbage=GARBAGE, random=st.randoms(use_true_random=False))
def test_padding_and_row_order_are_inert(mean: object, lengths: list[int], garbage: float, random: object) -> None:
    mask = ragged_mask(lengths, 4)
    values = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2))
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    clean: Tensor = mean(values.masked_fill(~mask, 0.0), mask)  # type: ignore[operator]
    assert torch.equal(mean(values.masked_fill(~mask, garbage), mask), clean)  # type: ignore[operator]
    torch.testing.assert_close(mean(values[order], mask[order]), clean)  # type: ignore[operator]


@given(lengths=LENGTHS, garbage=GARBAGE)
def test_the_top_share_ignores_padding(lengths: list[int], garbage: float) -> None:
    mask = ragged_mask(lengths, 4)
    values = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) + 0.1
    top, part = e.top_share_entropy(values.masked_fill(~mask, garbage), mask, 0.2)
    assert float(top) >= float(e.pooled_token_entropy(values, mask)) - 1e-6
    assert 0 < float(part) <= 1 + 1e-6


def test_means_by_hand() -> None:
    mask = ragged_mask([1, 3, 0])
    values = torch.tensor([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    assert float(e.pooled_token_entropy(values, mask)) == pytest.approx(10 / 4)
    assert float(e.sequence_mean_token_entropy(values, mask)) == pytest.approx((4 + 2) / 2)
    assert float(e.sequence_entropy(values, mask)) == pytest.approx((4 + 6 + 0) / 3)
    top, part = e.top_share_entropy(values, mask, share=0.5)
    assert float(top) == pytest.approx((4 + 3) / 2)
    assert float(part) == pytest.approx(7 / 10)


def test_what_is_undefined_is_nan() -> None:
    values, nothing = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert math.isnan(e.pooled_token_entropy(values, nothing))
    assert math.isnan(e.sequence_mean_token_entropy(values, nothing))
    assert math.isnan(e.sequence_entropy(values[:0], nothing[:0]))
    assert all(map(math.isnan, e.top_share_entropy(values, nothing)))
    assert math.isnan(e.answer_entropy([]))
    top, part = e.top_share_entropy(torch.zeros(2, 3), ~nothing)
    assert float(top) == 0
    assert math.isnan(part)


def test_answer_entropy_counts_no_answer_as_one_class() -> None:
    assert e.answer_entropy(["a", "a"]) == 0
    assert e.answer_entropy(["a", "b"]) == pytest.approx(math.log(2))
    assert e.answer_entropy([None, None]) == 0
    assert e.answer_entropy([None, "a"]) == pytest.approx(math.log(2))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12))
def test_answer_entropy_lies_between_0_and_log_of_its_classes(answers: list[str | None]) -> None:
    value = e.answer_entropy(answers)
    assert 0 <= value <= math.log(len(set(answers))) + 1e-9
    assert value == pytest.approx(e.answer_entropy(answers[::-1]))


def test_the_chain_rule_holds_on_a_policy_that_can_be_enumerated() -> None:
    """sequence_entropy averages summed conditional entropies: over all sequences, weighted by p, it is H(y)."""
    first = torch.tensor([0.2, 0.8])
    second = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    joint = first[:, None] * second
    exact = float(-(joint * joint.log()).sum())
    inner = e.softmax_entropy(second.log())
    rows = torch.stack([e.softmax_entropy(first.log()).expand(2), inner], 1)
    counts = torch.tensor([2, 8])  # ten samples with exactly the frequencies of the first token
    sample = rows.repeat_interleave(counts, 0)
    assert float(e.sequence_entropy(sample, torch.ones(10, 2, dtype=torch.bool))) == pytest.approx(exact, abs=1e-6)
