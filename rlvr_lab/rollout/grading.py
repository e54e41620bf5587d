"""Verdicts on sampled responses: the only place where a rollout meets a task's verifier."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..core.rollout import Rollout
from ..policy.load import Policy
from ..tasks.agents.base import Environment
from ..tasks.base import Task, Verdict
from .episodes import actions_of


def response_texts(rollout: Rollout, policy: Policy) -> list[str]:
    """Each response as text, special tokens kept."""
    rows = zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)
    return [policy.decode(ids[:length]) for ids, length in rows]


def grade(
    rollout: Rollout,
    task: Task[Any],
    problems: Sequence[Any],
    policy: Policy,
    verdicts: Sequence[Verdict] | None = None,
) -> Rollout:
    """Fill `correct`, `answer` and the reward components: `correct` (0 or 1) and the verdicts' points by name.

    An environment is given the texts of the turns; it judges what the policy did, not what it wrote about results.
    `prompt_id` indexes `problems`; `verdicts` are those of `verdicts_of`, where they are known already. A point that a
    verdict does not name is 0 for that response. Raises ValueError for a point that is named like another component,
    or that a task with `point_names` did not declare.
    """
    verdicts = verdicts_of(rollout, task, problems, policy) if verdicts is None else verdicts
    correct = torch.tensor([v.correct for v in verdicts], device=rollout.response_ids.device)
    components = {**rollout.reward_components, "correct": correct.float()}
    for name in _point_names(task, verdicts, components):
        components[name] = torch.tensor([float(v.points.get(name, 0.0)) for v in verdicts], device=correct.device)
    answers = tuple(v.answer for v in verdicts)
    return rollout.with_(correct=correct, answer=answers, reward_components=components)


def verdicts_of(rollout: Rollout, task: Any, problems: Sequence[Any], policy: Policy) -> list[Verdict]:
    """The task's verdict on every response; an environment is given the texts of the turns."""
    ends = list(zip(rollout.prompt_id.tolist(), rollout.finished.tolist(), strict=True))
    if isinstance(task, Environment):
        return [
            task.verdict(problems[i], actions_of(rollout, row, policy), finished)
            for row, (i, finished) in enumerate(ends)
        ]
    texts = response_texts(rollout, policy)
    return [task.grade(problems[i], text, finished) for (i, finished), text in zip(ends, texts, strict=True)]


def _point_names(task: Task[Any], verdicts: Sequence[Verdict], taken: Collection[str]) -> list[str]:
    """Declared names where the task declares them: all batches must agree, whatever their responses earned."""
    found = {name for verdict in verdicts for name in verdict.points}
    declared = set(getattr(task, "point_names", found))
    if found - declared:
        raise ValueError(f"task '{task.name}' gives points that it does not declare: {sorted(found - declared)}")
    if clash := declared & set(taken):
        raise ValueError(f"task '{task.name}' names points like other reward components: {sorted(clash)}")
    return sorted(declared)
