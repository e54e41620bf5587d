"""The widget of two matrices ranks as the library does."""

from __future__ import annotations

from pathlib import Path

import pytest
from under_node import needs_node, node, widgets

from rlvr_lab.methods.kappatune import KappaTuneConfig, Measured, choose


@needs_node
def test_the_widget_ranks_as_the_library_does(tmp_path: Path) -> None:
    chance = [2.9, 220.0]
    cases = [(6.0, 100.0), (6.0, 3.0), (2.0, 400.0), (30.0, 9000.0)]
    calls = [f"w.ranked([{a}, {b}], {chance})" for a, b in cases]
    found = node("kappa_by_chance", calls, tmp_path)
    for (a, b), row in zip(cases, found, strict=True):
        both = [
            Measured(str(i), (4, 4), (4 * i + 4, 4), 16, k, c)
            for i, (k, c) in enumerate(zip((a, b), chance, strict=True))
        ]
        for key, measure in (("plain", "kappa"), ("fair", "matched")):
            config = KappaTuneConfig(count=1, measure=measure)  # type: ignore[arg-type]
            assert choose(both, config)[0].name == str(row[key])
        assert row["matched"] == pytest.approx([one.matched for one in both])
    assert {(row["plain"], row["fair"]) for row in found} == {(0, 1), (1, 1), (0, 0)}
    assert node("kappa_by_chance", ["w.digits(6.309)", "w.digits(1234.5)"], tmp_path) == ["6.31", "1235"]


def test_kappas_that_cannot_be_are_refused() -> None:
    for wrong in ({"shape": 2}, {"long": 0.5}, {"square": 1e5}):
        with pytest.raises(ValueError, match="shape must number"):
            widgets.KappaByChance({"64x64": 220.0, "64x256": 2.9}, **wrong)
    with pytest.raises(ValueError, match="at least two shapes"):
        widgets.KappaByChance({"64x64": 220.0})
    assert repr(widgets.KappaByChance({"a": 220.0, "b": 2.9})) == "KappaByChance(shape=1, long=6.0, square=100.0)"
