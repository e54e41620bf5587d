r"""Multiple choice: a letter, in brackets or not, or the text of an option.

A line of the file has a question, `choices` (or `options`) and an answer. Choices are a list of texts, an object from
letter to text, or ARC's `{"label": [...], "text": [...]}`; the answer (`answer` or `answerKey`) is a letter, the place
from 0 (MMLU), or an option's text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import Verdict
from .jsonl import BadRow, line_name, load_rows, question_of, text_of
from .math_answer import canonical, extract, number
from .registry import UNFINISHED, encode_prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = (
    "{question}\n\n{choices}\n\nPlease reason step by step, and put the letter of your final answer within \\boxed{}."
)
MOST_CHARACTERS = 1_000
"""Of an answer; a longer one is refused."""
TAIL = 20_000
"""Characters of a response's end that are searched."""

_PHRASE = re.compile(r"(?i:\b(?:answer|option|choice))\**(?:\s+is\b|\s*[:=])[\s:*]*")
_BRACKETED_END = re.compile(r"[(\[]([A-Z])[)\]][\s.*$]*$")
_LONE = re.compile(r"[\s(\[*$]*([A-Za-z])[\s)\].:*$]*")
_LED = re.compile(
    r"[(\[*]*(?:(?i:option|choice|answer)\s+[(\[*]*)?([A-Z])"
    r"(?:[)\].:*]+\s*|(?=\s*[,/&])|\s+(?=-\s|(?i:because|since|or|and)\b)|\s*$)(.*)",
    re.DOTALL,
)
_SEVERAL = re.compile(r"\s*(?:,|/|&|(?i:or|and)\b)\s*[(\[*]*[A-Z]\b")


@dataclass(frozen=True)
class Choice:
    """A question, its options in order, the place of the right one, its line, and a unique name."""

    question: str
    options: tuple[str, ...]
    right: int
    source_line: int
    id: str

    @property
    def answer(self) -> str:
        """The right letter."""
        return LETTERS[self.right]

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Place of each option by its plain text; a text that stands twice belongs to none."""
        plains = [plain(option) for option in self.options]
        return {text: i for i, text in enumerate(plains) if plains.count(text) == 1}

    def __str__(self) -> str:
        return f"{self.id}: {self.question} -> {self.answer}"


@dataclass(frozen=True)
class MultipleChoiceTask:
    """Questions with options. `template` holds `{question}` and `{choices}` once each; else UserError."""

    template: str = TEMPLATE
    name: str = "multiple_choice"

    def __post_init__(self) -> None:
        if any(self.template.count(place) != 1 for place in ("{question}", "{choices}")):
            raise UserError(f"data.template must hold {{question}} and {{choices}} once each: {self.template[:80]!r}")

    def load(self, path: Path, *, report: Callable[[str], None], **reading: Any) -> list[Choice]:
        """See `jsonl.load_jsonl`."""
        names: set[str] = set()

        def problem(row: Mapping[str, object], line: int) -> Choice:
            question, (options, right) = question_of(row), _options(row)
            return Choice(question, options, right, line, line_name(row, names, Path(path), line, report))

        return load_rows(path, problem, report=report, **reading)

    def prompt(self, problem: Choice) -> str:
        listed = "\n".join(f"({LETTERS[i]}) {option}" for i, option in enumerate(problem.options))
        # in one pass: an option may itself hold "{question}"
        parts = {"{question}": problem.question, "{choices}": listed}
        return re.sub(r"\{question\}|\{choices\}", lambda found: parts[found[0]], self.template)

    def prompt_ids(self, problem: Choice, tokenizer: Any) -> list[int]:
        return encode_prompt(self.prompt(problem), tokenizer)

    def grade(self, problem: Choice, response_text: str, finished: bool) -> Verdict:
        return grade(problem, response_text) if finished else UNFINISHED

    def read(self, response_text: str, finished: bool) -> str | None:
        found = answer_text(response_text) if finished else None
        if found is None or len(found) > MOST_CHARACTERS:
            return None
        letter, rest = split_letter(found)
        return letter or plain(rest) or None


def grade(problem: Choice, response: str) -> Verdict:
    """Judge a response; `Verdict.answer` is the letter it chose, or the text that is no option.

    A letter beside the text of another option, and several letters, choose nothing: the answer is `None`.
    """
    found = answer_text(response)
    if found is None:
        return Verdict(False, None, "no answer found")
    if len(found) > MOST_CHARACTERS:
        return Verdict(False, None, f"answer longer than {MOST_CHARACTERS} characters", refused=True)
    letter, rest = split_letter(found)
    if letter is not None and _SEVERAL.match(rest):
        return Verdict(False, None, "names several letters")
    whole, beside = problem.places.get(plain(found)), problem.places.get(plain(rest))
    chosen = whole if whole is not None else beside
    if letter is not None and (whole is None or plain(found) == letter.casefold()):
        # an option whose whole text is a letter ("B" as the text of A) gives way to the letter
        if beside is not None and LETTERS[beside] != letter:
            return Verdict(False, None, f"the letter {letter} beside the text of {LETTERS[beside]}")
        chosen = LETTERS.index(letter)
    if chosen is None:
        text = plain(found)
        return Verdict(False, text or None, "names no option" if text else "empty answer")
    if chosen >= len(problem.options):
        return Verdict(False, LETTERS[chosen], f"there are {len(problem.options)} options")
    right = chosen == problem.right
    return Verdict(right, LETTERS[chosen], "correct" if right else f"not {problem.answer}")


def answer_text(response: str) -> str | None:
    r"""The last `\boxed{}`, else what follows "answer is" or "answer:", else the last line that is not
    blank, or the letter in brackets that ends it."""
    tail = unicodedata.normalize("NFKC", response[-TAIL:])
    if "\\boxed{" in tail:
        boxed, reason = extract(tail)
        return boxed if boxed is not None or "more than" not in reason else tail
    for phrase in reversed(list(_PHRASE.finditer(tail))):
        sentence = tail[phrase.end() :].partition("\n")[0].strip()
        if sentence.strip(" .*"):
            return sentence
    line = tail.strip().rpartition("\n")[2].strip()
    ending = _BRACKETED_END.search(line)
    return ending[0] if ending else line or None


def split_letter(text: str) -> tuple[str | None, str]:
    r"""The letter that opens an answer, and the rest: `(C)`, `C.`, `C) four`, `\text{C}`, `option C`, `**C**`."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip().rstrip(".")
    if lone := _LONE.fullmatch(bare):
        return lone[1].upper(), ""
    if led := _LED.match(bare):
        return led[1], led[2]
    return None, text


