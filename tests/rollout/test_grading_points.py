"""Partial credits become reward components."""

from __future__ import annotations

import pytest

from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.grading import grade
from rlvr_lab.tasks.base import Verdict
from rlvr_lab.tasks.registry import CountdownTask
from tests.rollout.test_grading import PROBLEMS, written


class Generous(CountdownTask):
    """Points for what a response earns: `tried` always, `near` for a wrong answer that can be read."""

    def grade(self, problem: object, response_text: str, finished: bool) -> Verdict:
        verdict = super().grade(problem, response_text, finished)  # type: ignore[arg-type]
        points = {"tried": 0.1} if verdict.correct or verdict.answer is None else {"tried": 0.1, "near": 0.5}
        return Verdict(verdict.correct, verdict.answer, verdict.reason, points=points)


class Declared(Generous):
    point_names = ("near", "rare", "tried")


class TooFew(Generous):
    point_names = ("near",)


class Clashing(Generous):
    point_names = ("correct", "near", "tried")


def test_a_point_is_a_component_and_zero_where_it_is_missing(tiny_s: Policy) -> None:
    graded = grade(written(tiny_s), Generous(), PROBLEMS, tiny_s)
    assert set(graded.reward_components) == {"correct", "near", "tried"}
    assert graded.reward_components["near"].tolist() == [0, 0, 0.5, 0, 0, 0]
    assert graded.reward_components["tried"].unique().tolist() == pytest.approx([0.1])


def test_declared_points_are_there_even_if_nobody_earns_them(tiny_s: Policy) -> None:
    graded = grade(written(tiny_s), Declared(), PROBLEMS, tiny_s)
    assert graded.reward_components["rare"].tolist() == [0.0] * 6


def test_points_that_are_not_declared_or_clash_are_named(tiny_s: Policy) -> None:
    with pytest.raises(ValueError, match=r"points that it does not declare: \['tried'\]"):
        grade(written(tiny_s), TooFew(), PROBLEMS, tiny_s)
    with pytest.raises(ValueError, match=r"like other reward components: \['correct'\]"):
        grade(written(tiny_s), Clashing(), PROBLEMS, tiny_s)
