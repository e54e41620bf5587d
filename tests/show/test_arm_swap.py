"""The widget that swaps recorded arms: its geometry and its sentences under node, and what its class refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from under_node import needs_node, node, widgets


@needs_node
def test_a_curve_fills_its_box_and_gaps_lift_the_pen(tmp_path: Path) -> None:
    wide, single, points, path = node(
        "arm_swap",
        ["w.extent([[3, null], [1, 5]])", "w.extent([[2]])", "w.place([0, 5, 10], [1, null, 3], [0, 10], [1, 3])",
         "w.stroke([[0, 60], null, [50, 30], [100, 0]])"],
        tmp_path,
    )  # fmt: skip
    assert wide == [1, 5]
    assert single == [1.5, 2.5]
    assert points == [[0, 60], None, [100, 0]]
    assert path == "M0.0 60.0M50.0 30.0L100.0 0.0"


@needs_node
def test_a_band_goes_along_below_and_back_above(tmp_path: Path) -> None:
    curve = json.dumps({"x": [0, 5, 10], "y": [1, 1, 1], "half": [1, None, 1]})
    got, nothing = node(
        "arm_swap",
        [f"w.outline({curve}, [0, 10], [0, 2])", "w.outline({x: [0], y: [1], half: [1]}, [0, 1], [0, 2])"],
        tmp_path,
    )
    assert got == "M0.0 60.0L100.0 60.0L100.0 0.0L0.0 0.0Z"
    assert nothing == ""


def arm(name: str, role: str = "method", of: str = "", **evaluation: Any) -> dict[str, Any]:
    row = {"step": 20, "accuracy": 0.4, "distinct": 1.5, "gap": 0.1, "half": 0.2, "beyond": 0, "seeds": 3}
    return {"name": name, "role": role, "of": of, "note": "", "evaluations": [row | evaluation]}


@needs_node
def test_a_methods_own_controls_come_first(tmp_path: Path) -> None:
    arms = [arm("grpo", "reference"), arm("a"), arm("b"), arm("a_random", "control", "a"), arm("c")]
    (names,) = node("arm_swap", [f"w.rivals({json.dumps(arms)}, 'a').map((arm) => arm.name)"], tmp_path)
    assert names == ["a_random", "b", "c"]


@needs_node
def test_arms_of_different_schedules_are_read_at_one_step(tmp_path: Path) -> None:
    often, seldom = arm("a"), arm("b")
    often["evaluations"] = [often["evaluations"][0] | {"step": step} for step in (0, 20, 40, 60)]
    seldom["evaluations"] = [seldom["evaluations"][0] | {"step": step} for step in (0, 40, 80)]
    both = json.dumps([often, seldom])
    reads = [f"w.until({both}[{i}], {step}).step" for i, step in ((0, 60), (1, 60), (1, 80), (0, 80), (1, -1))]
    steps, *found = node("arm_swap", [f"w.steps({both})", *reads], tmp_path)
    assert steps == [0, 20, 40, 60, 80]
    assert found == [60, 40, 80, 60, 0]


@needs_node
def test_what_is_said_about_an_evaluation(tmp_path: Path) -> None:
    cases = [arm("a"), arm("a", gap=-0.1, half=None), arm("a", gap=None, half=None, beyond=3), arm("a", distinct=None)]
    good, falling, none, undefined = node("arm_swap", [f"w.told({json.dumps(case)}, 20)" for case in cases], tmp_path)
    assert good == (
        "a after step 20: pass@1 0.400, 1.50 distinct correct answers. "
        "Against GRPO stopped at the same pass@1: +0.10 ± 0.20."
    )
    assert falling.endswith("-0.10.")
    assert none.endswith("no match; 3 of 3 seeds are beyond GRPO's reach.")
    assert "undefined distinct" in undefined


def test_the_class_wants_a_reference_a_method_and_a_rival() -> None:
    arms = [arm("grpo", "reference"), arm("a"), arm("a_random", "control", "a")]
    assert widgets.ArmSwap(arms).method == "a"
    for bad in (arms[1:], arms[:2], [arms[0], arms[2], arms[2]]):
        with pytest.raises(ValueError, match="one reference"):
            widgets.ArmSwap(bad)
    with pytest.raises(ValueError, match="one of"):
        widgets.ArmSwap(arms, method="a_random")
