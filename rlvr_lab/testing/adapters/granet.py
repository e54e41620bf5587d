"""Replays granet.json: the schedule, the released pruning of one tensor, what is dropped and what grows back."""

from __future__ import annotations

from ...elsewhere import granet as gn
from ..golden import Case, Replay, Rule


def _run(case: Case) -> Replay:
    p, weight, grad = case.params, case.tensor("weight"), case.tensor("grad")
    sparsity = gn.sparsity_at(p["prune_iter"], p["total_prune_iters"], p["init_density"], p["final_density"])
    density = 1 - sparsity
    (pruned,) = gn.global_prune([weight], density, released=True)
    dropped = gn.drop(weight, pruned, p["regenerate_rate"])
    grown = gn.regrow(grad, dropped, gn.drop_count(pruned, p["regenerate_rate"]))
    outputs = {
        "target_sparsity": sparsity,
        "n_keep": gn.kept_count(weight.numel(), density, released=True),
        "threshold": gn.threshold([weight], density, released=True),
        "mask_after_pruning": pruned.double(),
        "mask_after_drop": dropped.double(),
        "mask_after_regrow": grown.double(),
    }
    return Replay(outputs)


RULES = [Rule("granet", {"weight", "grad"}, {"n_keep", "mask_after_pruning", "mask_after_regrow"}, _run)]
