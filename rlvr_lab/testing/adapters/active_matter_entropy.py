"""Replays active_matter_entropy.json: linear processes in closed form, and the swimmer's formula where recorded."""

from __future__ import annotations

from ...elsewhere import active_matter_entropy as work
from ..golden import Case, Replay, Rule


def _linear(case: Case) -> Replay:
    drift, diffusion = case.tensor("M"), case.tensor("D")
    process = work.linear_process(drift, diffusion)
    formula = None
    if case.outputs.get("swimmer_formula") is not None:  # null for processes that are no swimmer
        speed, turning, pull, noise = (-drift[0, 1], drift[1, 1], drift[0, 0], diffusion[0, 0])
        formula = work.swimmer_rate(float(speed), float(turning), float(pull), float(noise))
    return Replay(
        {
            "covariance": process.covariance,
            "score_matrix": process.score,
            "velocity_matrix": process.velocity,
            "entropy_production_rate": process.rate,
            "formula_trace": work.rate_by_trace(process),
            "swimmer_formula": formula,
        }
    )


RULES = [Rule("active_matter_entropy", {"M", "D"}, {"entropy_production_rate"}, _linear)]
