"""Replays dale_langevin.json: the forward sample, the denoising target and loss, two reverse steps and EG."""

from __future__ import annotations

from ...elsewhere import dale_langevin as dl
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    sigma, t, dt = case.params["sigma"], case.params["t"], case.params["dt"]
    x0, eps, h, z = (case.tensor(key) for key in ("x0", "eps", "hyvarinen_score", "z"))
    return Replay({
        "x_t": (x_t := dl.forward_sample(x0, eps, sigma, t)),
        "mdsm_target": dl.mdsm_target(eps, sigma, t),
        "mdsm_loss": dl.mdsm_loss(h, eps, sigma, t),
        "reverse_step_log_space": dl.reverse_step(x_t, h, z, sigma, dt, "sign_kept"),
        "reverse_step_ambient_euler": dl.reverse_step(x_t, h, z, sigma, dt, "ambient"),
        "exponentiated_gradient_step": dl.exponentiated_gradient(x0, case.tensor("grad"), case.params["eta"]),
    })  # fmt: skip


RULES = [
    Rule("dale_langevin", {"x0", "eps", "hyvarinen_score", "z", "grad"}, {"x_t", "mdsm_target", "mdsm_loss"}, _run,
         params={"sigma", "t", "dt", "eta"}),
]  # fmt: skip
