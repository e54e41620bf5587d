"""Replays dichotomy_of_control.json: the tabular one-step objective and the critic's estimate, official shapes."""

from __future__ import annotations

from ...elsewhere import dichotomy_of_control as doc
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    joint, encoder, policy, value = (
        case.tensor(name) for name in ("joint_action_return", "encoder", "policy", "value")
    )
    found = doc.objective(joint, encoder, policy, value, case.params["beta"])
    outputs = {
        "conditional_mi": found.information,
        "action_ce": found.action_ce,
        "value_ce": found.value_ce,
        "loss": found.loss,
    }
    if "energy" in case.inputs:
        outputs["contrastive_estimate"] = doc.contrastive_estimate(joint, encoder, case.tensor("energy"))
    return Replay(outputs)


RULES = [
    Rule(
        "dichotomy_of_control",
        {"joint_action_return", "encoder", "policy", "value"},
        {"conditional_mi", "loss"},
        _run,
        params={"beta"},
    )
]
