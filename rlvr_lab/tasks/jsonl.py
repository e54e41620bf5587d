"""Read mathematical problems from a JSONL file: one object per line, a question and its reference answer.

The file is data from strangers. It is read line by line with a bounded line length, so a file of one endless line costs
no memory, and a broken line is reported with its place and skipped until there are too many of them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError, nearest
from .math_answer import Limits

QUESTION_KEYS = ("question", "problem", "prompt")
ANSWER_KEY = "answer"
ID_KEYS = ("id", "idx")
MAX_LINE_BYTES = 1_000_000

_THOUSANDS = re.compile(r"[-+]?[$€£]?[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MathProblem:
    """A question, its reference answer (reduced to the final answer), its line in the file, and a unique name."""

    question: str
    answer: str
    source_line: int
    id: str

    def __str__(self) -> str:
        return f"{self.id}: {self.question} -> {self.answer}"


class _BadLine(ValueError):
    """One line cannot be used; the message says why."""


def load_jsonl(
    path: Path, *, limit: int | None = None, max_bad_lines: int = 20, report: Callable[[str], None] = _log.warning
) -> list[MathProblem]:
    """Problems of `path` in file order, the first `limit` of them.

    Blank lines count for nothing. A broken line goes to `report` as `file:line: reason` and is skipped; line
    `max_bad_lines + 1` of that kind raises. GSM8K's worked answers are cut to what follows `####`.
    Raises UserError where the file is missing, unreadable, not UTF-8, or holds no usable line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, not {limit}")
    path = Path(path)
    found: list[MathProblem] = []
    names: set[str] = set()
    bad = 0
    try:
        with path.open("rb") as file:
            for number, line in _lines(file):
                try:
                    found.append(_problem(path, number, line, names))
                except _BadLine as error:
                    bad += 1
                    _count(f"{path}:{number}: {error}", bad, max_bad_lines, report)
                if len(found) == limit:
                    break
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not found:
        what = "no usable line" if bad else "the file is empty"
        raise UserError(f"{path}: {what}; expected one JSON object per line")
    return found


def _count(message: str, bad: int, max_bad_lines: int, report: Callable[[str], None]) -> None:
    if bad > max_bad_lines:
        raise UserError(
            f"{message}; that is broken line number {bad}: "
            f"mend the file or raise data.max_bad_lines (now {max_bad_lines})"
        )
    report(message)


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


def _problem(path: Path, number: int, line: bytes | None, names: set[str]) -> MathProblem:
    if line is None:
        raise _BadLine(f"longer than {MAX_LINE_BYTES} bytes")
    row = _object(path, number, line)
    question = _question(row)
    answer = _answer(row)
    # Two lines with one id would merge into one group of responses, so the second is named by its line.
    name = next((str(row[k]) for k in ID_KEYS if isinstance(row.get(k), str | int)), "")
    if not name or name in names:
        name = f"{path.stem}:{number}"
    names.add(name)
    return MathProblem(question, answer, number, name)


def _object(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from error
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise _BadLine("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _BadLine(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # an integer beyond Python's digit limit
        raise _BadLine("not JSON that can be read: a number with too many digits") from error
    if not isinstance(row, dict):
        raise _BadLine(f"a JSON {_kind(row)}, not an object")
    return row


def _question(row: dict[str, object]) -> str:
    present = [k for k in QUESTION_KEYS if k in row]
    if not present:
        raise _BadLine(_missing("question", QUESTION_KEYS, row))
    value = next((row[k] for k in present if isinstance(row[k], str) and str(row[k]).strip()), row[present[0]])
    return _text(present[0], value)


def _answer(row: dict[str, object]) -> str:
    if ANSWER_KEY not in row:
        raise _BadLine(_missing("answer", (ANSWER_KEY,), row))
    value = row[ANSWER_KEY]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = _plain_number(value)
    answer = _text(ANSWER_KEY, value)
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
        answer = answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
    if not answer:
        raise _BadLine("answer is empty after '####'")
    if len(answer) > Limits().answer_characters:
        raise _BadLine(f"answer longer than {Limits().answer_characters} characters, which no grader accepts")
    return answer


def _plain_number(value: int | float) -> str:
    """27.0 -> '27', 0.5 -> '0.5', 1e-7 -> '0.0000001'."""
    if not math.isfinite(value):
        raise _BadLine(f"answer is not a finite number: {value}")
    return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"{key} is {_kind(value)}, not text")
    if not value.strip():
        raise _BadLine(f"{key} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell it, tokenizers cannot take it
        raise _BadLine(f"{key} holds half of a surrogate pair") from error
    return value.strip()


def _missing(what: str, accepted: tuple[str, ...], row: dict[str, object]) -> str:
    keys = [k[:40] for k in list(row)[:8]]
    more = ", ..." if len(row) > len(keys) else ""
    found = ", ".join(map(repr, keys)) + more if keys else "none"
    hints = [nearest(key, accepted) for key in keys if key not in (*QUESTION_KEYS, ANSWER_KEY)]
    hint = next((f"; {h}" for h in hints if h.startswith("did you mean")), "")
    return f"no {what} key; accepted: {', '.join(accepted)}; found: {found}{hint}"


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", bool: "boolean", type(None): "null", str: "string"}
    return names.get(type(value), "number")
