"""IFEval-style instructions in natural language (arXiv 2311.07911): rules on the form of a text, checked by program.

A row of JSONL holds `prompt`, `instruction_id_list` and `kwargs`, one mapping of arguments per id; nulls count as
absent. The checks follow the public benchmark (google-research, instruction_following_eval) with these differences:
they need no language model or word list, so sentences are counted by their end marks and capitals by case alone;
keywords are literal text; `language:response_language` is refused, because it needs a language detector; and every
check takes time linear in the text, whatever the text is.

Strict scoring judges the text as it stands. Loose scoring judges also the text without its first line, its last line or
both, each with and without asterisks, and takes a rule as kept where any form keeps it. Partial credits are those of
Light-IF (arXiv 2508.03178) for English rules; rules that it gives none have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..errors import UserError, nearest
from .base import Verdict
from .jsonl import BadRow, line_name, load_rows, text_of

Arguments = Mapping[str, Any]
Scoring = Literal["strict", "loose"]
RELATIONS = ("at least", "less than", "exactly")
CLOSING = "</think>"
MAX_CHARACTERS = 100_000
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+")
_STARS = re.compile(r"\s?\*\*\*\s?")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
_HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
_FENCE = re.compile(r"^```\w*\s*|\s*```$")


@dataclass(frozen=True)
class Limits:
    """Longest text that is judged."""

    characters: int = MAX_CHARACTERS


def _related(count: int, number: int, relation: str) -> bool:
    return {"at least": count >= number, "less than": count < number, "exactly": count == number}[relation]


def count_sentences(text: str) -> int:
    """Stretches that hold a word and end with . ! ? or their full-width forms, or with the text."""
    return sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(text))


def _bullets(text: str) -> int:
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line.startswith("-") or (line.startswith("*") and line[1:2] not in ("", "*")) for line in lines)


def _capitals(text: str) -> int:
    return sum(word.isupper() for word in text.split())


def _parts(pieces: Sequence[str]) -> list[str] | None:
    """Pieces between separators, without empty ends; None where one in the middle is empty."""
    if any(not piece.strip() for piece in pieces[1:-1]):
        return None
    return [piece.strip() for piece in pieces if piece.strip()]


def _paragraphs(text: str, a: Arguments) -> bool:
    found = _parts(_STARS.split(text))
    return found is not None and len(found) == int(a["num_paragraphs"])


def _first_word(text: str, a: Arguments) -> bool:
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(found) != a["num_paragraphs"] or not 1 <= a["nth_paragraph"] <= len(found):
        return False
    words = found[a["nth_paragraph"] - 1].split(None, 1)
    return bool(words[0].strip("\"'“”‘’.,!?;:").lower() == a["first_word"].lower())


def _has_title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start + 2 : end].strip("<> "):
            return True
    return False


def _is_json(text: str) -> bool:
    try:
        json.loads(_FENCE.sub("", text.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, a: Arguments) -> bool:
    marker = re.escape(a["postscript_marker"].strip().lower().rstrip("."))
    return re.search(marker.replace(r"\.", r"\.\s?"), text.lower()) is not None


def _two_responses(text: str, _: Arguments) -> bool:
    found = _parts(text.split("******"))
    return found is not None and len(found) == 2 and found[0] != found[1]


def _sections(text: str, a: Arguments) -> bool:
    return len(re.findall(re.escape(a["section_spliter"]) + r"\s?\d", text)) >= int(a["num_sections"])


def _no_forbidden(text: str, a: Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in a["forbidden_words"])


def _counted(count: Callable[[str, Arguments], int], number: str, relation: str) -> Callable[[str, Arguments], bool]:
    return lambda text, a: _related(count(text, a), a[number], a[relation])


class Rule(NamedTuple):
    """How an instruction is checked, which arguments it needs, and its partial credit given its arguments."""

    check: Callable[[str, Arguments], bool]
    needs: Mapping[str, type]
    points: Callable[[Arguments], float] = lambda a: 0.0


def _by_relation(name: str, exact: float = 0.1) -> Callable[[Arguments], float]:
    return lambda a: exact if a[name] == "exactly" else 0.05


def _letter_points(a: Arguments) -> float:
    forbids = a["let_relation"] == "less than" and a["let_frequency"] == 1
    return 0.2 if forbids else 0.05


RULES: dict[str, Rule] = {
    "keywords:existence": Rule(
        lambda t, a: all(k.lower() in t.lower() for k in a["keywords"]), {"keywords": list}, lambda a: 0.05
    ),
    "keywords:frequency": Rule(
        _counted(lambda t, a: t.lower().count(a["keyword"].lower()), "frequency", "relation"),
        {"keyword": str, "frequency": int, "relation": str},
        _by_relation("relation"),
    ),
    "keywords:forbidden_words": Rule(_no_forbidden, {"forbidden_words": list}, lambda a: 0.05),
    "keywords:letter_frequency": Rule(
        _counted(lambda t, a: t.lower().count(a["letter"].lower()), "let_frequency", "let_relation"),
        {"letter": str, "let_frequency": int, "let_relation": str},
        _letter_points,
    ),
    "length_constraints:number_words": Rule(
        _counted(lambda t, a: len(_WORD.findall(t)), "num_words", "relation"),
        {"num_words": int, "relation": str},
        _by_relation("relation"),
    ),
    "length_constraints:number_sentences": Rule(
        _counted(lambda t, a: count_sentences(t), "num_sentences", "relation"),
        {"num_sentences": int, "relation": str},
        _by_relation("relation", exact=0.2),
    ),
    "length_constraints:number_paragraphs": Rule(_paragraphs, {"num_paragraphs": int}, lambda a: 0.1),
    "length_constraints:nth_paragraph_first_word": Rule(
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}, lambda a: 0.1
    ),
    "detectable_content:number_placeholders": Rule(
        lambda t, a: len(_PLACEHOLDER.findall(t)) >= a["num_placeholders"], {"num_placeholders": int}, lambda a: 0.05
    ),
    "detectable_content:postscript": Rule(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Rule(
        lambda t, a: _bullets(t) == a["num_bullets"], {"num_bullets": int}, lambda a: 0.1
    ),
    "detectable_format:number_highlighted_sections": Rule(
        lambda t, a: sum(bool((x or y).strip()) for x, y in _HIGHLIGHT.findall(t)) >= a["num_highlights"],
        {"num_highlights": int},
        lambda a: 0.05,
    ),
    "detectable_format:constrained_response": Rule(lambda t, a: any(choice in t for choice in CHOICES), {}),
    "detectable_format:multiple_sections": Rule(_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": Rule(lambda t, a: _is_json(t), {}),
    "detectable_format:title": Rule(lambda t, a: _has_title(t), {}),
    "combination:two_responses": Rule(_two_responses, {}),
    "combination:repeat_prompt": Rule(
        lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
        {"prompt_to_repeat": str},
        lambda a: 0.1,
    ),
    "startend:end_checker": Rule(
        lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
        {"end_phrase": str},
        lambda a: 0.1,
    ),
    "startend:quotation": Rule(lambda t, a: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"', {}),
    "change_case:capital_word_frequency": Rule(
        _counted(lambda t, a: _capitals(t), "capital_frequency", "capital_relation"),
        {"capital_frequency": int, "capital_relation": str},
        _by_relation("capital_relation"),
    ),
    "change_case:english_capital": Rule(lambda t, a: t.isupper(), {}),
    "change_case:english_lowercase": Rule(lambda t, a: t.islower(), {}),
    "punctuation:no_comma": Rule(lambda t, a: "," not in t and "，" not in t, {}),
}


@dataclass(frozen=True)
class IFEvalProblem:
    """A prompt with its rules, each an id of `RULES` with arguments; its line in the file, and a unique name."""

    question: str
    rules: tuple[tuple[str, Arguments], ...]
    source_line: int
    id: str

    def __str__(self) -> str:
        return f"{self.id}: {self.question[:60]} -> {', '.join(name for name, _ in self.rules)}"


def forms(text: str, scoring: Scoring = "strict") -> list[str]:
    """The texts that are judged: as it stands, and for loose scoring the seven shorter ones."""
    if scoring == "strict":
        return [text]
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [form for one in cut for form in (one, one.replace("*", ""))]


def keeps(text: str, name: str, arguments: Arguments, scoring: Scoring = "strict") -> bool:
    """Whether a text keeps one rule; an empty form keeps none. Raises KeyError for an id outside `RULES`."""
    check = RULES[name].check
    return any(bool(form.strip()) and check(form, arguments) for form in forms(text, scoring))


def judged_text(response: str, thinks: bool = False) -> str | None:
    """What follows the last closing-think tag; without one the whole response, or None where the model `thinks`."""
    _, found, after = response.rpartition(CLOSING)
    if not found and thinks:
        return None
    return after.strip()


@dataclass(frozen=True)
class IFEvalTask:
    """Rules on the form of a text. `thinks`: a response without a closing-think tag is no answer, as Light-IF has it;
    `dense` adds the partial credits of the rules that are kept, as one point `dense`.

    Raises UserError for an unknown scoring.
    """

    dense: bool = True
    scoring: Scoring = "strict"
    thinks: bool = False
    limits: Limits = field(default_factory=Limits)
    name: str = "ifeval"

    def __post_init__(self) -> None:
        known = get_args(Scoring)
        if self.scoring not in known:
            raise UserError(f"data.settings.scoring '{self.scoring}' does not exist; {nearest(self.scoring, known)}")

    @property
    def point_names(self) -> tuple[str, ...]:
        """Names of the partial credits that a verdict may hold."""
        return ("dense",) if self.dense else ()

    def prompt_ids(self, problem: IFEvalProblem, tokenizer: Any) -> list[int]:
        from .registry import encode_prompt

        return encode_prompt(problem.question, tokenizer)

    def grade(self, problem: IFEvalProblem, response_text: str, finished: bool) -> Verdict:
        """Correct where every rule is kept. A text beyond `limits` is refused."""
        if not finished:
            return Verdict(False, None, "no end of text within the length limit")
        if len(response_text) > self.limits.characters:
            return Verdict(False, None, f"longer than {self.limits.characters} characters", refused=True)
        text = judged_text(response_text, self.thinks)
        if not text:
            return Verdict(False, None, "no closing-think tag" if text is None else "empty")
        holds = [keeps(text, name, arguments, self.scoring) for name, arguments in problem.rules]
        points = sum(RULES[n].points(a) for (n, a), ok in zip(problem.rules, holds, strict=True) if ok)
        broken = next((n for (n, _), ok in zip(problem.rules, holds, strict=True) if not ok), None)
        reason = f"breaks {broken}" if broken else "correct"
        return Verdict(broken is None, " ".join(text.split()), reason, points={"dense": points} if self.dense else {})

    def read(self, response_text: str, finished: bool) -> str | None:
        """The judged text with single blanks, whatever the rules."""
        if not finished or len(response_text) > self.limits.characters:
            return None
        text = judged_text(response_text, self.thinks)
        return " ".join(text.split()) if text else None

    def load(self, path: Path, **reading: Any) -> list[IFEvalProblem]:
        """See `load_ifeval`."""
        return load_ifeval(path, **reading)


# -- reading ----------------------------------------------------------------------------------------------------------


def load_ifeval(
    path: Path,
    *,
    limit: int | None = None,
    max_bad_lines: int = 20,
    report: Callable[[str], None] = lambda text: None,
) -> list[IFEvalProblem]:
    """Problems of a JSONL file in file order; a line that cannot be used is reported with its place and skipped.

    Raises UserError as `jsonl.load_jsonl` does: a missing file, too many broken lines, none that can be used.
    """
    names: set[str] = set()

    def problem(row: Mapping[str, object], number: int) -> IFEvalProblem:
        question, rules = _rules(row)
        return IFEvalProblem(question, rules, number, line_name(row, names, Path(path), number, report))

    return load_rows(path, problem, limit=limit, max_bad_lines=max_bad_lines, report=report)


def _rules(row: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Arguments], ...]]:
    for key in ("prompt", "instruction_id_list", "kwargs"):
        if key not in row:
            raise BadRow(f"no key '{key}'")
    question = text_of("prompt", row["prompt"])
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(ids, list) or not isinstance(kwargs, list) or not ids or len(ids) != len(kwargs):
        raise BadRow("instruction_id_list and kwargs must be lists of one length, not empty")
    return question, tuple(_rule(name, given) for name, given in zip(ids, kwargs, strict=True))


def _rule(name: Any, given: Any) -> tuple[str, Arguments]:
    if name == "language:response_language":
        raise BadRow("'language:response_language' needs a language detector and is not checked here")
    if not isinstance(name, str) or name not in RULES:
        raise BadRow(f"unknown instruction {str(name)[:60]!r}; {nearest(str(name)[:60], RULES)}")
    if not isinstance(given, dict):
        raise BadRow(f"the arguments of '{name}' are no object")
    arguments: dict[str, Any] = {}
    for key, kind in RULES[name].needs.items():
        arguments[key] = _argument(name, key, kind, given.get(key))
    return name, arguments


def _argument(name: str, key: str, kind: type, value: Any) -> Any:
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        raise BadRow(f"'{name}' needs {key} as {kind.__name__}, not {str(value)[:40]!r}")
    if kind is list and not (value and all(isinstance(item, str) and item for item in value)):
        raise BadRow(f"'{name}' needs {key} as a list of words")
    if kind is str and not value.strip():
        raise BadRow(f"'{name}' needs {key}, which is empty")
    if key.endswith("relation") and value not in RELATIONS:
        raise BadRow(f"'{name}' has {key} {value!r}; {nearest(value, RELATIONS)}")
    return value
