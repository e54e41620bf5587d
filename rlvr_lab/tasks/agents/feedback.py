"""Answer, be told what was wrong, try again: equations of one unknown, with a judge that hints.

    prompt     <bos> solve 3 * x + 4 = 52 ?
    episode    <answer> 19 </answer> <result> wrong lower </result> <answer> 16 </answer>

The hint says on which side of the guess the solution lies. The equation can be solved at once; a policy that cannot
calculate can still halve what the hints leave over, and one that does neither runs out of tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from ...errors import UserError, nearest
from ..base import Verdict
from ..expressions import ExpressionError, parse
from . import tools as toolbox
from .base import TextEnvironment, Turn, distinct, read_call, replay

LARGEST = 79
MOST_X, MOST_ADDED = 30, 20
FACTORS = tuple(range(2, 10))
Hint = Literal["side", "none"]


@dataclass(frozen=True)
class Problem:
    """factor * x + added = total; `added` may be negative."""

    factor: int
    added: int
    x: int

    @property
    def total(self) -> int:
        """The right-hand side."""
        return self.factor * self.x + self.added

    @property
    def key(self) -> str:
        """The equation."""
        return f"{self.factor} * x {'-' if self.added < 0 else '+'} {abs(self.added)} = {self.total}"

    @property
    def prompt(self) -> str:
        return f"<bos> solve {self.key} ?"

    def __str__(self) -> str:
        return self.key


def draw(rng: Random) -> Problem:
    """An equation whose numbers are all between 0 and `LARGEST`."""
    while True:
        problem = Problem(rng.choice(FACTORS), rng.randint(-MOST_ADDED, MOST_ADDED), rng.randint(1, MOST_X))
        if 0 <= problem.total <= LARGEST:
            return problem


@dataclass(frozen=True)
class State:
    """The last guess that could be read, and how often one was made."""

    guess: int | None = None
    tries: int = 0


@dataclass(frozen=True)
class FeedbackTask(TextEnvironment):
    """Equations with `max_turns` tries.

    `hint`: "side" says whether the solution is higher or lower than the guess, "none" only that it was wrong.
    `retry_cost`: every try after the first costs that much, as the point `retries`; 0 drops the point. Raises UserError
    for settings outside these.
    """

    hint: Hint = "side"
    retry_cost: float = 0.0
    max_turns: int = 3
    turn_tokens: int = 8
    name: str = "feedback"

    guide = (
        "Find the whole number x. Write a guess as <answer> 16 </answer>; where it is wrong, you are told between "
        "<result> tags whether x is higher or lower, and may guess again."
    )
    stops = ("</answer>",)

    def __post_init__(self) -> None:
        if self.hint not in get_args(Hint):
            raise UserError(f"data.settings.hint '{self.hint}' is unknown; {nearest(self.hint, get_args(Hint))}")
        if self.retry_cost < 0 or self.max_turns < 1 or self.turn_tokens < 1:
            raise UserError("data.settings: retry_cost must not be negative, max_turns and turn_tokens at least 1")

    @property
    def point_names(self) -> tuple[str, ...]:
        """Names of the partial credits that a verdict may hold."""
        return ("retries",) if self.retry_cost else ()

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[Problem]:
        """At most `count` different equations."""
        return distinct(draw, count, f"feedback {seed}", evaluation)

    def reset(self, problem: Problem) -> State:
        return State()

    def step(self, problem: Problem, state: State, action: str) -> Turn:
        asked = read_call(action, ("answer",))
        guess = number(asked.argument) if asked else None
        tries = state.tries + 1
        if guess is None:
            return Turn(State(state.guess, tries), toolbox.result(toolbox.UNREADABLE), False, valid=False)
        if guess == problem.x:
            return Turn(State(guess, tries), "", True)
        side = "" if self.hint == "none" else "lower" if guess > problem.x else "higher"
        return Turn(State(guess, tries), toolbox.result(f"wrong {side}"), False)

    def verdict(self, problem: Problem, actions: Sequence[str], finished: bool) -> Verdict:
        """Right where a guess was; the answer is the last guess."""
        state = replay(self, problem, actions).state
        points = {"retries": -self.retry_cost * max(state.tries - 1, 0)} if self.retry_cost else {}
        if state.guess is None:
            return Verdict(False, None, "no guess could be read", points=points)
        right = finished and state.guess == problem.x
        return Verdict(right, str(state.guess), "correct" if right else f"not {problem.x}", points=points)

    def read(self, response_text: str, finished: bool) -> str | None:
        """The last guess, whatever the equation."""
        end = response_text.rfind("</answer>")
        asked = read_call(response_text[max(end - 2000, 0) : end + len("</answer>")], ("answer",)) if end >= 0 else None
        guess = number(asked.argument) if asked else None
        return None if guess is None else str(guess)


def number(text: str) -> int | None:
    """A whole number, or None for anything else, a calculation included."""
    sign = -1 if text.startswith("-") else 1
    try:
        found = parse(text.removeprefix("-"))
    except ExpressionError:
        return None
    return sign * found.value if len(found.leaves) == 1 else None
