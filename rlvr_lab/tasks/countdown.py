"""Countdown, small enough for two cores: reach a target from three or four numbers.

A legal step takes two numbers a >= b and gives a + b (<= 60), a - b (if a > b), a * b (<= 60, b > 1) or a / b (exact,
b > 1). The larger operand comes first, so that no step is a commuted copy of another. A problem is the end value of a
random chain of legal steps, hence always solvable, and never one of its own numbers.

    prompt     <bos> _ 10 1 4 to 44 <think>                      always 8 tokens, so prompts need no padding
    response   10 + 1 = 11 11 * 4 = 44 yes </think> ( 10 + 1 ) * 4 <eos>

`yes` and `no` are the trace's own verdicts. After `no`, the retry format either opens another attempt or closes and
answers with the last, wrong, attempt.

The vocabulary has exactly 128 entries: 17 used words, 11 reserved words that no text contains, and the numbers 0 to 99
at ids 28 to 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from .base import Verdict
from .expressions import MAX_CHARACTERS, ExpressionError, TooLarge, parse

SLOTS = 4
MAX_NUMBER = 10
MAX_VALUE = 60
PROMPT_TOKENS = 8
SIGNS = ("+", "-", "*", "/")
WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<think>", "</think>", "_", "to",
    "+", "-", "*", "/", "=", "(", ")", "yes", "no",
)  # fmt: skip
RESERVED = tuple(f"<reserved_{i}>" for i in range(11))
VOCABULARY = (*WORDS, *RESERVED, *(str(n) for n in range(100)))
ID = {word: i for i, word in enumerate(VOCABULARY)}
NUMBER_OFFSET = ID["0"]

_EQUALS = ID["="]
_SIGN_IDS = tuple(ID[s] for s in SIGNS)
PAD, BOS, EOS, THINK, END_THINK = (ID[w] for w in ("<pad>", "<bos>", "<eos>", "<think>", "</think>"))

Check = Literal["exact", "at_least"]
"""What the value of an answer has to be; see `verify`."""

_PAIRS = np.array([(i, j) for i in range(SLOTS) for j in range(SLOTS) if i != j])


@dataclass(frozen=True)
class Problem:
    """Numbers (3 or 4 of 1..10, in prompt order) and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return " ".join(VOCABULARY[i] for i in self.prompt_ids)

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        blanks = (ID["_"],) * (SLOTS - len(self.numbers))
        values = (NUMBER_OFFSET + n for n in self.numbers)
        return (BOS, *blanks, *values, ID["to"], NUMBER_OFFSET + self.target, THINK)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.numbers))} -> {self.target}"


def verify(problem: Problem, response: str, finished: bool = True, check: Check = "exact") -> Verdict:
    """Grade a response by exact integer arithmetic.

    Correct means: the response ended with `<eos>` (`finished`), it holds exactly one `</think>`, what follows parses,
    uses each number of the problem exactly once, and has the target as value. Commuted operands of + and * give the
    same `answer`, so that distinct solutions can be counted. An answer that cannot be parsed is `None`.

    `check="at_least"` is a verifier with a hole, for showing what a policy does with one: it takes "reach the target"
    for "be no smaller".
    """
    text, reason = _written(response, finished)
    return Verdict(False, None, reason) if text is None else _grade(problem, text, check)


def read(response: str, finished: bool = True) -> str | None:
    """The answer's expression with the operands of + and * in one order, or `None`; no problem is looked at."""
    text, _ = _written(response, finished)
    try:
        return None if text is None else parse(text).canonical
    except ExpressionError:
        return None


def _written(response: str, finished: bool) -> tuple[str | None, str]:
    """What stands after `</think>`, cut where it is too long to be parsed, or `None` and the reason."""
    if not finished:
        return None, "no <eos> within the length limit"
    if response.count("</think>") != 1:
        return None, "needs exactly one </think>"
    return response.split("</think>")[1].replace("<eos>", "").strip()[: MAX_CHARACTERS + 1], ""


@lru_cache(maxsize=65536)
def _grade(problem: Problem, text: str, check: Check) -> Verdict:
    try:
        expression = parse(text)
    except ExpressionError as error:
        return Verdict(False, None, f"answer does not parse: {error}", refused=isinstance(error, TooLarge))
    if sorted(expression.leaves) != sorted(problem.numbers):
        return Verdict(False, expression.canonical, "does not use each number exactly once")
    reached = expression.value >= problem.target if check == "at_least" else expression.value == problem.target
    if not reached:
        return Verdict(False, expression.canonical, f"gives {expression.value}, not {problem.target}")
    return Verdict(True, expression.canonical, "correct")


