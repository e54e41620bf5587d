"""Replays spurious_rewards.json: reward rules, advantage mass, clipping bias, misalignment, entropy change."""

from __future__ import annotations

import numpy as np
import torch

from ...core.advantages import Std
from ...core.entropy import softmax_entropy
from ...core.losses import importance_ratio
from ...methods import spurious_rewards as sr
from ..golden import Case, Replay, Rule


def _moments(case: Case) -> Replay:
    p = case.params
    std: Std = "none" if not p.get("divide_by_std", True) else ("population" if p.get("std_ddof") == 0 else "sample")
    found = sr.bernoulli_moments(p["group_size"], p["gamma"], std, p.get("eps", 0.0))
    names = ("mu", "mean_A", "second_moment_A", "prob_zero_variance_group")
    values = (found.mu, found.mean, found.second_moment, found.all_equal)
    return Replay(dict(zip(names, values, strict=True)))


def _bias(case: Case) -> Replay:
    p, old = case.params, case.tensor("old_log_prob")
    ratio = importance_ratio(case.tensor("log_prob"), old)
    low, high = p.get("epsilon_low", p.get("epsilon")), p.get("epsilon_high", p.get("epsilon"))
    coefficient = sr.clipping_bias(ratio, p["mu"], 1 - low, 1 + high)
    outputs = {"ratio": ratio, "coef_on_grad_ratio": coefficient, "coef_on_grad_log_prob": coefficient * ratio}
    return Replay({**outputs, "max_ratio_attainable": sr.largest_ratio(old)})


def _misalignment(case: Case) -> Replay:
    p = case.params
    found = sr.misalignment(p["group_size"], p["num_correct"], p.get("gamma", 0.5))
    return Replay(
        {
            "oracle_mass": found.oracle_mass,
            "expected_loss": found.expected_loss,
            "variance_loss": found.variance_loss,
            "closed_form_mean": found.oracle_mass,
            "closed_form_variance": found.closed_form_variance,
            "prob_mass_on_correct_positive": found.chance_of_positive_mass,
            "expected_false_positives": found.false_positives,
            "expected_false_negatives": found.false_negatives,
        }
    )


def _unclipped(case: Case) -> Replay:
    probs, eta = case.tensor("probs"), case.params["eta"]
    coefficient = float(sr.second_order_coefficient(probs))
    outputs = {
        "entropy": softmax_entropy(probs.log()),
        "exact_expected_dH": sr.expected_entropy_change(probs, eta),
        "second_order_coefficient": coefficient,
        "second_order_prediction": eta**2 / 2 * coefficient,
    }
    return Replay(outputs)


def _rules(case: Case) -> Replay:
    correct, parseable = case.mask("correct"), case.mask("parseable")
    answers = case.inputs["answers"]
    # the recorder's random numbers, as its `rng` parameter describes them
    uniform = torch.from_numpy(np.random.default_rng(case.params["seed"]).random(len(answers)))
    majority = [case.inputs["majority_answer"]] * len(answers)
    rewards = {
        "ground_truth": correct,
        "random": sr.random_reward(uniform, case.params["gamma"]),
        "incorrect": sr.incorrect_reward(correct),
        "majority": sr.majority_reward(answers, majority),
        "format": parseable,
    }
    return Replay({name: value.long() for name, value in rewards.items()})


RULES = [
    Rule("spurious_rewards", set(), {"mu"}, _moments, params={"group_size", "gamma"}),
    Rule("spurious_rewards", {"old_log_prob", "log_prob"}, {"coef_on_grad_ratio"}, _bias, params={"mu"}),
    Rule("spurious_rewards", set(), {"oracle_mass"}, _misalignment, params={"group_size", "num_correct"}),
    Rule("spurious_rewards", {"probs"}, {"exact_expected_dH"}, _unclipped, params={"eta"}),
    Rule("spurious_rewards", {"correct", "answers", "majority_answer", "parseable"}, {"random"}, _rules, {"seed"}),
]
