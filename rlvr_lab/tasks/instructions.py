"""Instructions that a program can check, small enough for two cores: write a row of digits that keeps some rules.

    prompt     <bos> _ _ _ ( 7 _ * 3 2 = 4 5 <think>             always 14 tokens, so prompts need no padding
    response   ( * </think> 7 3 1 3 <eos>

reads: start with 7; hold 3 exactly twice; be 4 to 5 words long. The thinking part is a preview: the marks of the rules
that the writer means to keep. Nothing grades it. Rules are triples of Countdown's 128 words (`countdown.VOCABULARY`),
so that tokenizer, network and engines of the tiny lab serve both tasks:

| mark | rule | triple | points |
|---|---|---|---|
| `(` | start | `( x _`: the first word is x | 0.1 |
| `)` | end | `) x _`: the last word is x | 0.1 |
| `*` | count | `* x n`: x stands there exactly n times | 0.1 |
| `+` | at_least | `+ x n`: x stands there n times or more | 0.05 |
| `-` | forbid | `- x _`: x stands nowhere | 0.05 |
| `=` | length | `= a b`: a to b words | 0.1 |
| `to` | order | `to a b`: both occur, the first a before the first b | 0.1 |
| `/` | format | `/ + _` never falls, `/ * _` odd and even take turns, `/ - _` a `-` between every two words | 0.1 |

A problem draws a row of digits first and then rules that the row keeps, so every problem has a solution. Points are the
partial credits of Light-IF (arXiv 2508.03178) for rules of the same sort; those of start, order and format [inferred].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from ..errors import UserError, nearest
from . import countdown
from .base import Verdict

SLOTS = 4
PROMPT_TOKENS = 3 * SLOTS + 2
SHORTEST, LONGEST = 3, 8
SEPARATOR = "-"
PATIENCE = 2000
DIGITS = tuple(str(n) for n in range(10))
MARKS = {"start": "(", "end": ")", "count": "*", "at_least": "+", "forbid": "-", "length": "=", "order": "to",
         "format": "/"}  # fmt: skip
POINTS = {"start": 0.1, "end": 0.1, "count": 0.1, "at_least": 0.05, "forbid": 0.05, "length": 0.1, "order": 0.1,
          "format": 0.1}  # fmt: skip
FORMATS = {"+": "ascending", "*": "alternating", "-": "separated"}
MAX_RESPONSE_TOKENS = SLOTS + 1 + 2 * LONGEST - 1 + 1
Scoring = Literal["strict", "loose"]


class Rule(NamedTuple):
    """One rule: its kind and up to two arguments, as words of the vocabulary (`_` where there is none)."""

    kind: str
    first: str
    second: str = "_"

    @property
    def words(self) -> tuple[str, str, str]:
        """The triple that stands in the prompt."""
        return MARKS[self.kind], self.first, self.second

    def __str__(self) -> str:
        x, y = self.first, self.second
        texts = {
            "start": f"start with {x}",
            "end": f"end with {x}",
            "count": f"{x} exactly {y} times",
            "at_least": f"{x} at least {y} times",
            "forbid": f"no {x}",
            "length": f"{x} to {y} words",
            "order": f"{x} before {y}",
            "format": FORMATS.get(x, x),
        }
        return texts[self.kind]


@dataclass(frozen=True)
class Row:
    """An answer that could be read: its words, and whether a separator follows each but the last."""

    words: tuple[str, ...]
    separated: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The answer as it stands in a response."""
        pairs = zip(self.words, (*self.separated, False), strict=True)
        return " ".join(f"{word} {SEPARATOR}" if after else word for word, after in pairs)

    def part(self, start: int, stop: int) -> Row:
        """The words from `start` to `stop`, and what stands between them."""
        return Row(self.words[start:stop], self.separated[start : max(stop - 1, start)])


@dataclass(frozen=True)
class Problem:
    """Rules in prompt order, one to four of different kinds, and a row that keeps them all."""

    rules: tuple[Rule, ...]
    solution: str = field(default="", compare=False)

    @property
    def prompt(self) -> str:
        return " ".join(countdown.VOCABULARY[i] for i in self.prompt_ids)

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        blanks = ("_",) * (3 * (SLOTS - len(self.rules)))
        words = ("<bos>", *blanks, *(word for rule in self.rules for word in rule.words), "<think>")
        return tuple(countdown.ID[word] for word in words)

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))


# -- judging ----------------------------------------------------------------------------------------------------------


def _ordered(row: Row, a: str, b: str) -> bool:
    words = row.words
    return a in words and b in words and words.index(a) < words.index(b)


def _formatted(row: Row, kind: str) -> bool:
    values = [int(word) for word in row.words]
    pairs = list(pairwise(values))
    if kind == "+":
        return all(a <= b for a, b in pairs)
    if kind == "*":
        return all((a + b) % 2 == 1 for a, b in pairs)
    return all(row.separated)


