"""Replays classp.json: trajectories and histories of the paper's rule and of the released one."""

from __future__ import annotations

from typing import Any

from ...elsewhere import classp as cl
from ..golden import Case, Replay, Rule

RULE: dict[str, cl.Rule] = {"paper_rule": "paper", "official_code": "released"}


def _run(case: Case) -> Replay:
    p, outputs = case.params, dict[str, Any]()
    settings = {"lr": p["lr"], "threshold": p["threshold"], "eps": p["epsilon"], "power": p["power"]}
    for name, rule in RULE.items():
        grads = list(case.tensor("grads"))
        path, history = cl.trajectory(case.tensor("w0"), grads, scaling=p["apply_scaling"], rule=rule, **settings)
        outputs |= {f"{name}_trajectory": path, f"{name}_accumulator": history}
    return Replay(outputs)


RULES = [Rule("classp", {"w0", "grads"}, {"paper_rule_trajectory", "official_code_trajectory"}, _run)]
