"""Replays reasoning_utility.json: entropies of an answer along a chain, and how scores go with correctness."""

from __future__ import annotations

import torch

from ...evaluate import reasoning_utility as ru
from ..golden import Case, Replay, Rule


def _trajectory(case: Case) -> Replay:
    logits = case.tensor("step_logits")
    own: ru.Reduction = "sum" if str(case.params.get("reduction", "mean")).startswith("sum") else "mean"
    found = ru.Trajectory.from_logits(logits, case.ids("answer_tokens"), own)
    summed = ru.Trajectory(found.token_entropy, found.token_nll, "sum")
    return Replay(
        {
            "H_token": torch.tensor(found.token_entropy, dtype=case.dtype),
            "H": found.entropy,
            "H_sum_variant": summed.entropy,
            "NLL": found.nll,
            "step_utility": found.utility,
            "total_reduction": found.total_reduction,
            "relative_reduction": found.relative_reduction,
            "slope_per_step": found.slope,
            "fraction_decreasing_steps": found.fraction_decreasing,
            "monotone_decreasing": found.monotone,
        }
    )


def _association(case: Case) -> Replay:
    found = ru.association(case.inputs["score"], case.inputs["is_correct"])
    return Replay(vars(found))


RULES = [
    Rule("reasoning_utility", {"step_logits", "answer_tokens"}, {"H", "NLL"}, _trajectory),
    Rule("reasoning_utility", {"score", "is_correct"}, {"auroc"}, _association),
]