_CHECKS: dict[str, Callable[[Row, str, str], bool]] = {
    "start": lambda row, x, _: bool(row.words) and row.words[0] == x,
    "end": lambda row, x, _: bool(row.words) and row.words[-1] == x,
    "count": lambda row, x, n: row.words.count(x) == int(n),
    "at_least": lambda row, x, n: row.words.count(x) >= int(n),
    "forbid": lambda row, x, _: x not in row.words,
    "length": lambda row, a, b: int(a) <= len(row.words) <= int(b),
    "order": _ordered,
    "format": lambda row, kind, _: _formatted(row, kind),
}


def keeps(row: Row, rule: Rule) -> bool:
    """Whether a row of words keeps a rule."""
    return _CHECKS[rule.kind](row, rule.first, rule.second)


def kept(row: Row, rules: Sequence[Rule], scoring: Scoring = "strict") -> list[bool]:
    """Which rules a row keeps.

    Loose scoring forgives a first or a last word too many, as IFEval's does with lines: a rule counts as kept where one
    of the row, the row without its first, without its last, and without both words keeps it.
    """
    n = len(row.words)
    forms = [row]
    if scoring == "loose":
        forms += [row.part(a, b) for a, b in ((1, n), (0, n - 1), (1, n - 1)) if a < b]
    return [any(keeps(form, rule) for form in forms) for rule in rules]


def read_row(text: str) -> Row | None:
    """A row of digits, at most one separator between two of them; None for anything else."""
    words: list[str] = []
    separated: list[bool] = []
    after = True  # a separator may not come first
    for word in text.split():
        if word == SEPARATOR and not after:
            separated[-1] = after = True
        elif len(word) == 1 and word in DIGITS:
            words.append(word)
            separated.append(False)
            after = False
        else:
            return None
    if not words or separated[-1]:
        return None
    return Row(tuple(words), tuple(separated[:-1]))


def answer_of(response: str, finished: bool = True) -> tuple[Row | None, str]:
    """The row after the last `</think>`, without looking at any rule, and why there is none."""
    if not finished:
        return None, "no <eos> within the length limit"
    _, found, text = response.rpartition("</think>")
    if not found:
        return None, "no </think>"
    row = read_row(text.replace("<eos>", " "))
    return row, "" if row else "the answer is no row of digits"


def verify(
    problem: Problem, response: str, finished: bool = True, scoring: Scoring = "strict", dense: bool = True
) -> Verdict:
    """Correct where every rule is kept; the points are those of the rules that are (none unless `dense`).

    Only the text after the last `</think>` is judged; without that tag, or where the length limit cut the response,
    there is no answer and no point.
    """
    row, reason = answer_of(response, finished)
    if row is None:
        return Verdict(False, None, reason)
    holds = kept(row, problem.rules, scoring)
    earned = {f"rule_{rule.kind}": POINTS[rule.kind] for rule, ok in zip(problem.rules, holds, strict=True) if ok}
    broken = next((str(rule) for rule, ok in zip(problem.rules, holds, strict=True) if not ok), None)
    return Verdict(
        broken is None, row.text, f"breaks: {broken}" if broken else "correct", points=earned if dense else {}
    )


@dataclass(frozen=True)
class InstructionsTask:
    """Rows of digits under rules; the problem encodes itself, the tokenizer is not asked.

    `dense` grants partial credits for single rules beside success; `scoring` judges both; `sizes` are the numbers of
    rules of its problems. Raises UserError for an unknown scoring and for sizes outside 1 to 4.
    """

    dense: bool = True
    scoring: Scoring = "strict"
    sizes: tuple[int, ...] = (2, 3, 4)
    name: str = "instructions"

    def __post_init__(self) -> None:
        known = get_args(Scoring)
        if self.scoring not in known:
            raise UserError(f"data.settings.scoring '{self.scoring}' does not exist; {nearest(self.scoring, known)}")
        if not self.sizes or any(not 1 <= size <= SLOTS for size in self.sizes):
            raise UserError(f"data.settings.sizes must be numbers of rules from 1 to {SLOTS}, not {list(self.sizes)}")

    @property
    def point_names(self) -> tuple[str, ...]:
        """Names of the partial credits that a verdict may hold."""
        return tuple(f"rule_{kind}" for kind in POINTS) if self.dense else ()

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[Problem]:
        """See `problems`."""
        return problems(count, seed, evaluation, self.sizes)

    def prompt_ids(self, problem: Problem, tokenizer: Any = None) -> list[int]:
        return list(problem.prompt_ids)

    def grade(self, problem: Problem, response_text: str, finished: bool) -> Verdict:
        return verify(problem, response_text, finished, self.scoring, self.dense)

    def read(self, response_text: str, finished: bool) -> str | None:
        """The row as text, whatever the rules."""
        row, _ = answer_of(response_text, finished)
        return row.text if row else None


# -- making -----------------------------------------------------------------------------------------------------------


