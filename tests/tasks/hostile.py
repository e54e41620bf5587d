"""Responses that nobody should have to grade, and every verifier with a problem to grade them against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from rlvr_lab.tasks import ifeval, instructions, multiple_choice, reasoning
from rlvr_lab.tasks.base import Outcome, Task, Verdict
from rlvr_lab.tasks.benchmarks import BenchmarkProblem, BenchmarkTask
from rlvr_lab.tasks.countdown import Problem
from rlvr_lab.tasks.jsonl import MathProblem
from rlvr_lab.tasks.math_answer import Limits
from rlvr_lab.tasks.registry import CountdownTask, MathTask, task

PIECES = (
    "\\boxed{", "}", "{", "\\{", "\\}", "####", "#### ", "The answer is ", "answer:", "**", "$", "\\(", "\\)", "\\[",
    "\\frac{", "\\frac12", "\\sqrt[", "\\sqrt{", "^", "^{", "**", "9**9**9**9", "9^{9^{9^9}}", "!",
    "\\binom{", "\\int", "\\left(",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\text{", "\\pm", "\\infty", "\\cup", "1e999999999", "1e9", "1,234", "0.5",
    "-", "+", "*", "/", "=", "<", ">", "(", ")", "[", "]", ",", ";", ".", "%", "\\%", "x", "pi", "5", "18", "44",
    "(B)", "C.", "A or B", "red dog", " ", "\n", "\t", "\x00", "\u200b", "\u202e", "\ud800", "５", "٥", "五", "ب",
    "e\u0301", "🙂", "ﷺ", "½", "</think>", "<think>", "<eos>", "( 10 + 1 ) * 4", "1 2 3", "1 - 2", "<answer>",
    "</answer>", "{\"a\":", "[[", "<<", "* ", "P.S.", "__import__('os')", "().__class__", "${jndi:x}", "%s%n",
    "'; DROP TABLE", "\\input{/etc/passwd}",
)  # fmt: skip
_piece = st.sampled_from(PIECES)
_repeated = st.tuples(_piece, st.sampled_from((2, 13, 500, 20_000))).map(lambda pair: pair[0] * pair[1])
RESPONSES = st.lists(st.one_of(_piece, _piece, _piece, st.text(max_size=12), _repeated), max_size=12).map("".join)
"""Text made of what graders look for, of other scripts, of nothing, and of up to a megabyte of one thing."""


@dataclass(frozen=True)
class Graded:
    """A verifier under test, a problem, and how long one answer may take by its own limit."""

    task: Task[Any]
    problem: Any
    seconds: float = 0.0


def _math(answer: str, seconds: float = 0.0) -> Graded:
    task = MathTask(limits=Limits(seconds=seconds)) if seconds else MathTask()
    return Graded(task, MathProblem("q", answer, 1, "p"), 2 * seconds)


def _ifeval() -> Graded:
    rules = tuple((name, arguments) for name, arguments in IFEVAL_RULES)
    return Graded(ifeval.IFEvalTask(), ifeval.IFEvalProblem("q", rules, 1, "p"))


IFEVAL_RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("punctuation:no_comma", {}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}),
    ("detectable_format:json_format", {}),
    ("keywords:existence", {"keywords": ["red"]}),
)

VERIFIERS: dict[str, Callable[[], Graded]] = {
    "math, a number": lambda: _math("5"),
    "math, algebra": lambda: _math("x+1", 0.5),
    "gsm8k": lambda: _math("He has <<9*2=18>>18.\n#### 18"),
    "minerva": lambda: Graded(BenchmarkTask(grader="minerva"), BenchmarkProblem("q", "4.5e33", 1, "p")),
    "olympiadbench": lambda: Graded(
        BenchmarkTask(grader="olympiad"), BenchmarkProblem("q", "1,2", 1, "p", multiple=True, tolerances=(0.1,)), 6.0
    ),
    "multiple choice": lambda: Graded(
        multiple_choice.MultipleChoiceTask(), multiple_choice.Choice("q", ("2", "4", "red dog"), 2, 1, "p")
    ),
    "countdown": lambda: Graded(CountdownTask(), Problem((10, 1, 4), 44)),
    "countdown, at least": lambda: Graded(CountdownTask("at_least"), Problem((10, 1, 4), 44)),
    "instructions": lambda: Graded(instructions.InstructionsTask(), instructions.problems(1, 0)[0]),
    "ifeval": _ifeval,
    "triples": lambda: Graded(task("triples"), task("triples").problems(1, 0)[0]),  # type: ignore[attr-defined]
    "maze": lambda: Graded(task("maze"), task("maze").problems(1, 0)[0]),  # type: ignore[attr-defined]
    "feedback": lambda: Graded(task("feedback"), task("feedback").problems(1, 0)[0]),  # type: ignore[attr-defined]
}
if importlib.util.find_spec("reasoning_gym"):
    _GYM = reasoning.ReasoningTask("countdown", limits=reasoning.Limits(seconds=0.5))
    VERIFIERS["reasoning_gym"] = lambda: Graded(_GYM, _GYM.problems(1, 0)[0], 0.5)


def broken_promise(graded: Graded, response: str, finished: bool) -> str | None:
    """What a verifier did that it must not do with this response, or `None`."""
    verdict = graded.task.grade(graded.problem, response, finished)
    if not isinstance(verdict, Verdict) or verdict.outcome not in Outcome:
        return f"not a typed verdict: {verdict!r}"
    if not verdict.reason:
        return "no reason"
    if verdict.correct and verdict.answer is None:
        return "correct without an answer"
    if verdict.correct and not finished:
        return "correct although cut off"
    if verdict.answer is not None and len(verdict.answer) > 100_000:
        return f"an answer of {len(verdict.answer)} characters"
    read = graded.task.read(response, finished)
    return None if read is None or isinstance(read, str) else f"read {read!r}"
