"""Semantic clusters: relations by rule and by model, greedy order, hostile answers; and clusters of a rollout."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from builders import sampled_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.entropy import cluster
from rlvr_lab.errors import UserError
from rlvr_lab.rollout.clusters import with_clusters
from rlvr_lab.rollout.grading import grade, response_texts
from rlvr_lab.tasks import clusters as module
from rlvr_lab.tasks import countdown, math_answer
from rlvr_lab.tasks.base import Verdict
from rlvr_lab.tasks.clusters import ByEmbedding, ByEntailment, ByRule, cluster_ids, greedy, make_clusterer
from rlvr_lab.tasks.jsonl import MathProblem
from rlvr_lab.tasks.registry import CountdownTask, MathTask


def test_expressions_of_one_value_are_one_answer_unless_compared_by_form():
    answers = ["((10+1)*4)", "(4*(1+10))", "(50-6)", "(10+1)"]
    assert ByRule("mathematics")(answers) == [0, 0, 0, 1]
    assert ByRule("exact")(answers) == [0, 1, 2, 3]


def test_mathematics_is_compared_as_the_verifier_does():
    answers = ["1/2", "0.5", "x+1", "1+x", "\\frac{\\sqrt{4}}{4}", "east", "seat"]
    assert ByRule()(answers) == [0, 0, 1, 1, 0, 2, 3]


def test_missing_and_copied_answers_belong_to_no_cluster():
    question = "What is the capital of France, a country in Europe?"
    answers = ["Paris", None, "the capital of France", "Paris", ""]
    assert cluster_ids(answers, ByRule("exact"), question, refuse_copies=True) == [0, -1, -2, 0, -1]
    assert cluster_ids(answers, ByRule("exact"), question) == [0, -1, 1, 0, -1]
    assert cluster_ids([None, None], ByRule()) == [-1, -1]


@pytest.mark.parametrize(
    ("answer", "copies"),
    [
        ("a country in Europe", True),
        ("what is the capital of a country", True),  # 6 of 7 words in order
        ("Paris is the capital of the country", False),
        ("!!!", False),
    ],
)
def test_copies_of_the_question(answer, copies):
    assert module.copies_question(answer, "What is the capital of France, a country in Europe?") is copies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9))
def test_where_the_relation_is_an_equivalence_order_and_reassigning_do_not_matter(values):
    same = lambda i, j: values[i] == values[j]  # noqa: E731
    numbers = greedy(len(values), same)
    assert numbers == cluster(values)
    taken = greedy(len(values), same, reassign=True)
    assert [numbers.index(n) for n in numbers] == [taken.index(n) for n in taken]


def test_a_later_representative_takes_back_only_in_the_released_code():
    related = {(0, 2), (1, 2)}  # 0 and 1 are different, 2 is like both
    assert greedy(3, lambda i, j: (i, j) in related) == [0, 1, 0]
    assert greedy(3, lambda i, j: (i, j) in related, reassign=True) == [0, 1, 1]


def test_a_hostile_answer_costs_its_time_limit_twice_and_no_one_else_pays(monkeypatch):
    stopped = []

    def grade(response, reference, *, limits):
        second = response.removeprefix("\\boxed{").removesuffix("}")
        if "slow" in (second, reference):
            stopped.append((reference, second))
            time.sleep(limits.seconds)
            return Verdict(False, None, "late", refused=True)
        return Verdict(second.lower() == reference.lower(), None, "")

    monkeypatch.setattr(math_answer, "grade", grade)
    clusterer = ByRule(limits=math_answer.Limits(seconds=0.02))
    assert clusterer(["slow", "x", "y", "X", "z", "slow", "Y", "w"]) == [0, 1, 2, 1, 3, 0, 2, 4]
    assert stopped == [("slow", "x"), ("slow", "y")]
    stopped.clear()
    assert clusterer(["x", "y", "z", "slow", "slow", "Z"]) == [0, 1, 2, 3, 3, 2]
    assert len(stopped) == 2


HOSTILE = [
    "9**9**9**9",
    "\\frac{" * 200,
    "x" * 100_000,
    "(" * 5_000,
    "\\sqrt[99]{" + "9" * 400 + "}",
    "\u0661\u0662",
    "\x00",
]


def test_hostile_answers_are_clustered_in_bounded_time():
    started = time.monotonic()
    numbers = ByRule(limits=math_answer.Limits(seconds=0.5))(HOSTILE + HOSTILE)
    assert numbers[: len(HOSTILE)] == numbers[len(HOSTILE) :]
    assert time.monotonic() - started < 20


# -------------------------------------------------------------------------------------------------- by a model


def unit(*angles):
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_embeddings_above_the_threshold_share_a_cluster():
    place = {"a": 0.0, "b": 0.3, "c": 1.5}
    clusterer = ByEmbedding("", threshold=0.9, encode=lambda texts: unit(*(place[t] for t in texts)))
    assert clusterer(["a", "c", "b", "a"], "?") == [0, 1, 0, 0]
    assert clusterer([], "?") == []


def test_entailment_is_asked_both_ways_or_one():
    holds = {("Q? a", "Q? b"), ("Q? b", "Q? a"), ("Q? a", "Q? c")}
    entails = lambda pairs: [pair in holds for pair in pairs]  # noqa: E731
    assert ByEntailment("", entails=entails)(["a", "b", "c", "a"], "Q?") == [0, 0, 1, 0]
    assert ByEntailment("", both_ways=False, entails=entails)(["a", "b", "c"], "Q?") == [0, 0, 0]
    assert ByEntailment("", entails=entails)(["a"], "Q?") == [0]


def test_a_missing_library_or_model_is_one_line(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", absent)
    for by in ("embedding", "entailment"):
        with pytest.raises(UserError, match=f"data.clusters.by={by} needs data.clusters.model"):
            make_clusterer(by)
        with pytest.raises(UserError, match=r"needs sentence-transformers: pip install 'rlvr-lab\[semantics\]'"):
            make_clusterer(by, "some/model")


# ------------------------------------------------------------------------------------------------ of a rollout


def test_clusters_of_a_rollout_are_those_of_its_groups_in_any_order(tiny_s):
    problems, task = countdown.problems(4, 0), CountdownTask()
    rollout = grade(sampled_rollout(tiny_s, max_tokens=32), task, problems, tiny_s)
    rollout = rollout.with_(response_mask=rollout.response_mask | True, action_mask=rollout.action_mask | True)
    found = with_clusters(rollout, task, problems, tiny_s, ByRule()).cluster_id
    texts = response_texts(rollout, tiny_s)
    answers = [task.read(t, f) for t, f in zip(texts, rollout.finished.tolist(), strict=True)]
    assert [c < 0 for c in found.tolist()] == [a is None for a in answers]
    for i in range(len(found)):
        for j in range(i):
            if rollout.group_id[i] == rollout.group_id[j] and found[i] >= 0 and found[j] >= 0:
                same = module.mathematically_equal(answers[i], answers[j])
                assert (found[i] == found[j]) == same
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(2))
    assert torch.equal(with_clusters(rollout.rows(order), task, problems, tiny_s, ByRule()).cluster_id, found[order])


def test_references_of_mathematics_are_not_read(tiny_s, monkeypatch):
    texts = ["so \\boxed{\\frac{1}{2}}", "the answer is 0.5", "\\boxed{2}", "none"]
    monkeypatch.setattr("rlvr_lab.rollout.clusters.response_texts", lambda rollout, policy: texts)
    rollout = sampled_rollout(tiny_s, prompts=1).with_(finished=torch.ones(4, dtype=torch.bool))
    found = []
    for answer in ("1/2", "2", "nonsense"):
        problems = [MathProblem("What?", answer, 1, "q")]
        found.append(with_clusters(rollout, MathTask(), problems, tiny_s, ByRule()).cluster_id.tolist())
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][1] != found[0][2]
    assert found[0][3] == -1
