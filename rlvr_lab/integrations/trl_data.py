"""Our tasks as TRL wants them: a dataset of prompts, and a reward function. Needs no TRL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..policy.load import Policy
from ..tasks.base import Task
from ..train.config import TrainConfig
from ..train.data import Problems, load_problems
from .exchange import refuse_turns


class TaskReward:
    """1 for a correct response, else 0. Called `correct`, so that methods which need that field find it.

    `answers` holds the canonical answers of the last call, for answer entropies.
    """

    __name__ = "correct"

    def __init__(self, task: Task[Any], problems: Sequence[Any], policy: Policy) -> None:
        self.task, self.problems, self.policy = task, problems, policy
        self.answers: list[str | None] | None = None
        self.points: list[float] = []

    def __call__(self, completion_ids: Sequence[list[int]], problem_id: Sequence[int], **_: Any) -> list[float]:
        """Grade responses by their token ids, special tokens kept; a response without end token was cut."""
        ended = [bool(ids) and ids[-1] in self.policy.eos_ids for ids in completion_ids]
        verdicts = [
            self.task.grade(self.problems[i], self.policy.decode(list(ids)), finished)
            for i, ids, finished in zip(problem_id, completion_ids, ended, strict=True)
        ]
        self.answers = [v.answer for v in verdicts]
        self.points = [float(sum(v.points.values())) for v in verdicts]
        return [float(v.correct) for v in verdicts]


class TaskPoints:
    """Sum of the partial credits of the verdicts that `correct` has just made; TRL calls its rewards in their order."""

    __name__ = "points"

    def __init__(self, correct: TaskReward) -> None:
        self.correct = correct

    def __call__(self, completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        """Raises ValueError where `correct` was not asked for the same responses before."""
        if len(self.correct.points) != len(completion_ids):
            raise ValueError("the reward 'points' must stand after 'correct', whose verdicts it reads")
        return list(self.correct.points)


def training_data(config: TrainConfig, policy: Policy) -> tuple[Any, list[TaskReward | TaskPoints]]:
    """The recipe's problems as a dataset with the columns `prompt` (token ids) and `problem_id`, and their rewards:
    `correct`, and `points` where the task gives partial credits.

    Raises UserError as `load_problems` does, and for an environment.
    """
    from datasets import Dataset

    refuse_turns(config.data.task, "TRL")
    problems: Problems = load_problems(config, policy, print)
    columns = {"prompt": problems.prompts, "problem_id": list(range(len(problems.train)))}
    correct = TaskReward(problems.task, problems.train, policy)
    points = [TaskPoints(correct)] if getattr(problems.task, "point_names", ()) else []
    return Dataset.from_dict(columns), [correct, *points]


def split_rows(rows: int, most: int, processes: int | None = None) -> tuple[int, int]:
    """Rows per forward pass of one process, at most `most`, and passes per optimizer step of `rows` responses.

    `processes` is by default what torchrun or accelerate started. Raises UserError where they cannot share equally.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    share, left = divmod(rows, size)
    if left or not share:
        raise UserError(f"{rows} responses of an optimizer step do not divide over {size} processes; start fewer")
    micro = max(n for n in range(1, min(share, most) + 1) if share % n == 0)
    return micro, share // micro
