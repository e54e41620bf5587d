"""The widget on attention rows: its penalty against the method's, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from under_node import needs_node, node, widgets

from rlvr_lab.methods.entropy_guided_attention import head_penalty, largest_entropy

HEADS = [[0.0, 0.5, 1.0, 1.35, 0.2, 1.7], [0.0, 0.69, 1.09, 0.3, 1.6, 0.9]]


@needs_node
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("theta", "gamma"), [(0.5, 0.2), (0.9, 0.0), (0.25, 0.1)])
def test_the_penalty_is_the_method_s(theta: float, gamma: float, causal: bool, tmp_path: Path) -> None:
    context = 6 if causal else 9
    entropy = torch.tensor(HEADS, dtype=torch.float64)[None]
    e_max = largest_entropy(6, context, causal)
    arguments = f"{json.dumps(HEADS)}, {theta}, {gamma}, {context}, {str(causal).lower()}"
    (found,) = node("attention_dead_zone", [f"w.outcome({arguments})"], tmp_path)
    each = head_penalty(entropy, torch.full((2,), theta, dtype=torch.float64), gamma, e_max)
    assert found["penalty"] == pytest.approx(float(each.mean()), rel=1e-9)
    delta = entropy - theta * e_max
    outside = delta.abs() > gamma * e_max
    shares = [(outside & (delta < 0)), ~outside, (outside & (delta > 0))]
    assert found["shares"] == pytest.approx([float(s.double().mean()) for s in shares])


@needs_node
def test_early_rows_owe_what_they_cannot_pay_unless_measured_by_their_own_reach(tmp_path: Path) -> None:
    flat = [[math.log(i) for i in range(1, 7)]]
    calls = [f"w.outcome({json.dumps(flat)}, 1, 0.05, 6, {causal})" for causal in ("false", "true")]
    by_context, by_reach = node("attention_dead_zone", calls, tmp_path)
    assert by_context["helpless"] == pytest.approx(1.0)
    assert by_context["shares"] == pytest.approx([5 / 6, 1 / 6, 0])
    assert by_reach == {"shares": [0, 1, 0], "penalty": 0, "helpless": 0}


def test_what_the_class_refuses() -> None:
    for models in ({}, {"a": []}, {"a": [[]]}, {"a": [[0.1, 0.2, 0.3]]}):
        with pytest.raises(ValueError, match="every head needs between 1 and 2 rows"):
            widgets.AttentionDeadZone(models, 2)
    with pytest.raises(ValueError, match="theta must lie in"):
        widgets.AttentionDeadZone({"a": [[0.1]]}, 2, theta=1.5)
    assert repr(widgets.AttentionDeadZone({"a": [[0.1]]}, 2)) == "AttentionDeadZone(theta=0.5, gamma=0.2)"
