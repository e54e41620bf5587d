"""The tasks by name: how each is made from settings, and where its problems come from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, nearest
from . import countdown, math_answer
from .base import Task, Verdict
from .jsonl import MathProblem, load_jsonl

MATH_TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
UNFINISHED = Verdict(False, None, "no end of text within the length limit")
"""A response that was cut off is wrong and has no answer: a number met half-way through the reasoning is not one."""


@dataclass(frozen=True)
class CountdownTask:
    """Countdown in its own 128-word vocabulary: the problem encodes itself, the tokenizer is not asked."""

    check: countdown.Check = "exact"
    """"at_least" is the verifier with a hole of `countdown.verify`."""
    name: str = "countdown"

    def prompt_ids(self, problem: countdown.Problem, tokenizer: Any = None) -> list[int]:
        return list(problem.prompt_ids)

    def grade(self, problem: countdown.Problem, response_text: str, finished: bool) -> Verdict:
        return countdown.verify(problem, response_text, finished, self.check)

    def read(self, response_text: str, finished: bool) -> str | None:
        return countdown.read(response_text, finished)

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[countdown.Problem]:
        """See `countdown.problems`."""
        return countdown.problems(count, seed, evaluation)


@dataclass(frozen=True)
class MathTask:
    """Questions in natural language, graded by mathematical equality with the reference.

    `template` holds `{question}` exactly once; no other braces are special, so `\\boxed{}` may stand in it. A response
    that was cut off is `UNFINISHED`.
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
        return encode_prompt(self.prompt(problem), tokenizer)

    def grade(self, problem: MathProblem, response_text: str, finished: bool) -> Verdict:
        if not finished:
            return UNFINISHED
        return math_answer.grade(response_text, problem.answer, limits=self.limits)

    def read(self, response_text: str, finished: bool) -> str | None:
        return math_answer.read(response_text, limits=self.limits) if finished else None

    def load(self, path: Path, *, report: Callable[[str], None], **reading: Any) -> list[MathProblem]:
        """See `jsonl.load_jsonl`."""
        return load_jsonl(path, report=report, note=report, **reading)


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """`text` as the user's turn of the tokenizer's chat template, or as it stands where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    # return_dict's default differs between transformers 4 and 5
    return list(tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False))


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A task's name, its class, and where its problems come from.

    A task with a file has `load(path, limit=, max_bad_lines=, report=) -> list`. Another makes its problems: its own
    `problems(count, seed, evaluation=False)`, or its module's, never gives one problem to training and evaluation. Its
    settings are the parameters of `cls`, all with defaults; `name` and `limits` are not for users.
    """

    name: str
    module: str
    cls: str
    file: str | None = None
    """What a line of its JSONL file holds; `None` where it makes its problems."""
    words: str | None = None
    """Module of the whole-word vocabulary that it is written in; None for text of any kind."""

    def vocabulary(self) -> frozenset[str]:
        """Its words; empty where it is written in no vocabulary of its own."""
        return frozenset(import_module(self.words, __package__).VOCABULARY if self.words else ())

    def load_class(self) -> Any:
        """The class, imported when it is first asked for."""
        return getattr(import_module(self.module, __package__), self.cls)

    def settings(self) -> list[str]:
        """Names of what `task` accepts as settings."""
        return [name for name in inspect.signature(self.load_class()).parameters if name not in ("name", "limits")]

    def problems(self, which: Task[Any], count: int, seed: int, evaluation: bool = False) -> list[Any]:
        """At most `count` distinct problems of `which`, a task of this entry that makes its own."""
        maker = which if hasattr(which, "problems") else import_module(self.module, __package__)
        return list(maker.problems(count, seed, evaluation=evaluation))


_TABLE = (
    Entry("countdown", ".registry", "CountdownTask", words=".countdown"),
    Entry("math", ".registry", "MathTask", "question and answer"),
    Entry("multiple_choice", ".multiple_choice", "MultipleChoiceTask", "question, choices and answer"),
    Entry("reasoning_gym", ".reasoning", "ReasoningTask"),
    Entry("instructions", ".instructions", "InstructionsTask", words=".countdown"),
    Entry("ifeval", ".ifeval", "IFEvalTask", "prompt, instruction_id_list and kwargs"),
    Entry("triples", ".agents.triples", "TriplesTask", words=".agents.words"),
    Entry("maze", ".agents.maze", "MazeTask", words=".agents.words"),
    Entry("feedback", ".agents.feedback", "FeedbackTask", words=".agents.words"),
)
TASKS: Mapping[str, Entry] = {entry.name: entry for entry in _TABLE}


def entry(name: str) -> Entry:
    """The entry called `name`. Raises UserError with the nearest name."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': {nearest(name, TASKS)}")
    return TASKS[name]


def task(name: str, settings: Mapping[str, Any] | None = None) -> Task[Any]:
    """The task called `name` with `settings` (`data.settings` of a run), by default its own.

    Raises UserError with the nearest name for an unknown task or setting, and for a value of the wrong type.
    """
    found, given = entry(name), dict(settings or {})
    known = found.settings() if given else []
    for key in given:
        if key not in known:
            hint = nearest(key, known) if known else "it has no settings"
            raise UserError(f"unknown setting data.settings.{key} of task '{name}': {hint}")
    try:
        made: Task[Any] = TypeAdapter(found.load_class()).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise cause from None  # the task's own check, which names the setting already
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"data.settings.{place}: {first['msg']} (got {first['input']!r})") from None
    return made
