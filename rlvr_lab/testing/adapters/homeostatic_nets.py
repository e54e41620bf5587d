"""Replays homeostatic_nets.json: one decision to take an object or to leave it."""

from __future__ import annotations

from ...elsewhere import homeostatic_nets as hn
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    weights = hn.Weights(case.tensor("W1"), case.tensor("W2"))
    grads = hn.Weights(case.tensor("grad_W1"), case.tensor("grad_W2"))
    eta = weights.first.new_tensor(case.params["eta"])
    memory = (case.tensor("memory_x"), case.ids("memory_y"))
    guess, label = (eta.new_tensor(case.inputs[key]).long() for key in ("guess", "label"))
    done = hn.decide(weights, grads, eta, memory, guess, label, batch=case.params["batch"], size=case.params["lr_step"])
    return Replay({"acc_keep": done.leave, "acc_take": done.take, "eta_new": done.eta})


INPUTS = {"W1", "W2", "grad_W1", "grad_W2", "memory_x", "memory_y", "guess", "label"}
RULES = [Rule("homeostatic_nets", INPUTS, {"acc_keep", "acc_take", "eta_new"}, _run, {"batch", "eta", "lr_step"})]
