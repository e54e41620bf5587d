"""Replays diffadapt.json: generation entropy, proxy labels, the probe with its gradients, curve and oracle."""

from __future__ import annotations

import torch

from ...core.entropy import softmax_entropy
from ...inference import difficulty as d
from ...inference.probe import probe_logits, probe_loss
from ...inference.strategies import Strategy
from ..golden import Case, Replay, Rule, gradient

WEIGHTS = ("W1", "b1", "W2", "b2")


def _entropy(case: Case) -> Replay:
    temperature = case.params.get("temperature", 1.0)
    samples = [torch.tensor(s, dtype=case.dtype) for s in case.inputs["logits_per_sample"]]
    per_sample = d.generation_entropy([softmax_entropy(s, temperature) if len(s) else s.flatten() for s in samples])
    return Replay({"per_sample": per_sample, "problem_mean": d.problem_entropy(per_sample)})


def _labels(case: Case) -> Replay:
    at = [case.params[name] for name in ("alpha", "beta", "gamma")]
    problems = zip(*(case.tensor(name).tolist() for name in ("correct_rate", "generation_entropy")), strict=True)
    return Replay({"label": [d.proxy_label(rate, entropy, *at) for rate, entropy in problems]})


def _probe(case: Case) -> Replay:
    weights = [case.leaf(name) for name in WEIGHTS]
    logits = probe_logits(case.tensor("hidden"), *weights)
    loss = probe_loss(logits, case.ids("label"))
    classes, table, most = case.params["classes"], case.params["strategy"], case.params["max_tokens"]
    called = [classes[i] for i in logits.argmax(-1).tolist()]
    strategies = [Strategy(table[name]["temperature"], table[name]["budget_fraction"]) for name in called]
    outputs = {
        "probs": logits.softmax(-1),
        "loss": loss,
        "predicted": called,
        "temperature": [s.temperature for s in strategies],
        "max_new_tokens": [s.max_tokens(most) for s in strategies],
    }
    return Replay(outputs, {name: gradient(loss, leaf) for name, leaf in zip(WEIGHTS, weights, strict=True)})


def _curve(case: Case) -> Replay:
    found = d.u_curve(case.inputs["entropy_by_difficulty"])
    return Replay(
        {
            "argmin_level_1based": found.argmin_level,
            "drop_easy_to_min_percent": found.drop,
            "rise_min_to_hard_percent": found.rise,
            "is_u_shaped": found.is_u_shaped,
            "quadratic_coefficient": found.quadratic,
        }
    )


def _oracle(case: Case) -> Replay:
    found = d.oracle(case.inputs["correct"], case.inputs["tokens"])
    return Replay(
        {
            "choice": found.choice,
            "accuracy": found.accuracy,
            "mean_tokens": found.mean_tokens,
            "token_saving_vs_normal_percent": found.saving,
            "accuracy_normal": found.accuracy_normal,
        }
    )


RULES = [
    Rule("diffadapt", {"logits_per_sample"}, {"per_sample", "problem_mean"}, _entropy),
    Rule("diffadapt", {"correct_rate", "generation_entropy"}, {"label"}, _labels, params={"alpha", "beta", "gamma"}),
    Rule("diffadapt", {"hidden", "label", *WEIGHTS}, {"probs", "loss"}, _probe, params={"classes", "strategy"}),
    Rule("diffadapt", {"entropy_by_difficulty"}, {"argmin_level_1based"}, _curve),
    Rule("diffadapt", {"correct", "tokens"}, {"choice", "mean_tokens"}, _oracle),
]