def draw_row(rules: Sequence[Rule], rng: Random, alphabet: Sequence[str] = DIGITS) -> Row:
    """A random row that leans towards `rules` and often keeps them; `keeps` decides."""
    given = {rule.kind: rule for rule in rules}
    style = given["format"].first if "format" in given else ""
    low, high = (int(given["length"].first), int(given["length"].second)) if "length" in given else (SHORTEST, LONGEST)
    banned = {given[kind].first for kind in ("forbid", "count") if kind in given}
    choice = [d for d in alphabet if d not in banned]
    first, last = (given[kind].first if kind in given else None for kind in ("start", "end"))
    if style == "+":
        choice = [d for d in choice if (first or "0") <= d <= (last or "9")] or choice
    words = _fill(rng.randint(low, high), choice, style == "*", first, rng)
    words[0] = first or words[0]
    words[-1] = last or words[-1]
    _place(words, given, style == "*", rng)
    if style == "+":
        words.sort()
    return Row(tuple(words), (style == "-",) * (len(words) - 1))


def _fill(n: int, choice: Sequence[str], alternating: bool, first: str | None, rng: Random) -> list[str]:
    if not alternating:
        return [rng.choice(choice) for _ in range(n)]
    parity = int(first) if first else rng.randrange(2)
    by_parity = [[d for d in choice if int(d) % 2 == p] or list(choice) for p in (0, 1)]
    return [rng.choice(by_parity[(parity + i) % 2]) for i in range(n)]


def _place(words: list[str], given: dict[str, Rule], alternating: bool, rng: Random) -> None:
    """Put the words that counts and the order ask for on places that start and end leave free."""
    wanted: list[str] = []
    for kind in ("count", "at_least"):
        if kind in given:
            wanted += [given[kind].first] * max(int(given[kind].second) - words.count(given[kind].first), 0)
    if "order" in given:
        wanted += [w for w in (given["order"].first, given["order"].second) if w not in words and w not in wanted]
    free = list(range("start" in given, len(words) - ("end" in given)))
    rng.shuffle(free)
    for word in wanted:
        place = next((i for i in free if not alternating or (int(word) - int(words[i])) % 2 == 0), None)
        if place is None:
            return
        free.remove(place)
        words[place] = word


def _draw_rules(row: Row, kinds: Sequence[str], style: str, rng: Random) -> tuple[Rule, ...] | None:
    """Rules of the given kinds that `row` keeps; None where it has no room for one of them."""
    words, rules = row.words, []
    for kind in kinds:
        x = rng.choice(words)
        if kind in ("start", "end"):
            rules.append(Rule(kind, words[0] if kind == "start" else words[-1]))
        elif kind in ("count", "at_least"):
            rules.append(Rule(kind, x, str(words.count(x))))
        elif kind == "forbid":
            rules.append(Rule(kind, rng.choice([d for d in DIGITS if d not in words])))
        elif kind == "length":
            low = min(max(len(words) - rng.randrange(2), SHORTEST), LONGEST - 1)
            rules.append(Rule(kind, str(low), str(low + 1)))
        elif kind == "order":
            later = [w for w in dict.fromkeys(words) if words.index(w) > words.index(x)]
            if not later:
                return None
            rules.append(Rule(kind, x, rng.choice(later)))
        else:
            rules.append(Rule(kind, style))
    return tuple(rules)


def draw_problem(rng: Random, size: int) -> Problem:
    """A problem of `size` rules (1 to 4) of different kinds, in random order."""
    while True:
        kinds = rng.sample(list(MARKS), size)
        style = rng.choice(list(FORMATS)) if "format" in kinds else ""
        few = rng.sample(DIGITS, 5)  # so that digits repeat and some are left to be forbidden
        row = draw_row([Rule("format", style)] if style else [], rng, sorted(few))
        rules = _draw_rules(row, kinds, style, rng)
        if rules is not None and all(kept(row, rules)):
            return Problem(rules, row.text)


def held_out(problem: Problem) -> bool:
    """True for the tenth of all problems that no training ever sees: a hash of the rules, whatever their order."""
    key = 0
    for word in sorted(" ".join(rule.words) for rule in problem.rules):
        for character in word:
            key = (key * 0x100000001B3 ^ ord(character)) % 2**64
    return (key * 0x9E3779B97F4A7C15 % 2**64 >> 40) % 10 == 0


def problems(count: int, seed: int, evaluation: bool = False, sizes: Sequence[int] = (2, 3, 4)) -> list[Problem]:
    """At most `count` distinct problems, their numbers of rules in turn from `sizes`; `evaluation=True` draws from the
    held-out tenth. There are only some 250 problems of one rule, so that they run out: a size that gives nothing new in
    `PATIENCE` draws is left out. Raises ValueError for a size outside 1 to 4."""
    if not sizes or any(not 1 <= size <= SLOTS for size in sizes):
        raise ValueError(f"sizes must be numbers of rules from 1 to {SLOTS}, not {tuple(sizes)}")
    rng, left, draws = Random(f"instructions {seed} {evaluation}"), list(sizes), 0
    found: dict[frozenset[Rule], Problem] = {}
    while len(found) < count and left:
        size, before = left[len(found) % len(left)], len(found)
        problem = draw_problem(rng, size)
        if held_out(problem) == evaluation:
            found.setdefault(frozenset(problem.rules), problem)
        draws = 0 if len(found) > before else draws + 1
        if draws == PATIENCE:
            left, draws = [other for other in left if other != size], 0
    return list(found.values())
