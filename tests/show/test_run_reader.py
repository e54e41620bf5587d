"""The widget that reads a recorded run: its arithmetic under node, and what its class refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from under_node import needs_node, node, widgets


@needs_node
def test_means_leave_out_what_was_not_measured_and_what_is_still_to_come(tmp_path: Path) -> None:
    values = json.dumps([1, None, 3, 5, 100])
    got = node(
        "run_reader", [f"w.recentMean({values}, 3, 2)", f"w.recentMean({values}, 1, 2)", f"w.earlyMean({values}, 3, 2)",
         f"w.earlyMean({values}, 0, 9)", "w.recentMean([null], 0, 3)"],
        tmp_path,
    )  # fmt: skip
    assert got == [4, 1, 2, 1, None]


@needs_node
def test_what_was_paid_for_is_accuracy_per_halving(tmp_path: Path) -> None:
    entropy, accuracy = json.dumps([0.4, 0.4, 0.1, 0.1]), json.dumps([0.1, 0.1, 0.4, 0.4])
    late, early, risen = node(
        "run_reader", [f"w.paid({entropy}, {accuracy}, 3, 2)", f"w.paid({entropy}, {accuracy}, 1, 2)",
         f"w.paid({accuracy}, {entropy}, 3, 2)"],
        tmp_path,
    )  # fmt: skip
    assert late == pytest.approx({"halvings": 2.0, "gain": 0.3, "rate": 0.15})
    assert early == {"halvings": 0, "gain": 0, "rate": None}
    assert risen["halvings"] == pytest.approx(-2.0)
    assert risen["rate"] is None


@needs_node
def test_a_curve_spans_its_box_and_breaks_at_gaps(tmp_path: Path) -> None:
    whole, broken, flat = node(
        "run_reader",
        ["w.curvePath([0, 2, 1], 100, 10)", "w.curvePath([0, null, 1], 100, 10)", "w.curvePath([3, 3], 100, 10)"],
        tmp_path,
    )
    assert whole == "M0.0 10.0L50.0 0.0L100.0 5.0"
    assert broken == "M0.0 10.0M100.0 0.0"
    assert flat == "M0.0 10.0L100.0 10.0"


def run(**columns: list[float | None]) -> dict[str, Any]:
    named = {name.replace("_", " "): values for name, values in columns.items()}
    return {"name": "a", "verdict": "nothing", "columns": named}


def test_the_class_keeps_gaps_and_refuses_what_it_cannot_draw() -> None:
    good = run(token_entropy=[0.5, None], accuracy=[0.1, 0.2])
    widget = widgets.RunReader([good], step=1)
    assert widget.runs[0]["steps"] == 2
    assert widget.runs[0]["columns"] == [["token entropy", [0.5, None]], ["accuracy", [0.1, 0.2]]]
    for bad in (run(token_entropy=[0.5], accuracy=[0.1, 0.2]), run(accuracy=[0.1]), run(token_entropy=[], accuracy=[])):
        with pytest.raises(ValueError, match="equally long"):
            widgets.RunReader([bad])
    with pytest.raises(ValueError, match="run and step"):
        widgets.RunReader([good], step=2)
