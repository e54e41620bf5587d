import math

import pytest
import torch
from builders import ragged_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core import entropy as e


def test_entropies_keep_float64_and_raise_bf16():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(e.softmax_entropy(logits), exact, atol=1e-14, rtol=0)
    assert e.token_statistics(logits, torch.zeros(2, 3, dtype=torch.long))[1].dtype == torch.float64
    assert e.softmax_entropy(logits.bfloat16()).dtype == torch.float32
    assert e.nucleus_entropy(logits).dtype == torch.float64


# -------------------------------------------------------------------------------------------------------- nucleus

HEAD = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_p", "crossing", "kept"), [(0.8, False, 2), (0.8, True, 3), (0.5, True, 1), (0.95, False, 3), (1.1, False, 4)]
)
def test_nucleus_keeps_or_drops_the_crossing_token(top_p, crossing, kept):
    q = HEAD[:kept] / HEAD[:kept].sum()
    found = e.nucleus_entropy(HEAD[[2, 0, 3, 1]].log(), top_p, include_crossing=crossing)
    assert float(found) == pytest.approx(float(-(q * q.log()).sum()), abs=1e-9)


def test_an_empty_nucleus_has_entropy_zero_as_released():
    confident = torch.tensor([0.85, 0.1, 0.05], dtype=torch.float64).log()
    assert float(e.nucleus_entropy(confident, 0.8)) == 0
    assert float(e.nucleus_entropy(confident, 0.8, include_crossing=True)) == pytest.approx(0, abs=1e-9)


def test_no_gradient_outside_the_nucleus_and_none_of_a_wide_top_k():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    e.nucleus_entropy(logits, 0.6, top_k=10_000).sum().backward()
    p = logits.softmax(-1)
    ordered, index = p.sort(descending=True)
    outside = torch.zeros_like(p, dtype=torch.bool).scatter(1, index, ordered.cumsum(-1) >= 0.6)
    assert logits.grad[outside].abs().max() < 1e-12
    assert logits.grad[~outside].abs().max() > 1e-3


def test_top_k_limits_the_nucleus():
    assert float(e.nucleus_entropy(torch.zeros(10), 0.95, top_k=4)) == pytest.approx(math.log(4), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- window


@given(st.integers(1, 5), st.integers(0, 1), st.lists(st.integers(0, 8), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_window_is_the_plain_mean_where_complete(window, offset, lengths):
    mask = ragged_mask(lengths, 8)
    values = torch.rand(len(lengths), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = e.window_entropy(values.masked_fill(~mask, float("nan")), mask, window, offset)
    for i, length in enumerate(lengths):
        for t in range(8):
            first, last = t + offset, t + offset + window
            if last <= length:
                assert float(found[i, t]) == pytest.approx(float(values[i, first:last].mean()))
            else:
                assert math.isnan(found[i, t])


def test_a_window_may_not_bridge_a_gap_in_the_mask():
    mask = torch.tensor([[True, True, False, True, True]])
    assert e.window_entropy(torch.ones(1, 5), mask, 2).isnan().tolist() == [[False, True, True, False, True]]
    with pytest.raises(ValueError, match="window"):
        e.window_entropy(torch.ones(1, 5), mask, 0)


# --------------------------------------------------------------------------------------------------------- phases


def test_phases_exclude_the_marker_and_empty_ones_are_unknown():
    values = torch.arange(1.0, 6.0).repeat(5, 1)
    mask = ragged_mask([5, 4, 5, 3, 0], 5)
    think, answer = e.phase_entropy(values, mask, torch.tensor([2, 3, 0, -1, -1]))
    assert think[:2].tolist() == [1.5, 2.0]
    assert think[2].isnan()
    assert think[3] == 2.0
    assert think[4].isnan()
    assert answer[0] == 4.5
    assert answer[1].isnan()
    assert answer[2] == 3.5
    assert answer[3:].isnan().all()


def test_first_position_of_a_marker_is_the_first_marked_one():
    ids = torch.tensor([[7, 3, 7], [1, 2, 7], [7, 1, 1]])
    assert e.first_position(ids, ragged_mask([3, 2, 3], 3), 7).tolist() == [0, -1, 0]


# ------------------------------------------------------------------------------------------- answers and meanings


def test_answer_entropy_with_and_without_missing_answers():
    answers = ["12", "12", "7", None, "12", "9"]
    assert e.answer_entropy(answers) == pytest.approx(1.242453325, abs=1e-9)
    assert e.answer_entropy(answers, count_missing=False) == pytest.approx(0.9502705392, abs=1e-9)
    assert math.isnan(e.answer_entropy([None], count_missing=False))


def test_clusters_are_greedy_with_the_first_member_as_judge():
    assert e.cluster(["7", None, "3", "7"]) == [0, None, 1, 0]
    close = e.cluster([1.0, 1.4, 1.8, 0.7], lambda a, b: abs(a - b) < 0.5)
    assert close == [0, 0, 1, 0]  # 1.8 is near 1.4, which is no first member


def test_semantic_entropy_of_released_groups():
    clusters = e.cluster(["7", "7", "3", "7", None, "3", "9"])
    assert e.semantic_entropy(clusters, "separate") == pytest.approx(1.27703426, abs=1e-8)
    assert e.semantic_entropy(clusters, "one_class") == pytest.approx(1.27703426, abs=1e-8)
    assert e.semantic_entropy(clusters) == pytest.approx(1.27703426 + math.log(1 / 7) / 7, abs=1e-8)
    assert e.semantic_entropy(e.cluster(["1", "2", "1", "1"])) == pytest.approx(0.562335145, abs=1e-8)


def test_many_missing_answers_are_one_class_or_each_its_own():
    assert e.semantic_entropy([None, None, 0, 0], "one_class") == pytest.approx(math.log(2))
    assert e.semantic_entropy([None, None, 0, 0], "separate") == pytest.approx(1.5 * math.log(2))
    assert e.semantic_entropy([0, 0, 0]) == 0
    assert math.isnan(e.semantic_entropy([]))
    assert math.isnan(e.semantic_entropy([None, None]))