@dataclass(frozen=True)
class Chains:
    """N random chains of legal steps, vectorised.

    numbers [N, 4] (0 in the unused first slot), count [N] in {3, 4}, steps [N, 3, 4] as (a, sign, b, result), slots
    [N, 3, 2] as the places of a and b; the result takes the place of a. Rows of unused steps are 0.
    """

    numbers: np.ndarray
    count: np.ndarray
    steps: np.ndarray
    slots: np.ndarray

    @property
    def result(self) -> np.ndarray:
        last: np.ndarray = self.steps[np.arange(len(self.count)), self.count - 2, 3]
        return last


def draw_numbers(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n, 4] uniform on 1..10 and their count [n], three or four with equal probability."""
    count = rng.integers(3, SLOTS + 1, n)
    numbers = rng.integers(1, MAX_NUMBER + 1, (n, SLOTS))
    numbers[count == 3, 0] = 0
    return numbers, count


def random_chains(numbers: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> Chains:
    """For each row draw, step by step, uniformly among the legal (pair, sign) choices until one value is left."""
    n = len(count)
    rows = np.arange(n)
    values = numbers.copy()
    steps = np.zeros((n, SLOTS - 1, 4), dtype=np.int16)
    slots = np.zeros((n, SLOTS - 1, 2), dtype=np.int8)
    for step in range(SLOTS - 1):
        active = step < count - 1
        a, b = values[:, _PAIRS[:, 0]], values[:, _PAIRS[:, 1]]
        results, legal = _outcomes(a, b)
        draw = np.where(legal, rng.random(legal.shape), -1.0).reshape(n, -1)
        pair, sign = np.divmod(draw.argmax(1), len(SIGNS))
        first, second = _PAIRS[pair, 0], _PAIRS[pair, 1]
        outcome = results[rows, pair, sign]
        steps[active, step] = np.stack([values[rows, first], sign, values[rows, second], outcome], 1)[active]
        slots[active, step] = np.stack([first, second], 1)[active]
        values[rows[active], first[active]] = outcome[active]
        values[rows[active], second[active]] = 0
    return Chains(numbers, count, steps, slots)


def _outcomes(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Results and legality [N, pairs, signs]; a value of 0 marks an empty place."""
    safe = np.maximum(b, 1)
    results = np.stack([a + b, a - b, a * b, a // safe], -1)
    first_of_equals = _PAIRS[:, 0] < _PAIRS[:, 1]
    ordered = (b > 0) & ((a > b) | ((a == b) & first_of_equals))
    legal = np.stack([a + b <= MAX_VALUE, a > b, (a * b <= MAX_VALUE) & (b > 1), (a % safe == 0) & (b > 1)], -1)
    return results, legal & ordered[..., None]


def held_out(numbers: np.ndarray, target: np.ndarray) -> np.ndarray:
    """True for the tenth of all problems that no training ever sees: a hash of the sorted numbers and the target."""
    key = target.astype(np.uint64)
    for column in np.sort(numbers, axis=1).T:
        key = key * np.uint64(61) + column.astype(np.uint64)
    key = (key * np.uint64(0x9E3779B97F4A7C15)) ^ (key >> np.uint64(7))
    out: np.ndarray = (key >> np.uint64(40)) % np.uint64(10) == 0
    return out


def solvable_chains(n: int, rng: np.random.Generator, evaluation: bool) -> Chains:
    """n chains whose end value is a fair target (not one of the numbers), all from the asked side of the split."""
    parts: list[Chains] = []
    found = 0
    while found < n:
        numbers, count = draw_numbers((n - found) * (14 if evaluation else 2) + 64, rng)
        chains = random_chains(numbers, count, rng)
        target = chains.result.astype(np.int64)
        keep = ~(numbers == target[:, None]).any(1) & (held_out(numbers, target) == evaluation)
        parts.append(Chains(numbers[keep], count[keep], chains.steps[keep], chains.slots[keep]))
        found += int(keep.sum())
    columns = [np.concatenate([getattr(p, f) for p in parts])[:n] for f in ("numbers", "count", "steps", "slots")]
    return Chains(*columns)


def problems(n: int, seed: int, evaluation: bool = False) -> list[Problem]:
    """n distinct problems; `evaluation=True` draws from the held-out tenth."""
    rng = np.random.default_rng([seed, int(evaluation)])
    found: dict[tuple[tuple[int, ...], int], Problem] = {}
    while len(found) < n:
        chains = solvable_chains(n, rng, evaluation)
        for numbers, count, target in zip(chains.numbers, chains.count, chains.result, strict=True):
            problem = Problem(tuple(int(v) for v in numbers[SLOTS - count :]), int(target))
            found.setdefault((tuple(sorted(problem.numbers)), problem.target), problem)
    return list(found.values())[:n]


@dataclass(frozen=True)
class Traces:
    """How reasoning traces are written.

    `attempts` at most, each with probability `goal_directed` the chain that made the problem, else a fresh random one;
    after `no`, give up with probability `give_up` (the last allowed `no` always closes).
    """

    attempts: int
    goal_directed: float = 0.4
    give_up: float = 0.3

    @property
    def max_tokens(self) -> int:
        """Longest possible response: attempts of three steps and a verdict, `</think>`, an 11-token answer, `<eos>`."""
        return self.attempts * (5 * (SLOTS - 1) + 1) + 1 + 11 + 1


SINGLE = Traces(attempts=1)
RETRIES = Traces(attempts=5)


def traces(n: int, style: Traces, rng: np.random.Generator) -> Iterator[list[int]]:
    """n full token sequences, prompt included, on problems outside the held-out tenth."""
    goal = solvable_chains(n, rng, evaluation=False)
    shape = (n, style.attempts)
    directed = (rng.random(shape) < style.goal_directed).tolist()
    quits = (rng.random(shape) < style.give_up).tolist()
    fresh = [random_chains(goal.numbers, goal.count, rng) for _ in range(style.attempts)]
    candidates = zip(*(list(_rows(chains)) for chains in fresh), strict=True)
    numbers, count = goal.numbers.tolist(), goal.count.tolist()
    for i, (meant, drawn) in enumerate(zip(_rows(goal), candidates, strict=True)):
        used, target = numbers[i][SLOTS - count[i] :], meant[0][-1][3]
        tokens = list(Problem(tuple(used), target).prompt_ids)
        for attempt in range(style.attempts):
            steps, slots = meant if directed[i][attempt] else drawn[attempt]
            tokens += _write_steps(steps)
            solved = steps[-1][3] == target
            tokens.append(ID["yes"] if solved else ID["no"])
            if solved or quits[i][attempt]:
                break
        yield [*tokens, END_THINK, *_write_answer(numbers[i], steps, slots), EOS]


def _rows(chains: Chains) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Steps and slots of each chain as plain lists, unused rows dropped."""
    for count, steps, slots in zip(chains.count.tolist(), chains.steps.tolist(), chains.slots.tolist(), strict=True):
        yield steps[: count - 1], slots[: count - 1]


def _write_steps(steps: list[list[int]]) -> list[int]:
    tokens: list[int] = []
    for a, sign, b, result in steps:
        tokens += [NUMBER_OFFSET + a, _SIGN_IDS[sign], NUMBER_OFFSET + b, _EQUALS, NUMBER_OFFSET + result]
    return tokens


def _write_answer(numbers: list[int], steps: list[list[int]], slots: list[list[int]]) -> list[int]:
    """The chain as one infix expression; every operand that is itself a result stands in brackets."""
    place = [[NUMBER_OFFSET + v] for v in numbers]
    last: list[int] = []
    for (_, sign, _, _), (first, second) in zip(steps, slots, strict=True):
        last = [*_bracketed(place[first]), _SIGN_IDS[sign], *_bracketed(place[second])]
        place[first] = last
    return last


def _bracketed(tokens: list[int]) -> list[int]:
    return tokens if len(tokens) == 1 else [ID["("], *tokens, ID[")"]]


def token_class(response: Sequence[str]) -> list[str]:
    """Name what each response token does: operand, sign, equals, result, verdict, close, answer or end.

    A response that breaks the format gets `other` from the first token that does not fit.
    """
    names: list[str] = []
    place, answering = 0, False
    for word in response:
        if word == "<eos>":
            names.append("end")
        elif answering:
            names.append("answer")
        elif word == "</think>":
            names.append("close")
            answering = True
        elif word in ("yes", "no") and place == 0:
            names.append("verdict")
        else:
            name, fits = _STEP[place](word)
            if not fits:
                return names + ["other"] * (len(response) - len(names))
            names.append(name)
            place = (place + 1) % 5
    return names


_STEP = (
    lambda w: ("first operand", w.isdecimal()),
    lambda w: ("operator", w in SIGNS),
    lambda w: ("second operand", w.isdecimal()),
    lambda w: ("equals", w == "="),
    lambda w: ("result", w.isdecimal()),
)


def arithmetic_slips(response: Sequence[str]) -> tuple[int, int]:
    """Wrong and all steps `a op b = c` of the thinking part, read as windows of five tokens."""
    words = list(response)
    names = token_class(words)
    wrong = total = 0
    for i, name in enumerate(names):
        if name != "result":
            continue
        a, sign, b, _, c = words[i - 4 : i + 1]
        total += 1
        try:
            wrong += parse(f"{a}{sign}{b}").value != int(c)
        except ExpressionError:
            wrong += 1
    return wrong, total
