"""How fast verifiers grade, what a hostile answer costs, how many inputs they survive, and where they are wrong.

    python benchmarks/verifiers.py

Throughput counts short answers, no two alike, so that no cache helps, one process and one thread. A hostile answer is
timed by the clock against the verifier's own limit. Real answers are those of RLVR_LAB_DATA (`../shared/data`): each
against itself in many written forms (false negatives), and against other answers of its file (false positives).
Results go to `benchmarks/results/verifiers.json`, and those of real answers to `book/data/verifiers.json` too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import module_digests

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "verifiers.json"
BOOK = ROOT / "book" / "data" / "verifiers.json"
MODULES = ("tasks.math_answer", "tasks.sympy_child")
DATA = Path(os.environ.get("RLVR_LAB_DATA", ROOT.parent / "shared" / "data"))
HOSTILE = {
    "9**9**9**9": "9**9**9**9",
    "a tower in LaTeX": "9^{9^{9^{9}}}",
    "a factorial": "99999999!",
    "a power of a sum": "(x+y+z+w)^{9999}",
    "an integral": "\\int_0^\\infty e^{-x^2}dx",
    "200 brackets deep": "(" * 200 + "5" + ")" * 200,
    "100,000 open braces": "{" * 100_000,
    "a megabyte of digits": "1" * 1_000_000,
    "a sum of 5,000 terms": "1+" * 5_000 + "1",
    "code": "__import__('os').system('true')",
    "another script": "٤٢ + 五",
    "no answer": "",
}


def short_answers() -> dict[str, tuple[Any, Callable[[int], Any], Callable[[int], str]]]:
    """Verifier -> task, problem number i, response number i."""
    from rlvr_lab.tasks.countdown import problems
    from rlvr_lab.tasks.instructions import InstructionsTask
    from rlvr_lab.tasks.instructions import problems as rows
    from rlvr_lab.tasks.jsonl import MathProblem
    from rlvr_lab.tasks.multiple_choice import Choice, MultipleChoiceTask
    from rlvr_lab.tasks.registry import CountdownTask, MathTask

    numbers, rules = problems(2000, 0), rows(200, 0)
    choice = Choice("q", ("two", "four", "red dog"), 2, 1, "p")
    return {
        "math": (MathTask(), lambda i: MathProblem("q", str(i), 1, "p"), lambda i: f"so it is \\boxed{{{i + i % 2}}}."),
        "math, fractions": (
            MathTask(), lambda i: MathProblem("q", f"{i}/7", 1, "p"), lambda i: f"\\boxed{{\\frac{{{i}}}{{7}}}}"
        ),
        "gsm8k": (MathTask(), lambda i: MathProblem("q", f"{i}", 1, "p"), lambda i: f"He has <<{i}=1>> so\n#### {i}"),
        "multiple_choice": (MultipleChoiceTask(), lambda i: choice, lambda i: f"{i}, hence the answer is (C) red dog."),
        "countdown": (
            CountdownTask(), lambda i: numbers[i % len(numbers)], lambda i: f"</think> ( {i} + 1 ) * 4 <eos>"
        ),
        "instructions": (
            InstructionsTask(), lambda i: rules[i % len(rules)], lambda i: "</think> " + " ".join(str(i)) + " <eos>"
        ),
    }  # fmt: skip


def throughput(count: int) -> dict[str, float]:
    """Answers per second, by processor time and thus per core."""
    found = {}
    for name, (task, problem, response) in short_answers().items():
        pairs = [(problem(i), response(i)) for i in range(100_000, 100_000 + count)]
        start = time.process_time()
        for asked, text in pairs:
            task.grade(asked, text, True)
        found[name] = round(count / (time.process_time() - start))
        print(f"{name}: {found[name]} answers per second and core", flush=True)
    return found


def algebra(count: int) -> float:
    """Answers per second of the clock where math-verify has to be asked, in its child process."""
    from rlvr_lab.tasks.math_answer import grade

    grade("\\boxed{x+1}", "1+x")  # starts the child
    start = time.perf_counter()
    for i in range(count):
        assert grade(f"\\boxed{{x+{i}}}", f"{i}+x").correct
    return round(count / (time.perf_counter() - start), 1)


def hostile() -> dict[str, Any]:
    """Seconds, outcome and reason of each hostile answer for each verifier, with the verifier's limit."""
    sys.path.insert(0, str(ROOT))
    from tests.tasks.hostile import VERIFIERS

    found: dict[str, Any] = {}
    for name, make in VERIFIERS.items():
        graded = make()
        rows = found[name] = {}
        for i in range(3):  # a child that has to start, or start again on a loaded machine, is not the answer's fault
            graded.task.grade(graded.problem, _written(name, f"x+{i + 7}"), True)
        for title, answer in HOSTILE.items():
            start = time.perf_counter()
            verdict = graded.task.grade(graded.problem, _written(name, answer), True)
            seconds = round(time.perf_counter() - start, 4)
            rows[title] = {"seconds": seconds, "outcome": str(verdict.outcome), "reason": verdict.reason[:80]}
        slowest = max(rows, key=lambda title: rows[title]["seconds"])
        print(f"{name}: slowest is '{slowest}', {rows[slowest]}", flush=True)
    return found


