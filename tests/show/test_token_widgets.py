"""The widgets of the token-level chapters: their arithmetic under node against the library, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from under_node import needs_node, node, widgets

from rlvr_lab.methods.high_entropy_tokens import top_count, top_mask
from rlvr_lab.methods.negative_reinforcement import logit_gradient
from rlvr_lab.methods.steer import exponential_weights

VALUES = [0.3, 1.1, 0.0, 1.1, 0.7, 0.02, 0.0]


@needs_node
def test_selection_is_the_library_s(tmp_path: Path) -> None:
    ratios = [0.0, 0.2, 0.3, 3 / 7, 1.0]
    calls = [f"w.topWeights({VALUES}, {ratio})" for ratio in ratios]
    got = node("token_weights", [*calls, *[f"w.topCount(5136, {r})" for r in ratios], "w.topCount(0, 0.2)"], tmp_path)
    values = torch.tensor([VALUES], dtype=torch.float64)
    for ratio, weights in zip(ratios, got, strict=False):
        assert weights == top_mask(values, torch.ones_like(values, dtype=torch.bool), ratio)[0].int().tolist()
    assert got[5:] == [top_count(5136, ratio) for ratio in ratios] + [0]


@needs_node
def test_weights_of_steer_are_the_library_s(tmp_path: Path) -> None:
    change = [-0.3, 0.1, 0.0, 0.02]
    got = node("token_weights", [f"w.steerWeights({change}, 0.05)", "w.steerWeights([0, 0], 0.7)"], tmp_path)
    values = torch.tensor([change], dtype=torch.float64)
    expected = exponential_weights(values, torch.ones_like(values, dtype=torch.bool), 0.05)[0]
    np.testing.assert_allclose(got[0], expected, rtol=1e-12)
    assert got[1] == [1, 1]


@needs_node
def test_summary_weighs_sizes_and_marks(tmp_path: Path) -> None:
    marks = json.dumps([True, False, False, False])
    top, none = node(
        "token_weights",
        [f"w.summary('top', [3, 2, 1, 0], [4, 3, 2, 1], {marks}, 0.5)", "w.keptShare([0, 0], [1, 1])"],
        tmp_path,
    )
    assert top == pytest.approx({"mean": 0.5, "share": 0.7, "marked": 0.5, "weakened": 0.5})
    assert none == 0


@needs_node
@pytest.mark.parametrize("form", ["logprob", "probability"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_push_is_a_step_down_the_library_s_gradient(form: str, sign: int, tmp_path: Path) -> None:
    logits = [0.4, -1.0, 0.9, 0.1]
    (got,) = node("signed_push", [f"w.pushed({logits}, 2, {sign}, 0.3, '{form}')"], tmp_path)
    z = torch.tensor(logits, dtype=torch.float64)
    gradient = logit_gradient(z, 2, float(sign), form)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, z - 0.3 * gradient, rtol=1e-12)


@needs_node
def test_odds_of_two_tokens_before_and_after(tmp_path: Path) -> None:
    (change,) = node("signed_push", ["w.oddsChange([0.5, 0.25, 0.25], [0.2, 0.6, 0.2], 1, 2)"], tmp_path)
    assert change == pytest.approx(3.0)


def test_what_the_classes_refuse() -> None:
    with pytest.raises(ValueError, match="rule"):
        widgets.TokenWeights(["a"], [1.0], [1.0], [True], rule="bottom")
    with pytest.raises(ValueError, match="equally long"):
        widgets.TokenWeights(["a", "b"], [1.0], [1.0], [True])
    with pytest.raises(ValueError, match="positive"):
        widgets.SignedPush({"a": 0.0, "b": 1.0})
    with pytest.raises(ValueError, match="places"):
        widgets.SignedPush({"a": 0.5, "b": 0.5})
    assert widgets.SignedPush({"a": 0.5, "b": 0.5}, sampled=1, pair=(0, 1)).logits == pytest.approx(
        [-0.6931, -0.6931], abs=1e-4
    )
