"""Any data set of the library reasoning-gym by name (arXiv 2505.24760), graded by the library in a child process.

The library makes the problems and judges the answers. Some of its judges run `eval` or sympy's `parse_expr` on the
answer, so none of them sees one in this process: `reasoning_child.py` does all that work, with `eval` replaced by one
that computes literals and arithmetic only, under a deadline and a memory limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import UserError, nearest
from . import child_process, math_answer
from .base import Verdict
from .child_process import STOPPED, ChildProcess
from .registry import UNFINISHED, encode_prompt

TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer between <answer> and </answer>."
INSTALL = "pip install 'rlvr-lab[reasoning]'"
_CHILD = Path(__file__).with_name("reasoning_child.py")
MADE_AT_ONCE, MAKING_SECONDS = 100, 120.0
SEARCHED_PER_PROBLEM = 30
"""Items looked at for each wanted problem: one in ten is for evaluation, and small data sets repeat themselves."""


@dataclass(frozen=True)
class Limits:
    """Bounds: characters searched and in an answer, seconds and megabytes of one judgement."""

    response_characters: int = 20_000
    answer_characters: int = 4_000
    seconds: float = 3.0
    megabytes: int = 3072


@dataclass(frozen=True)
class ReasoningProblem:
    """Item `index` of the data set of `size` for `seed`, and the library's own answer (empty where it gives none)."""

    question: str
    answer: str
    seed: int
    size: int
    index: int

    def __str__(self) -> str:
        return f"{self.question} -> {self.answer}"


class JudgeProcess(ChildProcess):
    """The child that runs the library's judges."""

    library, install = "reasoning-gym", INSTALL

    def script(self) -> Path:
        return _CHILD


@dataclass(frozen=True)
class ReasoningTask:
    """A data set of reasoning-gym. `config`: its settings, as the library names them.

    Correct means the library's score is 1. Raises UserError for a template without `{question}`; `problems` raises it
    for an unknown data set or setting and where the library is missing.
    """

    dataset: str = "chain_sum"
    config: dict[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    limits: Limits = field(default_factory=Limits)
    name: str = "reasoning_gym"

    def __post_init__(self) -> None:
        if self.template.count("{question}") != 1:
            raise UserError(f"data.template must hold {{question}} exactly once: {self.template[:80]!r}")
        if {"seed", "size"} & set(self.config):
            raise UserError("data.settings.config cannot set seed and size; they follow from seed and data.pool")

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[ReasoningProblem]:
        """At most `count` distinct problems; a hash of the question keeps a tenth of all questions for evaluation."""
        found: dict[str, ReasoningProblem] = {}
        size = count * SEARCHED_PER_PROBLEM
        for start in range(0, size, MADE_AT_ONCE):
            made = self._made(seed, size, start, min(start + MADE_AT_ONCE, size))
            for index, (question, answer) in enumerate(made, start):
                if held_out(question) == evaluation:
                    found.setdefault(question, ReasoningProblem(question, answer, seed, size, index))
            if len(found) >= count:
                break
        if not found:
            raise UserError(f"reasoning_gym data set '{self.dataset}' gave no problem for this side of the split")
        return list(found.values())[:count]

    def _made(self, seed: int, size: int, start: int, stop: int) -> list[list[str]]:
        reply = self._asked(seed, size, {"start": start, "stop": stop}, MAKING_SECONDS)
        if known := reply.get("known"):
            hint = nearest(self.dataset, [str(name) for name in cast(list[object], known)])
            raise UserError(f"data.settings.dataset '{self.dataset}' is not in reasoning_gym; {hint}")
        if error := reply.get("error"):
            settings = json.dumps(self.config, default=str)
            raise UserError(f"data.settings.config {settings} of '{self.dataset}': {error}")
        return cast(list[list[str]], reply["items"])

    def _asked(self, seed: int, size: int, what: Mapping[str, object], seconds: float) -> dict[str, object]:
        source = {"dataset": self.dataset, "config": self.config, "seed": seed, "size": size}
        return child_process.shared(JudgeProcess, self.limits.megabytes).ask({**source, **what}, seconds)

    def prompt_ids(self, problem: ReasoningProblem, tokenizer: Any) -> list[int]:
        before, after = self.template.split("{question}")
        return encode_prompt(before + problem.question + after, tokenizer)

    def grade(self, problem: ReasoningProblem, response_text: str, finished: bool) -> Verdict:
        if not finished:
            return UNFINISHED
        answer, reason = extract(response_text, self.limits)
        if answer is None:
            return Verdict(False, None, reason, refused=reason.startswith("answer longer"))
        form = " ".join(answer.split())
        if problem.answer and answer == problem.answer:
            return Verdict(True, form, "correct")
        return self._judged(problem, answer, form)

    def _judged(self, problem: ReasoningProblem, answer: str, form: str) -> Verdict:
        what = {"index": problem.index, "answer": answer}
        reply = self._asked(problem.seed, problem.size, what, self.limits.seconds)
        if error := str(reply.get("error", "")):
            return Verdict(False, form, error, refused=error.startswith((*STOPPED, "refused")))
        score = float(str(reply["score"]))
        return Verdict(score >= 1, form, "correct" if score >= 1 else f"scored {score:g} of 1")

    def read(self, response_text: str, finished: bool) -> str | None:
        answer = extract(response_text, self.limits)[0] if finished else None
        return None if answer is None else " ".join(answer.split())


def extract(response: str, limits: Limits) -> tuple[str | None, str]:
    r"""What stands between the last `<answer>` and `</answer>`, else in the last `\boxed{}`; or `None` and why."""
    tail = response[-limits.response_characters :]
    start = tail.rfind("<answer>")
    if start >= 0:
        end = tail.find("</answer>", start)
        answer = tail[start + len("<answer>") : end].strip() if end >= 0 else None
        if answer is None:
            return None, "<answer> is not closed"
    elif "\\boxed{" in tail:
        bounds = math_answer.Limits(answer_characters=limits.answer_characters)
        answer, reason = math_answer.extract(tail, bounds)
        if answer is None:
            return None, "answer longer than the limit" if reason.startswith("more than") else reason
    else:
        return None, "no <answer>"
    if len(answer) > limits.answer_characters:
        return None, f"answer longer than {limits.answer_characters} characters"
    return (answer, "") if answer else (None, "empty answer")


def held_out(question: str) -> bool:
    """True for the tenth of all questions that no training ever sees."""
    return hashlib.sha256(question.encode(errors="surrogatepass")).digest()[0] % 10 == 0
