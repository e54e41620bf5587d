"""Replays mtard.json: one step of both controllers in the released code, and the gradient of its loss."""

from __future__ import annotations

import torch

from ...elsewhere import mtard
from ..golden import Case, Replay, Rule, gradient


def _run(case: Case) -> Replay:
    p = case.params
    balance = mtard.Balance(p["temp_lr"], p["weight_lr"], p["temp_min"], p["temp_max"])
    taus = torch.tensor([p["temp_adv"], p["temp_nat"]], dtype=case.dtype)
    teachers = [case.tensor(f"teacher_{name}_logits") for name in ("adv", "nat")]
    students = [case.leaf(f"student_{name}_logits") for name in ("adv", "nat")]
    pairs = list(zip(teachers, students, taus, strict=True))
    losses = torch.stack([mtard.teacher_kl(t, s, tau, released=True) for t, s, tau in pairs])
    measured = torch.stack([mtard.tempered_entropy(t, tau, released=True) for t, _, tau in pairs])
    exact = [mtard.tempered_entropy(t, tau) for t, _, tau in pairs]
    moved = mtard.temperature_step(measured, taus, balance)
    now = losses.detach()
    recorded = torch.tensor([p["init_loss_adv"] or torch.nan, p["init_loss_nat"] or torch.nan], dtype=case.dtype)
    first = torch.where(recorded.isnan(), now, recorded)
    weights = torch.tensor([1 - p["w_nat"], p["w_nat"]], dtype=case.dtype)
    weights = mtard.weight_step(now, first, weights, balance)
    loss = (weights * losses).sum()
    outputs = {
        "kl_adv": losses[0],
        "kl_nat": losses[1],
        "entropy_adv_nats": exact[0],
        "entropy_nat_nats": exact[1],
        "temp_adv_new": moved[0],
        "temp_nat_new": moved[1],
        "w_adv_new": weights[0],
        "w_nat_new": weights[1],
        "total_loss": loss,
    }
    grad = {"student_adv_logits": gradient(loss, students[0]), "student_nat_logits": gradient(loss, students[1])}
    return Replay(outputs, grad)


RULES = [
    Rule("mtard", {"teacher_adv_logits", "teacher_nat_logits", "student_adv_logits", "student_nat_logits"},
         {"temp_adv_new", "temp_nat_new", "total_loss"}, _run, params={"temp_adv", "temp_nat", "w_nat"}),
]  # fmt: skip
