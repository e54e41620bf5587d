"""Imperfect demonstrations for the environments: writers that know what to do, and often do something else.

Every step is, with probability `slip`, a useless, a missing or a wrong one; now and then it cannot be read at all. So
the base policy that learns from them knows a good mode and a broad mode, and reinforcement learning only has to
re-weight them. Questions of the held-out tenth are never demonstrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import feedback, maze, triples
from .base import Environment, Turn, advance, held_out
from .triples import TriplesTask
from .words import ATTRIBUTE, ENTITIES, ID, NUMBERS, RELATIONS, encode

PROMPT_TOKENS = 5
"""Of the shortest prompt, `<bos> query E7 boss ?`."""
OPEN, CLOSE, ASKED = ID["<result>"], ID["</result>"], ID["?"]


@dataclass(frozen=True)
class Demonstrations:
    """How demonstrations are written: the share of each environment, and its probability of a slip per step."""

    triples: float = 0.4
    maze: float = 0.35
    feedback: float = 0.25
    triples_slip: float = 0.3
    maze_slip: float = 0.65
    feedback_slip: float = 0.4
    garbled: float = 0.02
    """Probability that a word of an action is lost, which mostly makes it invalid."""

    @property
    def max_tokens(self) -> int:
        """Longest possible response."""
        return 16 * (8 + 5)


HASTY = Demonstrations()


class Author:
    """Writes one episode, action by action: `last` is what the environment said."""

    def __init__(self, problem: Any, rng: Random, slip: float) -> None:
        self.problem, self.rng, self.slip = problem, rng, slip

    def act(self, last: str) -> str:
        """The next action."""
        raise NotImplementedError

    def slips(self, share: float = 1.0) -> bool:
        """Whether this step is one of the bad ones."""
        return self.rng.random() < self.slip * share


class Searcher(Author):
    """Follows the chain of a question, with a useless, missing or wrong step now and then."""

    def __init__(self, problem: triples.Problem, rng: Random, slip: float) -> None:
        super().__init__(problem, rng, slip)
        self.at, self.hop, self.advance, self.calculated = problem.start, 0, False, False

    def act(self, last: str) -> str:
        said = last.split()[1:-1] if last else []
        if self.advance and said and said[0] not in ("none", "invalid", "error"):
            self.at = said[0]
            self.hop += not self.calculated
        self.advance = False
        if self.hop < len(self.problem.relations):
            return self._search()
        if self.problem.added and not self.calculated and self.at.isdecimal():
            return self._sum()
        if self.slips(0.4):
            return f"<answer> {self.rng.choice(NUMBERS[10:70] if self.at.isdecimal() else ENTITIES)} </answer>"
        return f"<answer> {self.at} </answer>"

    def _search(self) -> str:
        relation = self.problem.relations[self.hop]
        if self.slips():
            kind = self.rng.choice(("useless", "wrong", "missing", "early"))
            if kind == "useless":
                return f"<search> {self.rng.choice(ENTITIES)} {self.rng.choice((*RELATIONS, ATTRIBUTE))} </search>"
            if kind == "early":
                return f"<answer> {self.at} </answer>"
            if kind == "wrong":
                relation = self.rng.choice(RELATIONS)
            elif self.hop + 1 < len(self.problem.relations):
                self.hop += 1
                relation = self.problem.relations[self.hop]
        self.advance = True
        return f"<search> {self.at} {relation} </search>"

    def _sum(self) -> str:
        age, by = int(self.at), self.problem.added
        if self.slips():
            kind = self.rng.choice(("head", "operand", "skip"))
            if kind == "skip":
                return f"<answer> {self.at} </answer>"
            if kind == "head":
                return f"<answer> {age + by + self.rng.randint(-2, 2)} </answer>"
            by = self.rng.choice((-1, 1)) * self.rng.randint(1, triples.MOST_ADDED)
        self.advance = self.calculated = True
        return f"<calc> {self.at} {'+' if by > 0 else '-'} {abs(by)} </calc>"


class Walker(Author):
    """Explores the ring in one direction, remembers what it saw, and wanders off now and then."""

    def __init__(self, problem: maze.Problem, rng: Random, slip: float) -> None:
        super().__init__(problem, rng, slip)
        self.state = maze.State(problem.start, problem.keys)
        self.seen: set[int] = set()
        self.direction = rng.choice((-1, 1))

    def act(self, last: str) -> str:
        self.seen.add(self.state.at)
        action = self.rng.choice(maze.ACTIONS) if self.slips() else self._best()
        self.state = maze.MazeTask().step(self.problem, self.state, f"<act> {action} </act>").state
        return f"<act> {action} </act>"

    def _best(self) -> str:
        wanted = next((room for room, metal in self.state.keys if metal == self.problem.metal), None)
        ready = self.state.held == self.problem.metal
        target = self.problem.door if ready else wanted
        if target == self.state.at:
            return "open door" if ready else "take key"
        count = len(self.problem.rooms)
        step = self.direction
        if target in self.seen and target is not None:
            step = 1 if (target - self.state.at) % count <= count // 2 else -1
        return "go right" if step > 0 else "go left"


class Guesser(Author):
    """Guesses near the solution and heeds the hints, unless it does not."""

    def __init__(self, problem: feedback.Problem, rng: Random, slip: float) -> None:
        super().__init__(problem, rng, slip)
        self.low, self.high, self.guess = 1, feedback.MOST_X, 0

    def act(self, last: str) -> str:
        if "higher" in last:
            self.low = max(self.low, self.guess + 1)
        if "lower" in last:
            self.high = min(self.high, self.guess - 1)
        if self.slips() or self.low > self.high:
            self.guess = self.rng.randint(1, feedback.MOST_X)
        else:
            near = round(self.rng.gauss(self.problem.x, 3.0))
            self.guess = min(max(near, self.low), self.high)
        return f"<answer> {self.guess} </answer>"


AUTHORS: dict[str, tuple[Any, Any, type[Author]]] = {
    "triples": (TriplesTask(), lambda rng: triples.draw(rng, (1, 2, 3), ("entity", "age", "sum")), Searcher),
    "maze": (maze.MazeTask(), lambda rng: maze.draw(rng, tuple(maze.ROOMS)), Walker),
    "feedback": (feedback.FeedbackTask(), feedback.draw, Guesser),
}


def demonstration(
    environment: Environment[Any], problem: Any, author: Author, rng: Random, garbled: float
) -> tuple[str, list[Turn]]:
    """One episode as text, and its turns."""
    state, last, text = environment.reset(problem), "", [problem.prompt]
    turns: list[Turn] = []
    while not turns or not turns[-1].done:
        words = author.act(last).split()
        if rng.random() < garbled:
            words.pop(rng.randrange(len(words) - 1))
        turn = advance(environment, problem, state, " ".join(words), len(turns))
        turns.append(turn)
        state, last = turn.state, turn.observation
        text += [*words, last]
    return " ".join([*text, "<eos>"]), turns


def demonstrations(n: int, style: Demonstrations, seed: Sequence[int]) -> Iterator[list[int]]:
    """n token sequences, prompts included, of the three environments mixed."""
    rng = Random(f"demonstrations of agents {list(seed)}")
    names = list(AUTHORS)
    for name in rng.choices(names, [getattr(style, name) for name in names], k=n):
        environment, draw, author = AUTHORS[name]
        while held_out((problem := draw(rng)).key):
            pass
        writer = author(problem, rng, getattr(style, f"{name}_slip"))
        yield encode(demonstration(environment, problem, writer, rng, style.garbled)[0])


def learned(ids: Sequence[int]) -> list[bool]:
    """Which tokens of a demonstration the policy has to write: those after the prompt and outside of results."""
    found, inside = [], False
    start = ids.index(ASKED)
    for place, word in enumerate(ids):
        inside = inside or word == OPEN
        found.append(place > start and not inside)
        inside = inside and word != CLOSE
    return found
