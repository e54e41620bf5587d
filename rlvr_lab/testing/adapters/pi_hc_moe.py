"""Replays pi_hc_moe.json: least squares of every expert, with relative initial rows that all of them share."""

from __future__ import annotations

from ...elsewhere import pi_hc_moe as work
from ..golden import Case, Replay, Rule


def _experts(case: Case) -> Replay:
    rows = case.tensor("residual_matrix")
    shared, targets = work.relative_rows(case.tensor("ic_basis"), case.tensor("ic_values"))
    cells = work.split(len(rows), case.params["experts"])
    solved = work.constrained_weights(rows, shared, targets, cells, case.params["ridge"])
    return Replay({"weights": solved.weights, "mean_squared_residual": solved.mean_squared_residual})


INPUTS = {"residual_matrix", "ic_basis", "ic_values"}
RULES = [Rule("pi_hc_moe", INPUTS, {"weights"}, _experts, params={"experts", "ridge"})]
