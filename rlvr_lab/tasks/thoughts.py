"""Steps of a response and who is to blame for them: cuts by markers, and an exact judge for Countdown traces.

Labels are those of TP-GRPO (arXiv 2507.23317). In a right response 1 is a correct step and 0 an incorrect one, which by
the self-consistency assumption a later reflection undoes. In a wrong one 0 is a step that the answer used, and 1 a step
that it did not use and of which nothing is known. The block with the answer is the last step: 1 where right, else 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from . import countdown
from .expressions import ExpressionError, parse

CLOSE = "</think>"


@dataclass(frozen=True)
class Labelled:
    """Token spans [start, end) of the steps of one response in order, and a label 0 or 1 for each; the last step is the
    block with the answer."""

    spans: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]
    judged: bool = True
    """False where no judgement could be had: every label is that of the answer."""

    def per_token(self) -> tuple[list[int], list[int]]:
        """Label and step number of every token."""
        pairs = [(label, k) for k, ((start, end), label) in enumerate(zip(self.spans, self.labels, strict=True))
                 for _ in range(end - start)]  # fmt: skip
        return [label for label, _ in pairs], [k for _, k in pairs]


def unjudged(spans: Sequence[tuple[int, int]], correct: bool) -> Labelled:
    """Every step with the label of the answer: plain GRPO."""
    return Labelled(tuple(spans), (int(correct),) * len(spans), judged=False)


# -- steps by markers -------------------------------------------------------------------------------------------------


def find_sequence(ids: Sequence[int], marker: Sequence[int], start: int = 0) -> int:
    """First place of `marker` in `ids` at or after `start`; -1 where there is none, or where the marker is empty."""
    n = len(marker)
    if not n:
        return -1
    return next((i for i in range(start, len(ids) - n + 1) if list(ids[i : i + n]) == list(marker)), -1)


def cut_steps(
    ids: Sequence[int], separators: Sequence[Sequence[int]], close: Sequence[int], separates: Callable[[int], bool]
) -> list[tuple[int, int]]:
    """Token spans of the steps of a response: a step ends with its separators, the thinking with the first `close`.

    A separator is a sequence of ids, or one token for which `separates` is true: tokenizers join a line break with what
    stands before it. Several separators in a row belong to one step. What begins with `close` is the last span, the
    block with the answer; without `close` the last step is.
    """
    end_of_thinking = find_sequence(ids, close)
    thinking = ids if end_of_thinking < 0 else ids[:end_of_thinking]
    cut_after = {i for i, token in enumerate(thinking) if separates(token)}
    for marker in separators:
        place = find_sequence(thinking, marker)
        while place >= 0:
            cut_after.add(place + len(marker) - 1)
            place = find_sequence(thinking, marker, place + len(marker))
    spans, start = [], 0
    for i in sorted(cut_after):
        if i + 1 in cut_after or i + 1 == len(thinking):
            continue
        spans.append((start, i + 1))
        start = i + 1
    spans.append((start, len(thinking)))
    if end_of_thinking >= 0:
        spans.append((end_of_thinking, len(ids)))
    return [(a, b) for a, b in spans if b > a]


# -- Countdown --------------------------------------------------------------------------------------------------------


def judge_countdown(words: Sequence[str], correct: bool) -> Labelled:
    """Exact labels of a Countdown trace, one word per token.

    Steps are `a op b = c` and the verdicts. In a right response an attempt that ends in `no` and is followed by another
    is incorrect, and so is any step with a slip of arithmetic; the `no` that notices it is correct. In a wrong one a
    step matches where its operation stands in the answer, and a verdict goes with the step before it. A response
    without a readable answer cannot be matched: all of it has the answer's label.
    """
    close = words.index(CLOSE) if CLOSE in words else len(words)
    thinking = list(words[:close])
    spans, attempts = _countdown_steps(thinking)
    answer = [(close, len(words))] if close < len(words) else []
    if not spans:
        return unjudged([(0, close), *answer] if close else answer, correct)
    used = None if correct else operations(" ".join(words[close + 1 :]).replace("<eos>", ""))
    if not correct and used is None:
        return unjudged([*spans, *answer], correct)
    labels: list[int] = []
    for (start, end), attempt in zip(spans, attempts, strict=True):
        verdict = end - start == 1 and thinking[start] in ("yes", "no")
        if used is not None:
            labels.append(labels[-1] if verdict and labels else int(not _matches(thinking[start:end], used)))
        else:
            undone = attempt < attempts[-1] and not verdict and _verdict(thinking, spans, attempts, attempt) == "no"
            labels.append(int(not undone and (verdict or _right_sum(thinking[start:end]))))
    return Labelled((*spans, *answer), (*labels, *([int(correct)] if answer else [])))


def _countdown_steps(thinking: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """Spans of steps, and the attempt that each belongs to; what breaks the format is one step."""
    names = countdown.token_class(thinking)
    spans: list[tuple[int, int]] = []
    attempts: list[int] = []
    start = attempt = 0
    for i, name in enumerate(names):
        if name in ("result", "verdict") or i + 1 == len(names):
            spans.append((start, i + 1))
            attempts.append(attempt)
            start = i + 1
            attempt += name == "verdict"
    return spans, attempts


def _verdict(thinking: Sequence[str], spans: Sequence[tuple[int, int]], attempts: Sequence[int], attempt: int) -> str:
    last = max(k for k, a in enumerate(attempts) if a == attempt)
    return thinking[spans[last][1] - 1]


def _right_sum(step: Sequence[str]) -> bool:
    """Whether `a op b = c` holds; anything else is not judged and counts as right."""
    if len(step) != 5 or step[3] != "=":
        return True
    try:
        return parse(" ".join(step[:3])).value == int(step[4])
    except (ExpressionError, ValueError):
        return False


def _matches(step: Sequence[str], used: set[tuple[int, str, int]]) -> bool:
    """Whether the operation of `a op b = c` stands in the answer; a step of another form is not judged: it does not."""
    if len(step) != 5 or not (step[0].isdecimal() and step[2].isdecimal()):
        return False
    return _operation(int(step[0]), step[1], int(step[2])) in used


def _operation(a: int, sign: str, b: int) -> tuple[int, str, int]:
    return (b, sign, a) if sign in "+*" and b < a else (a, sign, b)


_PIECE = re.compile(r"\d+|[-+*/()]")


def operations(text: str) -> set[tuple[int, str, int]] | None:
    """The operations (a, sign, b) that an expression computes, operands of + and * in rising order; None where it does
    not parse. Read from the canonical form, in which every operation stands in brackets of its own."""
    try:
        form = parse(text).canonical
    except ExpressionError:
        return None
    found: set[tuple[int, str, int]] = set()
    stack: list[int | str] = []
    for piece in _PIECE.findall(form):
        if piece != ")":
            stack.append(int(piece) if piece.isdecimal() else piece)
            continue
        b, sign, a = stack.pop(), str(stack.pop()), stack.pop()
        stack.pop()  # the opening bracket
        assert isinstance(a, int)
        assert isinstance(b, int)
        found.add(_operation(a, sign, b))
        stack.append({"+": a + b, "-": a - b, "*": a * b}.get(sign, a // b if sign == "/" else 0))
    return found


# -- controls ---------------------------------------------------------------------------------------------------------


def noisy(labelled: Labelled, accuracy: float, draw: Random) -> Labelled:
    """A judge that is right about each thinking step with probability `accuracy`; the answer's label stays."""
    flipped = [label if draw.random() < accuracy else 1 - label for label in labelled.labels[:-1]]
    return Labelled(labelled.spans, (*flipped, *labelled.labels[-1:]), labelled.judged)


def shuffled_runs(labelled: Labelled, share: float, draw: Random) -> Labelled:
    """Labels that say nothing: the thinking steps' runs of equal labels in random order, alternating from a first label
    that is 1 with probability `share`. Run lengths stay as they were; the answer's label too."""
    thinking = labelled.labels[:-1]
    runs = [1] * bool(thinking)
    for before, after in pairwise(thinking):
        if before == after:
            runs[-1] += 1
        else:
            runs.append(1)
    draw.shuffle(runs)
    label, labels = int(draw.random() < share), []
    for length in runs:
        labels += [label] * length
        label = 1 - label
    return Labelled(labelled.spans, (*labels, *labelled.labels[-1:]), labelled.judged)
