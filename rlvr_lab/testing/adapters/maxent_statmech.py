"""Replays maxent_statmech.json: maximum-entropy inference, and what a Markov chain loses."""

from __future__ import annotations

import numpy as np

from ...elsewhere import maxent_statmech as ms
from ..golden import Case, Replay, Rule


def _inference(case: Case) -> Replay:
    found = ms.maximum_entropy(case.inputs["features"], case.inputs["targets"], case.inputs.get("reference"))
    return Replay({
        "p": found.p, "multipliers": found.multipliers, "entropy": found.entropy,
        "kl_to_reference": found.kl_to_reference, "log_partition": found.log_partition,
        "covariance": found.covariance,
    })  # fmt: skip


def _chain(case: Case) -> Replay:
    kernel, first = np.array(case.inputs["K"]), case.inputs["p_init_first_state_prob"]
    start = np.full(len(kernel), (1 - first) / (len(kernel) - 1))
    start[0] = first
    steps = len(case.outputs.get("kl_to_stationary_5_steps", [0]))
    return Replay({
        "stationary": ms.stationary(kernel), "entropy_production": ms.entropy_production(kernel),
        "kl_to_stationary_5_steps": ms.relaxation(kernel, start, steps),
    })  # fmt: skip


RULES = [
    Rule("maxent_statmech", {"features", "targets"}, {"p", "multipliers"}, _inference),
    Rule("maxent_statmech", {"K", "p_init_first_state_prob"}, {"stationary", "entropy_production"}, _chain),
]  # fmt: skip
