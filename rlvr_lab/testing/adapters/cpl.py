"""Replays cpl.json: scores, loss, accuracy, gradients; for pairs with and without a reference, and for ranks."""

from __future__ import annotations

from ...core import cpl
from ..golden import Case, Replay, Rule, gradient


def _comparison(case: Case) -> Replay:
    p = case.params
    sides = [case.leaf(f"log_prob_{i}") for i in (1, 2)]
    relative = bool(p.get("kl_variant"))
    references = [case.tensor(f"ref_log_prob_{i}") if relative else None for i in (1, 2)]
    gamma = p.get("gamma", 1.0)
    u1, u2 = (cpl.segment_score(x, p["alpha"], gamma, ref) for x, ref in zip(sides, references, strict=True))
    label = case.tensor("label")
    loss = cpl.cpl_loss(u1, u2, label, p["contrastive_bias"])
    found = {
        "segment_adv_1": u1,
        "segment_adv_2": u2,
        "loss": loss,
        "accuracy": cpl.pair_accuracy(u1, u2, label),
    }
    return Replay(found, {f"log_prob_{i}": gradient(loss, x) for i, x in enumerate(sides, start=1)})


def _rank(case: Case) -> Replay:
    log_prob, rating = case.leaf("log_prob"), case.tensor("score")
    u = cpl.segment_score(log_prob, case.params["alpha"], case.params.get("gamma", 1.0))
    loss = cpl.rank_loss(u, rating, case.params["contrastive_bias"], ties="as_sorted", drop_zero=True)
    found = {"segment_adv": u, "loss": loss, "accuracy": cpl.rank_accuracy(u, rating, ties="as_sorted")}
    return Replay(found, {"log_prob": gradient(loss, log_prob)})


RULES = [
    Rule("cpl", {"log_prob_1", "log_prob_2", "label"}, {"loss", "accuracy"}, _comparison,
         params={"alpha", "contrastive_bias"}),
    Rule("cpl", {"log_prob", "score"}, {"loss", "accuracy"}, _rank, params={"alpha", "contrastive_bias"}),
]  # fmt: skip
