"""Replays symphony.json: regulariser, both losses, weights of the sorted atoms, and the fading replay.

In float32, as recorded: near a scale of 1 the regulariser amplifies rounding.
"""

from __future__ import annotations

from torch import Tensor

from ...elsewhere import symphony as sy
from ..golden import Case, Replay, Rule, gradient


def _leaf(case: Case, key: str) -> Tensor:
    return case.tensor(key).float().requires_grad_()


def _run(case: Case) -> Replay:
    scale, beta, errors, atoms = (_leaf(case, key) for key in ("scale", "beta", "err", "q_atoms"))
    loss, even, odd = sy.swaddling(scale, beta), sy.rehse(errors), sy.rehae(errors)
    fading = {key: sy.fading_probabilities(case.params["L"]) for key in case.outputs if key.startswith("fading_probs")}
    outputs = {
        "swaddling": loss,
        "ReHSE": even,
        "ReHAE": odd,
        "critic_atom_weights": sy.atom_weights(atoms.shape[-1]),
        "q_soft": sy.soft_value(atoms),
    }
    grad = {
        "swaddling_scale": gradient(loss, scale),
        "swaddling_beta": gradient(loss, beta),
        "ReHSE_err": gradient(even, errors),
        "ReHAE_err": gradient(odd, errors),
    }
    return Replay(outputs | fading, grad)


RULES = [Rule("symphony", {"scale", "beta", "err", "q_atoms"}, {"swaddling", "critic_atom_weights", "q_soft"}, _run)]
