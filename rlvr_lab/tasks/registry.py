"""The tasks by name: Countdown for two cores, mathematics for a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, nearest
from . import countdown, math_answer
from .base import Task, Verdict
from .jsonl import MathProblem

MATH_TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class CountdownTask:
    """Countdown in its own 128-word vocabulary: the problem encodes itself, the tokenizer is not asked."""

    name: str = "countdown"

    def prompt_ids(self, problem: countdown.Problem, tokenizer: Any = None) -> list[int]:
        return list(problem.prompt_ids)

    def grade(self, problem: countdown.Problem, response_text: str, finished: bool) -> Verdict:
        return countdown.verify(problem, response_text, finished)


@dataclass(frozen=True)
class MathTask:
    """Questions in natural language, graded by mathematical equality with the reference.

    `template` holds `{question}` exactly once; no other braces are special, so `\\boxed{}` may stand in it. A response
    that was cut off is wrong and has no answer: a number met half-way through the reasoning is not one.
    """

    template: str = MATH_TEMPLATE
    limits: math_answer.Limits = field(default_factory=math_answer.Limits)
    name: str = "math"

    def __post_init__(self) -> None:
        if self.template.count("{question}") != 1:
            raise UserError(f"task.template must hold {{question}} exactly once: {self.template[:80]!r}")

    def prompt(self, problem: MathProblem) -> str:
        before, after = self.template.split("{question}")
        return before + problem.question + after

    def prompt_ids(self, problem: MathProblem, tokenizer: Any) -> list[int]:
        text = self.prompt(problem)
        if not getattr(tokenizer, "chat_template", None):
            return list(tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        # return_dict's default differs between transformers 4 and 5
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        return list(ids)

    def grade(self, problem: MathProblem, response_text: str, finished: bool) -> Verdict:
        if not finished:
            return Verdict(False, None, "no end of text within the length limit")
        return math_answer.grade(response_text, problem.answer, limits=self.limits)


TASKS: dict[str, Callable[[], Task[Any]]] = {"countdown": CountdownTask, "math": MathTask}


def task(name: str) -> Task[Any]:
    """The task called `name` with its default settings. Raises UserError with the nearest name."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': {nearest(name, TASKS)}")
    return TASKS[name]()
