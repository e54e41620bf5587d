"""Replays kappatune.json: condition numbers and selections of both implementations, and the entropy of linear units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...methods import kappatune as kt
from ..golden import Case, Replay, Rule

NOISE = 1e12
"""Above it a recorded condition number is the rounding noise of a matrix that lacks a direction."""


def _selection(params: Any) -> dict[str, Any]:
    """Settings of a recorded peft selection: `top_p`, `num` or `thr`."""
    names = {"top_p": "top_p", "num": "count", "thr": "threshold"}
    return {"count": None} | {names[key]: value for key, value in params.items()}


def _kappas(found: list[kt.Measured], recorded: Any) -> dict[str, float]:
    """Kappa by name; where noise was recorded, and ours is above it too, the recorded figure stands for both."""

    def shown(one: kt.Measured) -> float:
        other = recorded.get(one.name)
        noisy = isinstance(other, int | float) and other > NOISE and one.kappa > NOISE
        return float(other) if noisy else one.kappa

    return {one.name: shown(one) for one in found}


def _theory(weight: Tensor) -> dict[str, float]:
    return {
        "gaussian_output_entropy": kt.linear_entropy(weight),
        "log_volume": kt.log_volume(weight),
        "frobenius_norm": float(weight.norm()),
        "entropy_upper_bound_at_fixed_norm": kt.entropy_bound(weight),
    }


def _run(case: Case) -> Replay:
    weights = {name: torch.tensor(values, dtype=case.dtype) for name, values in case.inputs["weights"].items()}
    count, max_dim = case.params.get("num_tensors_to_finetune", 1), case.params.get("max_dim_size_to_analyze")
    released = kt.KappaTuneConfig(count=count, max_dim=max_dim, singular="noise", tensors="drop")
    peft = kt.KappaTuneConfig(**_selection(case.params.get("peft_selection", {"top_p": 0.2})), max_dim=16384,
                              singular="added", tensors="mean")  # fmt: skip
    own, theirs = (kt.scan(weights.items(), config) for config in (released, peft))
    chosen = [one.name for one in kt.choose(own, released)]
    outputs = {
        "condition_numbers": _kappas(own, case.outputs["condition_numbers"]),
        "selected_in_order": chosen,
        "requires_grad": {name: name in chosen for name in weights},
        "theory": {name: _theory(weights[name]) for name in case.outputs.get("theory", {})},
    }
    if "peft_condition_numbers" in case.outputs:
        outputs["peft_condition_numbers"] = _kappas(theirs, case.outputs["peft_condition_numbers"])
        outputs["peft_selected"] = [one.name for one in kt.choose(theirs, peft)]
    return Replay(outputs)


RULES = [Rule("kappatune", {"weights"}, {"condition_numbers", "selected_in_order"}, _run)]
