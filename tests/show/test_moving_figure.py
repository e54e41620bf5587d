"""The figure that moves: axes that stand still, round ticks, interrupted lines, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from under_node import needs_node, node, widgets

SAYS = ["First.", "Second.", "Third."]
ALT = "Three curves that rise while the dial is turned to the right."


def curves(y: list[float]) -> list[Any]:
    return [widgets.Curve("a", [0, 1, 2], y), widgets.Curve("b", [0, 1, 2], [2, 1, 0], points=True)]


def moving(**changed: Any) -> Any:
    frames = {"low": curves([0, 1, 2]), "middle": curves([0, 2, math.nan]), "high": curves([0, 3, 6])}
    settings = {"dial": "height", "x": "step", "y": "value", "says": SAYS, "alt": ALT} | changed
    return widgets.MovingFigure(settings.pop("frames", frames), **settings)


@needs_node
def test_ranges_ticks_and_paths(tmp_path: Path) -> None:
    calls = [
        "w.range([1, 3], false)",
        "w.range([1, 3], true)",
        "w.range([-2, -1], true)",
        "w.range([5, 5], false)",
        "w.ticks([0, 1])",
        "w.ticks([-0.3, 12.2])",
        "w.ticks([0.0012, 0.0031])",
        "w.path([0, 1, 2, 3], [1, null, 3, 4], (x) => x, (y) => -y)",
    ]
    found = node("moving_figure", calls, tmp_path)
    assert found[0] == pytest.approx([0.92, 3.08])
    assert found[1] == pytest.approx([0, 3.12])
    assert found[2] == pytest.approx([-2.08, 0])
    assert found[3] == pytest.approx([4.5, 5.5])
    assert found[4] == [0, 0.5, 1]
    assert found[5] == [0, 5, 10]
    assert found[6] == pytest.approx([0.0015, 0.002, 0.0025, 0.003])
    assert found[7] == "M0.0,-1.0 M2.0,-3.0 L3.0,-4.0"


def test_frames_hold_four_digits_and_gaps() -> None:
    figure = moving()
    assert [frame["label"] for frame in figure.frames] == ["low", "middle", "high"]
    assert figure.frames[1]["curves"][0]["y"] == [0.0, 2.0, None]
    assert figure.frames[0]["curves"][1]["points"] is True
    assert widgets.Curve("a", [0], [1 / 3]).plain()["y"] == [0.3333]
    assert repr(figure) == "MovingFigure(dial='height', start=0)"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": {"one": curves([0, 1, 2])}}, "two positions"),
        ({"frames": {"one": curves([0, 1, 2]), "two": curves([0, 1, 2])[:1]}}, "same one to four curves"),
        ({"says": SAYS[:2]}, "a sentence for each of the 3"),
        ({"says": ["Same.", "Same.", "Other."]}, "unlike its neighbour"),
        ({"start": 2}, "room to the right"),
        ({"alt": "short"}, "alt must say"),
        ({"labels": ["a", "b"]}, "one for each label"),
    ],
)
def test_what_cannot_be_shown_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moving(**changed)


def test_curves_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' needs as many finite x"):
        widgets.Curve("a", [0, 1], [1]).plain()
    with pytest.raises(ValueError, match="no finite y"):
        moving(frames={str(i): [widgets.Curve("a", [0], [math.nan])] for i in range(3)})
