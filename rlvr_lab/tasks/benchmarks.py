r"""The mathematical benchmarks by name: where the problems lie, how they are read, asked and graded.

`BENCHMARKS` is the table. Hub names, splits and columns were read from the pages named in `seen`, stored copies of the
Hub's own pages (huggingface.co) or of public code that loads them; no row of the Hub's was loaded where this was
written. A revision is pinned where its full hash was on such a page.

Problems come from, in this order: a file named by the caller, `NAME.jsonl` in the folder RLVR_LAB_DATA, the Hub by the
library `datasets` (or its cache). A file may have the Hub's columns or `question` and `answer`.

| benchmark | prompt | grader |
|---|---|---|
| olympiadbench | the official one, which tells kind, number and unit of the answers | `grade_olympiad` |
| minerva | the common one | `grade_minerva` |
| others | the common one, `registry.MATH_TEMPLATE` | `math_answer.grade` |

A score belongs to its prompt: the common one is Qwen2.5-Math's, which most papers on RLVR use.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, nearest
from .base import Verdict
from .benchmarks_grading import grade_minerva, grade_olympiad
from .jsonl import (
    ANSWER_KEY,
    ID_KEYS,
    QUESTION_KEYS,
    BadRow,
    MathProblem,
    answer_of,
    collect,
    lines_of,
    name_of,
    object_of,
    question_of,
)  # fmt: skip
from .registry import MathTask

FOLDER = "RLVR_LAB_DATA"
"""Environment variable: a folder with files NAME.jsonl, one per benchmark."""

Grader = Literal["math", "minerva", "olympiad"]


@dataclass(frozen=True)
class Benchmark:
    """A data set and how it is used. `question`, `answer`, `id`: its columns. `size`: problems in the split."""

    name: str
    title: str
    hub: str
    config: str | None
    split: str
    revision: str | None
    question: str
    answer: str
    id: str | None
    size: int
    licence: str
    citation: str
    seen: str
    """Where hub name, split and columns were read."""
    grader: Grader = "math"


@dataclass(frozen=True)
class BenchmarkProblem(MathProblem):
    """A problem with what its benchmark's grader and prompt need beyond question and answer."""

    instruction: str = ""
    """The benchmark's own instruction; empty where the common prompt is used."""
    multiple: bool = False
    tolerances: tuple[float, ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class BenchmarkTask(MathTask):
    """Asks and grades as the benchmark does. A template other than the common one replaces a benchmark's own prompt."""

    grader: Grader = "math"

    def prompt(self, problem: MathProblem) -> str:
        if isinstance(problem, BenchmarkProblem) and problem.instruction and self.template == MathTask().template:
            return f"{problem.instruction}\n{problem.question}"
        return super().prompt(problem)

    def grade(self, problem: MathProblem, response_text: str, finished: bool) -> Verdict:
        if not finished or self.grader == "math":
            return super().grade(problem, response_text, finished)
        if self.grader == "minerva":
            return grade_minerva(response_text, problem.answer, self.limits)
        assert isinstance(problem, BenchmarkProblem)
        return grade_olympiad(
            response_text,
            problem.answer,
            self.limits,
            multiple=problem.multiple,
            tolerances=problem.tolerances,
            unit=problem.unit,
        )


_MATH = "Hendrycks et al., arXiv 2103.03874; the 500 of Lightman et al., arXiv 2305.20050"
_AOPS = "problems of the Mathematical Association of America, as on the Art of Problem Solving wiki"

_TABLE = (
    Benchmark(
        "math500", "MATH-500", "HuggingFaceH4/MATH-500", None, "test", "ff5b20257d8185524591543f8ff5993951537bb8",
        "problem", "answer", "unique_id", 500, "MIT (MATH); the card names none", _MATH,
        "huggingface.co/datasets/HuggingFaceH4/MATH-500/commits/main; columns as in copies, e.g. lmms-lab/MATH500",
    ),
    Benchmark(
        "aime24", "AIME 2024", "HuggingFaceH4/aime_2024", None, "train", None,
        "problem", "answer", "id", 30, "Apache-2.0 (its source, AI-MO/aimo-validation-aime)", _AOPS,
        "huggingface.co/datasets/HuggingFaceH4/aime_2024/blob/main/README.md (at 2fe88a2)",
    ),
    Benchmark(
        "aime25", "AIME 2025", "math-ai/aime25", None, "test", None,
        "problem", "answer", "id", 30, "Apache-2.0", _AOPS,
        "huggingface.co/datasets/math-ai/aime25 (tree at 7510e41, README)",
    ),
    Benchmark(
        "amc23", "AMC 2023", "math-ai/amc23", None, "test", None,
        "question", "answer", "id", 40, "the card names none", _AOPS,
        "huggingface.co/datasets/math-ai/amc23/tree/main (at 80815d3); columns from code that loads it",
    ),
    Benchmark(
        "minerva", "Minerva (OCWCourses)", "math-ai/minervamath", None, "test", None,
        "question", "answer", None, 272, "the card names none; MIT OpenCourseWare is CC BY-NC-SA",
        "Lewkowycz et al., arXiv 2206.14858",
        "huggingface.co/datasets/math-ai/minervamath/blob/main/README.md (at ee46ddc)", "minerva",
    ),
    Benchmark(
        "olympiadbench", "OlympiadBench (open-ended, text only, English, mathematics)", "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP", "train", "3b426ee1d587c71b495146dde9f3e995ee7ac59f",
        "question", "final_answer", "id", 674, "Apache-2.0", "He et al., arXiv 2402.14008",
        "huggingface.co/datasets/Hothan/OlympiadBench/tree/3b426ee1...; columns from OpenBMB/OlympiadBench/inference; "
        "split and size from evalscope's page on it",
        "olympiad",
    ),
    Benchmark(
        "gsm8k", "GSM8K", "openai/gsm8k", "main", "test", "e53f048856ff4f594e959d75785d2c2d37b678ee",
        "question", "answer", "idx", 1319, "MIT", "Cobbe et al., arXiv 2110.14168",
        "huggingface.co/datasets/gsm8k/commit/e53f048856ff4f594e959d75785d2c2d37b678ee",
    ),
)  # fmt: skip

BENCHMARKS: Mapping[str, Benchmark] = {b.name: b for b in _TABLE}


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`; case, dashes and underscores do not matter. Raises UserError with the nearest."""
    plain = re.sub(r"[-_ ]", "", name).lower()
    if plain not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{name}': {nearest(plain, BENCHMARKS)}")
    return BENCHMARKS[plain]


def make_task(which: Benchmark, template: str | None = None) -> BenchmarkTask:
    """The task that asks and grades as `which` does, or with another prompt. Raises UserError for a bad template."""
    return BenchmarkTask(template=template or MathTask().template, grader=which.grader)


# -- loading ----------------------------------------------------------------------------------------------------------

Report = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """Problems of a benchmark and where they came from."""

    benchmark: Benchmark
    problems: list[BenchmarkProblem]
    source: str
    skipped: int = 0
    """Broken rows."""


def load_benchmark(
    which: Benchmark, file: Path | None = None, *, limit: int | None = None, max_bad_rows: int = 20, report: Report
) -> Loaded:
    """The problems of a benchmark, the first `limit` of them; from `file`, from RLVR_LAB_DATA, or from the Hub.

    Rows that cannot be used go to `report` by place, are counted, and skipped up to `max_bad_rows`. So does a number of
    problems that is not the benchmark's. Raises UserError where nothing can be loaded; offline it names the file that
    would do.
    """
    path = file or _in_folder(which)
    source = str(path) if path else f"{which.hub}{f'/{which.config}' if which.config else ''}:{which.split}"
    names: set[str] = set()
    skipped: list[str] = []

    def tell(line: str) -> None:
        skipped.append(line)
        report(line)

    def reader(row: Callable[[], Mapping[str, object]], number: int) -> Callable[[], BenchmarkProblem]:
        return lambda: problem_of(which, row(), number, names)

    rows = _file_rows(path) if path else _hub_rows(which)
    problems = collect(
        ((f"{source}:{number}", reader(row, number)) for number, row in rows),
        source,
        limit=limit,
        max_bad=max_bad_rows,
        report=tell,
        unit="row",
        setting="--max-bad-rows",
    )
    if limit is None and len(problems) != which.size:
        report(f"{source}: {len(problems)} problems, where {which.title} has {which.size}")
    return Loaded(which, problems, source, len(skipped))


def _in_folder(which: Benchmark) -> Path | None:
    folder = os.environ.get(FOLDER)
    path = Path(folder) / f"{which.name}.jsonl" if folder else None
    return path if path is not None and path.is_file() else None


def _file_rows(path: Path) -> Iterator[tuple[int, Callable[[], Mapping[str, object]]]]:
    for number, line in lines_of(path):
        yield number, partial(object_of, path, number, line)


def _hub_rows(which: Benchmark) -> Iterator[tuple[int, Callable[[], Mapping[str, object]]]]:
    """Rows of the split, numbered from 1, with only the columns that are used."""
    data = _hub(which)
    wanted = {which.question, which.answer, which.id, *QUESTION_KEYS, *ANSWER_KEYS, *_OLYMPIAD}
    # where none is there, all stay, so that the first broken row can name what it has
    data = data.select_columns([name for name in data.column_names if name in wanted] or data.column_names)
    for number, row in enumerate(data, 1):
        yield number, row.copy


def _hub(which: Benchmark) -> Any:
    other = f"name a JSONL file instead: --data {which.name}=FILE, or {which.name}.jsonl in the folder {FOLDER}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"benchmark '{which.name}' needs the library `datasets` (pip install datasets); or {other}"
        ) from error
    noisy = logging.getLogger("huggingface_hub")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # five lines on retries before the one that says what to do
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(which.hub, which.config, split=which.split, revision=which.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"benchmark '{which.name}' cannot be loaded from the Hub: {why}; {other}") from error
    finally:
        noisy.setLevel(level)


# -- rows -------------------------------------------------------------------------------------------------------------

ANSWER_KEYS = (ANSWER_KEY, "final_answer")
_OLYMPIAD = ("answer_type", "is_multiple_answer", "unit", "error")


def problem_of(which: Benchmark, row: Mapping[str, object], number: int, names: set[str]) -> BenchmarkProblem:
    """A row as a problem; `names` collects the names that are taken. Raises BadRow."""
    question = question_of(row, tuple(dict.fromkeys((which.question, *QUESTION_KEYS))))
    keys = tuple(dict.fromkeys((which.answer, *ANSWER_KEYS)))
    answer = answer_of({key: _one_text(row[key]) for key in keys if key in row} or row, keys)
    ids = tuple(dict.fromkeys(key for key in (which.id, *ID_KEYS) if key))
    own = name_of(row, names, f"{which.name}:{number}", ids)
    if which.grader != "olympiad":
        return BenchmarkProblem(question, answer, number, own)
    multiple, unit = row.get("is_multiple_answer") is True, row.get("unit") or ""
    if not isinstance(unit, str):
        raise BadRow("unit is not text")
    return BenchmarkProblem(
        question, answer, number, own,
        instruction=_instruction(str(row.get("answer_type") or ""), multiple, bool(unit)),
        multiple=multiple, tolerances=_tolerances(row.get("error")), unit=unit,
    )  # fmt: skip


def _one_text(value: object) -> object:
    """A list of answers, as OlympiadBench has it, as one text."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value


def _tolerances(value: object) -> tuple[float, ...]:
    """`error` is a number, several with commas, or nothing; an empty one of several means no tolerance."""
    if value is None or value == "":
        return ()
    try:
        widths = tuple(float(part) if part.strip() else 0.0 for part in str(value).split(","))
    except ValueError:
        raise BadRow(f"error is no number: {str(value)[:40]!r}") from None
    if not all(0 <= width < float("inf") for width in widths):
        raise BadRow(f"error is no tolerance: {str(value)[:40]!r}")
    return widths


_KINDS = {"Numerical": "a numerical value", "Expression": "an expression", "Equation": "an equation",
          "Interval": "an interval"}  # fmt: skip


def _instruction(answer_type: str, multiple: bool, unit: bool) -> str:
    """OlympiadBench's own prompt (arXiv 2402.14008) for an open-ended problem of mathematics in English."""
    kinds = [next((text for kind, text in _KINDS.items() if kind in part), "") for part in answer_type.split(",")]
    if not all(kinds) or "Tuple" in answer_type:
        told = ""
    elif not multiple:
        told = f"The answer of The problem should be {kinds[0]}. "
    elif len(set(kinds)) == 1:
        told = f"The problem has multiple answers, each of them should be {kinds[0]}. "
    else:
        told = f"The problem has multiple answers, with the answers in order being {', '.join(kinds)}. "
    box = "\\boxed{multiple answers connected with commas}" if multiple else "\\boxed{answer}"
    box += "(unit)" if unit else ""
    note = ", note that the unit of the answer should not be included in \\boxed{}" if unit else ""
    return (
        f"The following is an open-ended problem from an International Math competition. {told}Please calculate the "
        "answer according to the given requirements and the information provided. Please use LaTeX format to represent "
        "the variables and formulas used in the solution process and results. Please end your solution with "
        f'"So the final answer is {box}." and give the result explicitly{note}.'
    )
