"""Read mathematical problems from a JSONL file: one object per line, a question and its reference answer.

The file is data from strangers. It is read line by line with a bounded line length, so a file of one endless line costs
no memory, and a broken line is reported with its place and skipped until there are too many of them. `collect` does the
counting and `question_of`, `answer_of`, `text_of` the checks; `benchmarks` uses them for rows that come from elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import UserError, nearest
from .math_answer import Limits

QUESTION_KEYS = ("question", "problem", "prompt")
ANSWER_KEY = "answer"
ID_KEYS = ("id", "idx")
MAX_LINE_BYTES = 1_000_000

_THOUSANDS = re.compile(r"[-+]?[$€£]?[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_log = logging.getLogger(__name__)
P = TypeVar("P")


@dataclass(frozen=True)
class MathProblem:
    """A question, its reference answer (reduced to the final answer), its line in the file, and a unique name."""

    question: str
    answer: str
    source_line: int
    id: str

    def __str__(self) -> str:
        return f"{self.id}: {self.question} -> {self.answer}"


class BadRow(ValueError):
    """One line or row cannot be used; the message says why."""


def load_jsonl(
    path: Path,
    *,
    limit: int | None = None,
    max_bad_lines: int = 20,
    report: Callable[[str], None] = _log.warning,
    note: Callable[[str], None] = _log.warning,
    setting: str = "data.max_bad_lines",
) -> list[MathProblem]:
    """Problems of `path` in file order, the first `limit` of them.

    Blank lines count for nothing. A broken line goes to `report` as `file:line: reason` and is skipped; line
    `max_bad_lines + 1` of that kind raises. A line whose id is taken goes to `note`, and is kept under another name.
    GSM8K's worked answers are cut to what follows `####`.
    Raises UserError where the file is missing, unreadable, not UTF-8, or holds no usable line.
    """
    names: set[str] = set()

    def problem(row: Mapping[str, object], number: int) -> MathProblem:
        question, answer = question_of(row), answer_of(row)
        return MathProblem(question, answer, number, line_name(row, names, Path(path), number, note))

    return load_rows(path, problem, limit=limit, max_bad_lines=max_bad_lines, report=report, setting=setting)


def load_rows(
    path: Path,
    problem: Callable[[Mapping[str, object], int], P],
    *,
    limit: int | None = None,
    max_bad_lines: int = 20,
    report: Callable[[str], None] = _log.warning,
    setting: str = "data.max_bad_lines",
) -> list[P]:
    """What `problem(row, line number)` makes of the JSON objects of a file, as `load_jsonl` counts and reports them."""
    path = Path(path)

    def reader(number: int, line: bytes | None) -> Callable[[], P]:
        return lambda: problem(object_of(path, number, line), number)

    rows = ((f"{path}:{number}", reader(number, line)) for number, line in lines_of(path))
    return collect(rows, str(path), limit=limit, max_bad=max_bad_lines, report=report, setting=setting)


def collect(
    rows: Iterable[tuple[str, Callable[[], P]]],
    source: str,
    *,
    limit: int | None,
    max_bad: int,
    report: Callable[[str], None],
    unit: str = "line",
    setting: str = "data.max_bad_lines",
) -> list[P]:
    """The usable ones of `rows`, each a place and a function that reads it or raises BadRow; the first `limit`.

    A broken row goes to `report` as `place: reason` and is skipped; number `max_bad + 1` raises. `unit` and `setting`
    are for the messages. Raises UserError for too many broken rows, for none that can be used, for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, not {limit}")
    found: list[P] = []
    bad = 0
    for place, read in rows:
        try:
            found.append(read())
        except BadRow as error:
            bad += 1
            message = f"{place}: {error}"
            if bad > max_bad:
                raise UserError(
                    f"{message}; that is broken {unit} number {bad}: mend the data or raise {setting} (now {max_bad})"
                ) from None
            report(message)
        if len(found) == limit:
            break
    if not found:
        what = f"no usable {unit}" if bad else f"{'the file' if unit == 'line' else 'the data set'} is empty"
        raise UserError(f"{source}: {what}" + ("; expected one JSON object per line" if unit == "line" else ""))
    return found


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that are not blank; `None` stands for one above MAX_LINE_BYTES, which is never held whole.

    Raises UserError where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from _lines(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that are not blank; `None` stands for one above MAX_LINE_BYTES, which is never held whole."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 16)
            yield number, None
        elif line.strip():
            yield number, line


def line_name(
    row: Mapping[str, object], names: set[str], path: Path, number: int, report: Callable[[str], None]
) -> str:
    """`name_of` for a line of a file; an id that is taken is reported with its place."""
    otherwise = f"{path.stem}:{number}"
    return name_of(row, names, otherwise, report=lambda line: report(f"{path}:{number}: {line}"))


def name_of(
    row: Mapping[str, object],
    names: set[str],
    otherwise: str,
    keys: tuple[str, ...] = ID_KEYS,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """A name that is not yet in `names`, and now is: the row's own, else `otherwise`.

    Two rows with one id would merge into one group of responses, so the second takes `otherwise`, and `report` says so.
    """
    name = next((str(row[k]) for k in keys if isinstance(row.get(k), str | int)), "")
    if name in names:
        report(f"id {name[:40]!r} is that of an earlier row; this one is called {otherwise!r}")
    if not name or name in names:
        name = otherwise
    names.add(name)
    return name


def object_of(path: Path, number: int, line: bytes | None) -> dict[str, object]:
    """The JSON object on a line of `lines_of`. Raises BadRow, and UserError for what is not UTF-8."""
    if line is None:
        raise BadRow(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from error
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # an integer beyond Python's digit limit
        raise BadRow("not JSON that can be read: a number with too many digits") from error
    if not isinstance(row, dict):
        raise BadRow(f"a JSON {kind_of(row)}, not an object")
    return row


def question_of(row: Mapping[str, object], keys: tuple[str, ...] = QUESTION_KEYS) -> str:
    """The first of `keys` that holds text. Raises BadRow."""
    present = [k for k in keys if k in row]
    if not present:
        raise BadRow(_missing("question", keys, row))
    value = next((row[k] for k in present if isinstance(row[k], str) and str(row[k]).strip()), row[present[0]])
    return text_of(present[0], value)


def answer_of(row: Mapping[str, object], keys: tuple[str, ...] = (ANSWER_KEY,)) -> str:
    """The final answer as text: a number plainly written, a worked answer cut to what follows `####`. Raises BadRow."""
    key = next((k for k in keys if k in row), None)
    if key is None:
        raise BadRow(_missing("answer", keys, row))
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = _plain_number(value)
    answer = text_of(key, value)
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
        answer = answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
    if not answer:
        raise BadRow("answer is empty after '####'")
    if len(answer) > Limits().answer_characters:
        raise BadRow(f"answer longer than {Limits().answer_characters} characters, which no grader accepts")
    return answer


def _plain_number(value: int | float) -> str:
    """27.0 -> '27', 0.5 -> '0.5', 1e-7 -> '0.0000001'."""
    if not math.isfinite(value):
        raise BadRow(f"answer is not a finite number: {value}")
    return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")


def text_of(key: str, value: object) -> str:
    """`value` where it is text that is not blank, stripped. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{key} is {kind_of(value)}, not text")
    if not value.strip():
        raise BadRow(f"{key} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell it, tokenizers cannot take it
        raise BadRow(f"{key} holds half of a surrogate pair") from error
    return value.strip()


def _missing(what: str, accepted: tuple[str, ...], row: Mapping[str, object]) -> str:
    keys = [k[:40] for k in list(row)[:8]]
    more = ", ..." if len(row) > len(keys) else ""
    found = ", ".join(map(repr, keys)) + more if keys else "none"
    hints = [nearest(key, accepted) for key in keys if key not in (*QUESTION_KEYS, ANSWER_KEY)]
    hint = next((f"; {h}" for h in hints if h.startswith("did you mean")), "")
    return f"no {what} key; accepted: {', '.join(accepted)}; found: {found}{hint}"


def kind_of(value: object) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "object", list: "array", bool: "boolean", type(None): "null", str: "string"}
    return names.get(type(value), "number")
