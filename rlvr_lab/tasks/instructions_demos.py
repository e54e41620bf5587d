"""Imperfect demonstrations for `tasks.instructions`: writers that preview some of the rules and keep those.

Every rule is previewed with probability `attention`, independently. The answer keeps the rules of the preview; the
others only by chance. So a complete preview is always right: the lazy reasoning of Light-IF (arXiv 2508.03178) in
small. What the thinking part leaves out, the answer ignores, and reinforcement learning has to find that it pays to
leave nothing out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from . import countdown
from .instructions import MARKS, MAX_RESPONSE_TOKENS, SLOTS, Problem, Row, Rule, draw_problem, draw_row, held_out, kept
from .instructions import read_row as _read_row

ATTEMPTS = 60


@dataclass(frozen=True)
class Demonstrations:
    """How demonstrations are written. `attention`: probability that a rule is previewed and kept."""

    attention: float = 0.35

    @property
    def max_tokens(self) -> int:
        """Longest possible response."""
        return MAX_RESPONSE_TOKENS


LAZY = Demonstrations()


def write_row(problem: Problem, rules: Sequence[Rule], rng: Random) -> Row:
    """A row that keeps `rules`, some of the problem's: a random one where one is found soon, else its solution."""
    for _ in range(ATTEMPTS):
        row = draw_row(rules, rng)
        if all(kept(row, rules)):
            return row
    solution = _read_row(problem.solution)
    assert solution is not None
    return solution


def demonstration(problem: Problem, attention: float, rng: Random) -> list[int]:
    """One token sequence, prompt included."""
    minded = [rule for rule in problem.rules if rng.random() < attention]
    row = write_row(problem, minded, rng)
    words = [*(MARKS[rule.kind] for rule in minded), "</think>", *row.text.split(), "<eos>"]
    return [*problem.prompt_ids, *(countdown.ID[word] for word in words)]


def demonstrations(n: int, style: Demonstrations, seed: Sequence[int]) -> Iterator[list[int]]:
    """n token sequences on problems outside the held-out tenth, of one to four rules alike."""
    rng = Random(f"demonstrations {list(seed)}")
    for _ in range(n):
        while held_out(problem := draw_problem(rng, rng.randint(1, SLOTS))):
            pass
        yield demonstration(problem, style.attention, rng)