def _written(name: str, answer: str) -> str:
    if name.startswith(("countdown", "instructions")):
        return f"</think> {answer} <eos>"
    return f"<answer>{answer}</answer>" if name == "reasoning_gym" else f"\\boxed{{{answer}}}"


def fuzzed(examples: int) -> dict[str, Any]:
    """Different inputs that each verifier was given by hypothesis, and how many broke a promise."""
    from tests.tasks.hostile import VERIFIERS

    found: dict[str, Any] = {}
    for name, make in VERIFIERS.items():
        few = name in ("math, algebra", "olympiadbench", "reasoning_gym")
        found[name] = _fuzzed(make(), examples // 10 if few else examples)
        print(f"{name}: {found[name]}", flush=True)
    return found


def _fuzzed(graded: Any, examples: int) -> dict[str, float]:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    from tests.tasks.hostile import RESPONSES, broken_promise

    tried: set[int] = set()
    broken: list[str] = []

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(RESPONSES, st.booleans())
    def fuzz(response: str, finished: bool) -> None:
        tried.add(hash(response))
        if problem := broken_promise(graded, response, finished):
            broken.append(problem)

    start = time.perf_counter()
    fuzz()
    return {"inputs": len(tried), "broken": len(broken), "seconds": round(time.perf_counter() - start, 1)}


# -- real answers -----------------------------------------------------------------------------------------------------

FORMS = {
    "boxed": "Thus \\boxed{{{0}}}.",
    "hashes": "so\n#### {0}",
    "a sentence": "The answer is {0}.",
    "bold": "**Final Answer:** **{0}**",
    "dollars": "Hence $x = {0}$ and the answer is ${0}$.",
    "a unit": "\\boxed{{{0} \\text{{ apples}}}}",
    "a plain unit": "\\boxed{{{0} cm}}",
    "decimal": "\\boxed{{{0}.0}}",
    "thousands": "\\boxed{{{0:,}}}",
    "fraction": "\\boxed{{\\frac{{{1}}}{{2}}}}",
    "power of ten": "\\boxed{{{0} \\times 10^0}}",
    "the last number": "We get {0}",
    "a word between": "The answer, after all, is {0}",
    "in words after it": "The answer is {0}, since 3 + 4 = 7.",
    "spelled as an equation": "\\boxed{{x = {0}}}",
    "full width": "\\boxed{{{2}}}",
    "the answer first": "{0} is what she pays. That took 2 steps.",
}
_WIDE = str.maketrans("0123456789", "０１２３４５６７８９")


@dataclass(frozen=True)
class Loose:
    """Three graders in common use, for comparison: short, and each wrong in its own way."""

    @staticmethod
    def last_number(response: str, gold: str) -> bool:
        """The last run of digits equals the reference."""
        import re

        found = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", response)
        return bool(found) and found[-1].replace(",", "") == gold

    @staticmethod
    def contains(response: str, gold: str) -> bool:
        """The reference stands anywhere in the response."""
        return gold in response

    @staticmethod
    def exact_box(response: str, gold: str) -> bool:
        """What stands in the last box is the reference, character by character."""
        start = response.rfind("\\boxed{")
        return start >= 0 and response[start + 7 : response.find("}", start)].strip() == gold


def graders() -> dict[str, Callable[[str, str], bool]]:
    """Ours and the loose ones."""
    from rlvr_lab.tasks.math_answer import grade

    def ours(response: str, gold: str) -> bool:
        return grade(response, gold).correct

    return {
        "math": ours,
        "exact box": Loose.exact_box,
        "last number": Loose.last_number,
        "contains": Loose.contains,
    }


def real_answers() -> dict[str, Any] | None:
    """Share of right answers refused (by written form) and of wrong answers accepted, for each grader and file."""
    from rlvr_lab.tasks.jsonl import load_jsonl

    files = sorted(DATA.glob("*.jsonl"))
    if not files:
        return None
    found: dict[str, Any] = {}
    for path in files:
        golds = [problem.answer for problem in load_jsonl(path)]
        found[path.stem] = entry = {"answers": len(golds), "graders": {}}
        for name, judge in graders().items():
            entry["graders"][name] = {
                "refused": {form: _refused(judge, text, golds) for form, text in FORMS.items()},
                "accepted": {how: _share(judge(text, gold) for gold, text in _wrong(how, golds)) for how in WRONG},
            }
        ours = entry["graders"]["math"]
        print(path.stem, len(golds), ours, flush=True)
    return found


def _refused(judge: Callable[[str, str], bool], text: str, golds: list[str]) -> float:
    return _share(not judge(text.format(int(g), 2 * int(g), g.translate(_WIDE)), g) for g in golds)


WRONG = ("another", "one more", "beside the right one", "the right one taken back", "a digit longer", "off by 0.000004")


def _wrong(how: str, golds: list[str]) -> Iterator[tuple[str, str]]:
    """Each reference with a response that answers something else."""
    for i, gold in enumerate(golds):
        others = [g for g in golds[i + 1 :] + golds[:i] if g != gold]
        other, more = others[0], str(int(gold) + 1)
        yield (
            gold,
            {
                "another": f"\\boxed{{{other}}}",
                "one more": f"The answer is {more}.",
                "beside the right one": f"It is {gold} or {more}: \\boxed{{{gold}, {more}}}",
                "the right one taken back": f"First {gold}, but no: the answer is {more}.",
                "a digit longer": f"\\boxed{{{gold}1}}",
                "off by 0.000004": f"\\boxed{{{gold}.000004}}",
            }[how],
        )


def _share(values: Iterator[bool]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 5)


def main(
    count: Annotated[int, typer.Option(help="Short answers per verifier.")] = 10_000,
    examples: Annotated[int, typer.Option(help="Fuzzed inputs per verifier.")] = 1_000,
    out: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    book: Annotated[Path, typer.Option(help="File of the chapter's recorded data.")] = BOOK,
) -> None:
    """Measure all verifiers; see the head of this file."""
    from rlvr_lab.train.loop import machine

    sys.path.insert(0, str(ROOT))
    head = {"command": "python benchmarks/verifiers.py", "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    record: dict[str, Any] = dict(head)
    parts = {
        "real_answers": real_answers,
        "answers_per_second": lambda: throughput(count),
        "algebra_answers_per_second": lambda: algebra(200),
        "hostile": hostile,
        "fuzzed": lambda: fuzzed(examples),
    }
    for name, part in parts.items():
        record[name] = part()
        out.write_text(json.dumps(record, indent=1) + "\n")
        if name == "real_answers" and record[name] is not None:
            chapter = json.loads(book.read_text()) if book.exists() else {}
            chapter["real_answers"] = {**head, "digests": module_digests(MODULES), "files": record[name]}
            book.write_text(json.dumps(chapter, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    typer.run(main)
