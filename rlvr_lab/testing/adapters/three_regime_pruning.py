"""Replays three_regime_pruning.json: linear mode connectivity of a path, and linear CKA of features."""

from __future__ import annotations

from ...elsewhere import three_regime_pruning as tr
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    found = tr.mode_connectivity(case.tensor("path_values"))
    x, y = case.tensor("X"), case.tensor("Y")
    outputs = {"lmc": found.lmc, "t_star_index": found.place, "linear_cka": tr.linear_cka(x, y)}
    return Replay(outputs | {"linear_cka_self": tr.linear_cka(x, x)})


RULES = [Rule("three_regime_pruning", {"path_values", "X", "Y"}, {"lmc", "t_star_index", "linear_cka"}, _run)]
