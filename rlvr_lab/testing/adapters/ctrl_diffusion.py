"""Replays ctrl_diffusion.json: soft values, the tilted last step, and the laws with tilted and with kept start."""

from __future__ import annotations

from ...elsewhere import ctrl_diffusion as cd
from ...elsewhere.maxent_statmech import kl
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    p, data = case.params, case.inputs["p0"]
    reward = cd.log_label(case.inputs["label_prob"])
    initial, kernels = cd.reverse_kernels(data, case.inputs["Q"], int(p["T"]))
    best = cd.soft_control(initial, kernels, reward, p["alpha"], p["gamma"])
    target = cd.tilted_target(data, reward, p["alpha"], p["gamma"])
    kept = cd.run(initial, best.kernels)
    return Replay({
        "soft_values": best.values, "policy_last_step": best.kernels[-1], "log_partition": best.log_partition,
        "final_tilted_init": cd.run(best.initial, best.kernels), "target": target, "final_fixed_init": kept,
        "KL_fixed_to_target": kl(kept, target),
    })  # fmt: skip


RULES = [
    Rule("ctrl_diffusion", {"p0", "Q", "label_prob"}, {"soft_values", "final_tilted_init"}, _run,
         params={"T", "alpha", "gamma"}),
]  # fmt: skip