def plain(text: str) -> str:
    """Option text without layout, case and final stop; numbers reduced, so that 0.5 and 1/2 are one."""
    form = canonical(text)
    return form if number(form) is not None else " ".join(form.casefold().split())


def _options(row: Mapping[str, object]) -> tuple[tuple[str, ...], int]:
    """Options and the place of the right one. Raises BadRow."""
    key = next((k for k in ("choices", "options") if k in row), None)
    if key is None:
        raise BadRow("no choices key; accepted: choices, options")
    labels, texts = _labelled(row[key], key)
    options = tuple(text_of(f"{key}[{i}]", text) for i, text in enumerate(texts))
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRow(f"{key} holds {len(options)} options; from 2 to {len(LETTERS)} can be asked")
    return options, _right(row, labels, options)


def _labelled(value: object, key: str) -> tuple[list[str], list[object]]:
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        labels, texts = [str(label) for label in value["label"]], list(value["text"])
        if len(labels) != len(texts):
            raise BadRow(f"{key} has {len(labels)} labels for {len(texts)} texts")
        return labels, texts
    if isinstance(value, Mapping):
        return [str(label) for label in value], list(value.values())
    if isinstance(value, list):
        return list(LETTERS[: len(value)]), value
    raise BadRow(f"{key} is neither a list nor an object")


def _right(row: Mapping[str, object], labels: list[str], options: tuple[str, ...]) -> int:
    key = next((k for k in ("answer", "answerKey") if k in row), None)
    if key is None:
        raise BadRow("no answer key; accepted: answer, answerKey")
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(options):
            raise BadRow(f"{key} is {value}, but there are {len(options)} options from 0")
        return value
    text = text_of(key, value)
    for candidates, wanted in ((labels, text.strip("().")), (list(options), text)):
        if candidates.count(wanted) == 1:
            return candidates.index(wanted)
    raise BadRow(f"{key} {text[:40]!r} is no option")
