"""Replays feedback_friction.json: masks, rounds of feedback, rejection, judgements, temperatures, answer entropy."""

from __future__ import annotations

from random import Random

from ...core.entropy import answer_entropy
from ...evaluate.feedback_friction import Rounds, pick, ramp
from ...evaluate.feedback_text import category_fractions, error_category, mask
from ..golden import Case, Replay, Rule


def _masks(case: Case) -> Replay:
    return Replay({"masked": [mask(kind, text, *answer) for kind, text, *answer in case.inputs["rows"]]})


def _loop(case: Case) -> Replay:
    correct = [[bool(c) for c in row] for row in case.inputs["would_be_correct"]]
    found = Rounds(case.inputs["answers"], correct, case.params["rounds"])
    return Replay(
        {
            "active_per_round": found.active,
            "newly_solved_per_round": found.solved,
            "cumulative_accuracy_percent": [round(100 * accuracy, 3) for accuracy in found.accuracy],
            "solved_at_round": found.solved_at,
            "unsolved": found.unsolved,
            "all_attempts_of_unsolved": {str(problem): found.attempts(problem) for problem in found.unsolved},
            "distinct_wrong_answers_mean": found.distinct_wrong,
            "consecutive_repeat_rate_unsolved": found.repeat_rate,
            "friction": found.friction(case.params["target_accuracy"]),
            "gain": found.gain,
        }
    )


def _pick(case: Case) -> Replay:
    answers, tried = case.inputs["predictions"], case.inputs["all_attempts"]
    place = pick(answers, tried, Random(case.params["python_random_seed"]))
    novel = [i for i, answer in enumerate(answers) if answer not in tried]
    outputs = {"novel_indices": novel, "chosen_index": place, "chosen_prediction": answers[place]}
    return Replay(outputs | {"fallback": not novel})


def _categories(case: Case) -> Replay:
    texts, categories = case.inputs["texts"], case.params["categories"]
    found = [error_category(text, categories) for text in texts]
    return Replay({"category": found, "fraction": category_fractions(texts, categories)})


def _ramp(case: Case) -> Replay:
    heats = [ramp(round_, case.params["step"], case.params["cap"]) for round_ in case.inputs["rounds"]]
    return Replay({"temperature": heats})


def _entropy(case: Case) -> Replay:
    answers = case.inputs["sampled_answers"]
    return Replay({"entropy": answer_entropy(answers), "clusters": len(set(answers))})


RULES = [
    Rule("feedback_friction", {"rows"}, {"masked"}, _masks),
    Rule("feedback_friction", {"would_be_correct", "answers"}, {"active_per_round"}, _loop),
    Rule("feedback_friction", {"predictions", "all_attempts"}, {"chosen_index"}, _pick),
    Rule("feedback_friction", {"texts"}, {"category"}, _categories),
    Rule("feedback_friction", {"rounds"}, {"temperature"}, _ramp),
    Rule("feedback_friction", {"sampled_answers"}, {"entropy", "clusters"}, _entropy),
]
