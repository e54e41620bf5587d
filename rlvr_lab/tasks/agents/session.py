"""An environment as an object that is reset and stepped: the shape that other trainers and tools expect.

`reset` gives an observation, `step` an observation, a reward, whether it is over, and a dictionary: as in OpenEnv and
Gymnasium. `messages` is the episode as a conversation, as `verifiers` keeps it. Nothing of those packages is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..base import Verdict
from .base import Environment, Turn, advance


class MakesProblems(Environment[Any], Protocol):
    """An environment that makes its problems, as those of this package do."""

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[Any]:
        """At most `count` problems of `seed`."""


@dataclass(frozen=True)
class StepResult:
    """What one action led to.

    `reward` is 0 until the episode is over, then success (0 or 1) and all points of the verdict. `info` has `won`,
    `is_action_valid`, `admissible` (texts of all actions, None where they cannot be listed), `tool`, `turn` (actions so
    far), `answer` and `reason` of the verdict, None before the end.
    """

    observation: str
    reward: float
    done: bool
    info: dict[str, Any] = field(default_factory=dict)


class Session:
    """One episode at a time of an environment that makes its own problems; `evaluation` takes held-out ones."""

    def __init__(self, environment: MakesProblems, *, evaluation: bool = False) -> None:
        self.environment, self.evaluation = environment, evaluation
        self.problem: Any = None
        self.state: Any = None
        self.actions: list[str] = []
        self.messages: list[dict[str, str]] = []
        self.done = True

    def reset(self, task_id: int = 0, seed: int = 0) -> str:
        """Begin problem number `task_id` of those that `seed` makes; returns the prompt.

        Raises ValueError where there are not so many.
        """
        made = self.environment.problems(task_id + 1, seed, self.evaluation)
        if not 0 <= task_id < len(made):
            raise ValueError(f"{self.environment.name} has no problem number {task_id}")
        self.problem = made[task_id]
        self.state = self.environment.reset(self.problem)
        self.actions, self.done = [], False
        self.messages = [{"role": "user", "content": self.problem.prompt}]
        return str(self.problem.prompt)

    def step(self, text: str) -> StepResult:
        """Take one action. Raises ValueError where no episode is under way."""
        if self.done:
            raise ValueError("the episode is over, or none has begun; call reset")
        turn = advance(self.environment, self.problem, self.state, text, len(self.actions))
        self.actions.append(text)
        self.state, self.done = turn.state, turn.done
        self.messages.append({"role": "assistant", "content": text})
        if turn.observation:
            self.messages.append({"role": "user", "content": turn.observation})
        verdict = self.environment.verdict(self.problem, self.actions, True) if turn.done else None
        reward = float(verdict.correct) + sum(verdict.points.values()) if verdict else 0.0
        return StepResult(turn.observation, reward, turn.done, self._info(turn, verdict))

    def _info(self, turn: Turn, verdict: Verdict | None) -> dict[str, Any]:
        admissible = getattr(self.environment, "admissible", None)
        return {
            "won": bool(verdict and verdict.correct),
            "is_action_valid": turn.valid,
            "admissible": admissible(self.problem, self.state) if admissible else None,
            "tool": turn.tool,
            "turn": len(self.actions),
            "answer": verdict.answer if verdict else None,
            "reason": verdict.reason if verdict else None,
        }
