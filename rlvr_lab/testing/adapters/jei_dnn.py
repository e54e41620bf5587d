"""Replays jei_dnn.json: gate targets and loss, exit probabilities, and both gradients of the classifiers' loss."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ...elsewhere import jei_dnn as jei
from ..golden import Case, Replay, Rule, gradient


def _run(case: Case) -> Replay:
    logits, gates, label = case.tensor("logits"), case.leaf("gate_logits"), case.ids("targets")
    ce = torch.stack([cross_entropy(exit_logits, label, reduction="none") for exit_logits in logits], 1)
    best = jei.cheapest_exit(ce, case.tensor("cost"), case.params["lambda_"])
    targets = jei.gate_targets(best, ce.shape[1])
    loss = jei.gate_loss(gates, targets, case.params.get("pos_weights"))
    p_exit = jei.exit_probabilities(gates.detach())
    inner = ce[:, :-1].clone().requires_grad_()
    losses = {ratio: jei.classifier_loss(inner, p_exit, ratio) for ratio in ("released", "detached", "none")}
    return Replay(
        {
            "ce": ce,
            "optimal_exit": best,
            "gate_targets": targets,
            "gate_loss": loss,
            "p_exit": p_exit,
            "classifier_loss_official": losses["released"],
            "mean_unweighted_ce": losses["none"],
        },
        {
            "gate_logits": gradient(loss, gates),
            "classifier_loss_wrt_ce_official": gradient(losses["released"], inner),
            "classifier_loss_wrt_ce_if_ratio_detached": gradient(losses["detached"], inner),
        },
    )


RULES = [Rule("jei_dnn", {"logits", "targets", "gate_logits", "cost"}, {"gate_targets", "p_exit"}, _run)]
