"""The widget on early stopping: its figures against the library's rule and controls, and what it refuses."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from under_node import needs_node, node, widgets

from rlvr_lab.inference.early_stopping import Rule, fixed_budget, stop_place

CHAINS = [
    {"entropy": [0.9, 0.05, 0.2], "tokens": [10, 14, 19, 20], "thought": [5, 10, 15, 16], "correct": [0, 1, 0, 1]},
    {"entropy": [0.02], "tokens": [9, 12], "thought": [5, 6], "correct": [0, 1]},
    {"entropy": [0.5, 0.4, 0.3], "tokens": [8, 13, 20, 24], "thought": [5, 10, 15, 21], "correct": [1, 0, 1, 1]},
]


def at(places: list[int | None], name: str) -> float:
    index = [
        len(c["entropy"]) if p is None else min(p - 1, len(c["entropy"])) for c, p in zip(CHAINS, places, strict=True)
    ]
    return float(np.mean([c[name][i] for c, i in zip(CHAINS, index, strict=True)]))


@needs_node
@pytest.mark.parametrize(("threshold", "least"), [(0.1, 1), (0.1, 2), (0.45, 2), (0.0, 1)])
def test_the_dial_s_figures_are_the_library_s(threshold: float, least: int, tmp_path: Path) -> None:
    places = [stop_place(c["entropy"], Rule(threshold, min_steps=least)) for c in CHAINS]
    told = json.dumps(CHAINS)
    got, right, dealt = node(
        "stopping_dial",
        [
            f"{told}.map((c) => w.stopPlace(c.entropy, {threshold}, {least}))",
            f"w.atPlaces({told}, {json.dumps(places)}, 'correct')",
            f"w.dealt({told}, {json.dumps(places)}, 'tokens')",
        ],
        tmp_path,
    )
    assert got == places
    assert right == pytest.approx(at(places, "correct"))
    every_deal = [at([places[i] for i in order], "tokens") for order in permutations(range(3))]
    assert dealt == pytest.approx(np.mean(every_deal))


@needs_node
@pytest.mark.parametrize("thought", [5.0, 25 / 3, 11.0, 43 / 3])
def test_an_equal_budget_thinks_as_many_tokens(thought: float, tmp_path: Path) -> None:
    used, tokens = node(
        "stopping_dial", [f"w.equalBudget({json.dumps(CHAINS)}, {thought}, ['thought', 'tokens'])"], tmp_path
    )[0]
    assert used == pytest.approx(thought)
    assert at([1, 1, 1], "tokens") <= tokens <= at([None, None, None], "tokens")
    total = round(3 * thought)
    places = fixed_budget([c["thought"] for c in CHAINS], total, np.random.default_rng(0))
    assert total - 6 < 3 * at(list(places), "thought") <= total


def test_what_the_class_refuses() -> None:
    for chains in ([], [{"entropy": [0.1], "tokens": [1], "thought": [1, 2], "correct": [0, 1]}]):
        with pytest.raises(ValueError, match="one entry more than entropy"):
            widgets.StoppingDial(chains)
    with pytest.raises(ValueError, match="power must lie in"):
        widgets.StoppingDial(CHAINS, power=1.0)
    assert repr(widgets.StoppingDial(CHAINS)) == "StoppingDial(power=-2.0, least=1)"
