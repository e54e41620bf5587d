"""The widget on windows of high entropy: its counts against the library's, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from under_node import needs_node, node, widgets

from rlvr_lab.core.entropy import window_entropy
from rlvr_lab.core.windows import pooled_threshold, row_quantiles, window_events

ROWS = [[0.1, 1.4, 0.9, 0.0, 1.1, 0.7], [0.2, 0.3], [], [1.2, 0.05, 0.6, 0.4, 0.9]]


@needs_node
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("of_windows", [False, True])
def test_events_are_the_library_s(width: int, of_windows: bool, tmp_path: Path) -> None:
    longest = max(map(len, ROWS))
    entropy = torch.tensor([row + [0.0] * (longest - len(row)) for row in ROWS], dtype=torch.float64)
    mask = torch.arange(longest)[None] < torch.tensor([len(row) for row in ROWS])[:, None]
    windows = window_entropy(entropy, mask, width)
    quantile = row_quantiles(windows, ~windows.isnan(), 0.6) if of_windows else row_quantiles(entropy, mask, 0.6)
    theta = pooled_threshold(quantile, torch.zeros(len(ROWS)).long())
    got, events = node(
        "window_events",
        [
            f"w.threshold({json.dumps(ROWS)}, {width}, 0.6, {str(of_windows).lower()})",
            f"w.events({json.dumps(ROWS)}, {width}, {float(theta[0])})",
        ],
        tmp_path,
    )
    assert got == pytest.approx(float(theta[0]))
    assert events == window_events(windows, theta).sum(1).tolist()
    assert sum(events) > 0


@needs_node
def test_a_quantile_is_interpolated_and_undefined_of_nothing(tmp_path: Path) -> None:
    got = node(
        "window_events", ["w.quantile([3, 1, 2], 0.75)", "w.quantile([5], 0.9)", "w.quantile([], 0.9)"], tmp_path
    )
    assert got == [2.5, 5, None]  # JSON has no NaN
    assert math.isnan(float(row_quantiles(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.9)))


def test_what_the_class_refuses() -> None:
    for rows, buckets in (([], []), ([[0.1]], []), ([[0.1]], ["simple"])):
        with pytest.raises(ValueError, match="every response needs a bucket"):
            widgets.WindowEvents(rows, buckets)
    with pytest.raises(ValueError, match="width must lie in"):
        widgets.WindowEvents([[0.1]], ["easy"], width=9)
    assert repr(widgets.WindowEvents([[0.1]], ["easy"])) == "WindowEvents(width=4, level=0.95)"
