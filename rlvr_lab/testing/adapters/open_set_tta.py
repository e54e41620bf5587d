"""Replays open_set_tta.json: which samples the filter keeps, and the filtered entropy with its gradient."""

from __future__ import annotations

from ...core.entropy import softmax_entropy
from ...elsewhere.open_set_tta import filtered_entropy, wisdom_filter
from ..golden import Case, Replay, Rule, gradient


def _run(case: Case) -> Replay:
    adapted = case.leaf("logits_adapted")
    choice = wisdom_filter(case.tensor("logits_original"), adapted)
    loss = filtered_entropy(adapted, choice.keep)
    outputs = {
        "class_index_original": choice.reference,
        "conf_original": choice.original,
        "conf_adapted": choice.adapted,
        "select": choice.keep.to(adapted.dtype),
        "entropy": softmax_entropy(adapted),
        "loss_mean_over_batch": loss,
        "n_selected": choice.keep.sum(),
    }
    return Replay(outputs, gradient(loss, adapted))


RULES = [Rule("open_set_tta", {"logits_original", "logits_adapted"}, {"select", "loss_mean_over_batch"}, _run)]
