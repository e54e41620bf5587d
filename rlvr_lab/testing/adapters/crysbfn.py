"""Replays crysbfn.json: Bayesian update, entropies and divergence of von Mises beliefs, and the circular loss."""

from __future__ import annotations

import torch

from ...elsewhere import crysbfn as cb
from ..golden import Case, Replay, Rule, gradient

ADDED = 1e-3
"""The recorded divergence is from a belief whose concentration was raised by this much."""


def _update(case: Case) -> Replay:
    m, c, y, alpha = (case.tensor(key).numpy() for key in ("m", "c", "y", "alpha"))
    mean, after = cb.bayesian_update(m, c, y, alpha)
    outputs = {
        "m_out": mean,
        "c_out": after,
        "entropy_before": cb.belief_entropy(c),
        "entropy_after": cb.belief_entropy(after),
        "kl_vm_m_cplus1em3__y_alpha": cb.kl_von_mises(m, c + ADDED, y, alpha),
    }
    return Replay({key: torch.as_tensor(value) for key, value in outputs.items()})


def _loss(case: Case) -> Replay:
    x_hat = case.leaf("x_pred")
    distance: cb.Distance = "wrapped" if case.params["mse_loss"] else "cosine"
    loss = cb.step_loss(x_hat, case.tensor("x"), case.tensor("alpha"), int(case.params["N"]), distance).mean()
    return Replay({"loss": loss}, {"x_pred": gradient(loss, x_hat)})


RULES = [
    Rule("crysbfn", {"m", "c", "y", "alpha"}, {"m_out", "c_out"}, _update),
    Rule("crysbfn", {"x", "x_pred", "alpha"}, {"loss"}, _loss, {"N", "mse_loss"}),
]
