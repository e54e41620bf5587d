"""A treasure hunt in a ring of rooms: long, sparse, and with a mistake that cannot be undone.

    prompt     <bos> maze 5 iron key ? <result> red </result>
    episode    <act> go left </act> <result> blue iron key </result> <act> take key </act> <result> taken </result>
               <act> go right </act> <result> red </result> <act> go right </act> <result> green door </result>
               <act> open door </act>

reads: in a ring of 5 rooms, fetch the iron key and open the door; you stand in the red room. Who opens without the key,
with the wrong key, or where there is no door, has lost for good. Only the present room is seen, the turn is not told,
and early and late observations are made of the same words. An action that cannot be read costs a turn, and
`invalid_cost` as a point.

Families: `five`, `six` and `seven` rooms; `decoy`, five rooms with a second key of another metal that does not fit.
Each has seen variations (training) and unseen ones (evaluation). After section 9 of our notes on EPO
(arXiv 2509.22576); the pilot there has 5 rooms, 6 actions, 16 turns [inferred].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from ...errors import UserError, nearest
from ..base import Verdict
from . import tools as toolbox
from .base import TextEnvironment, Turn, distinct, read_call, replay
from .words import COLOURS, METALS

Family = Literal["five", "six", "seven", "decoy"]
ROOMS: dict[str, int] = {"five": 5, "six": 6, "seven": 7, "decoy": 5}
ACTIONS = ("go left", "go right", "take key", "open door", "wait", "look")


@dataclass(frozen=True)
class Problem:
    """A ring of rooms by colour. `keys` are (room, metal), the first of the metal that fits; places are numbers."""

    family: str
    rooms: tuple[str, ...]
    start: int
    door: int
    keys: tuple[tuple[int, str], ...]

    @property
    def metal(self) -> str:
        """The metal of the key that fits."""
        return self.keys[0][1]

    @property
    def key(self) -> str:
        """The variation, seen from the room where it starts."""
        ring = [*self.rooms[self.start :], *self.rooms[: self.start]]
        places = [(at - self.start) % len(ring) for at in (self.door, *(room for room, _ in self.keys))]
        return f"{self.family} {' '.join(ring)} {places} {self.metal}"

    @property
    def prompt(self) -> str:
        here = describe(self, State(self.start, self.keys))
        return f"<bos> maze {len(self.rooms)} {self.metal} key ? {toolbox.result(here)}"

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class State:
    """Where the policy stands, the keys that still lie about, and the metal of the one it holds."""

    at: int
    keys: tuple[tuple[int, str], ...]
    held: str | None = None
    opened: bool | None = None
    """Whether the door opened; None before anyone tried."""


def describe(problem: Problem, state: State) -> str:
    """What is seen of the present room."""
    lying = [f"{metal} key" for room, metal in state.keys if room == state.at]
    door = ["door"] if state.at == problem.door else []
    return " ".join((problem.rooms[state.at], *lying, *door))


def draw(rng: Random, families: Sequence[str]) -> Problem:
    """A variation of one of the families: colours, start, and different rooms for door and keys; the start may hold any
    of them."""
    family = rng.choice(families)
    count = ROOMS[family]
    number = 2 if family == "decoy" else 1
    door, *places = rng.sample(range(count), number + 1)
    metals = rng.sample(METALS, number)
    keys = tuple(zip(places, metals, strict=True))
    return Problem(family, tuple(rng.sample(COLOURS, count)), rng.randrange(count), door, keys)


@dataclass(frozen=True)
class MazeTask(TextEnvironment):
    """Treasure hunts of the given `families`.

    The point `invalid` is -`invalid_cost` for every action that could not be read; 0 drops the point. Raises UserError
    for a family that does not exist, a negative cost, and limits below 1.
    """

    families: tuple[Family, ...] = ("five",)
    invalid_cost: float = 0.1
    max_turns: int = 16
    turn_tokens: int = 8
    name: str = "maze"

    guide = (
        "You walk through a ring of rooms. Fetch the key that the first line asks for, then open the door. "
        "Write one action at a time: <act> go left </act>, <act> go right </act>, <act> take key </act>, "
        "<act> open door </act>, <act> wait </act> or <act> look </act>. What you see comes back between <result> "
        "tags. Opening without the right key, or where there is no door, loses."
    )
    stops = ("</act>",)

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in ROOMS:
                raise UserError(
                    f"data.settings.families: '{family}' does not exist; {nearest(family, get_args(Family))}"
                )
        if not self.families:
            raise UserError("data.settings.families must name a family, such as five")
        if self.invalid_cost < 0 or self.max_turns < 1 or self.turn_tokens < 1:
            raise UserError("data.settings: invalid_cost must not be negative, max_turns and turn_tokens at least 1")

    @property
    def point_names(self) -> tuple[str, ...]:
        """Names of the partial credits that a verdict may hold."""
        return ("invalid",) if self.invalid_cost else ()

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[Problem]:
        """At most `count` variations, unseen ones for evaluation."""
        return distinct(lambda rng: draw(rng, self.families), count, f"maze {seed}", evaluation)

    def admissible(self, problem: Problem, state: State) -> tuple[str, ...]:
        """The actions that can be read, as text."""
        return tuple(f"<act> {action} </act>" for action in ACTIONS)

    def reset(self, problem: Problem) -> State:
        return State(problem.start, problem.keys)

    def step(self, problem: Problem, state: State, action: str) -> Turn:
        asked = read_call(action, ("act",))
        if asked is None or asked.argument not in ACTIONS:
            return Turn(state, toolbox.result(toolbox.UNREADABLE), False, valid=False)
        verb, _, what = asked.argument.partition(" ")
        if verb == "open":
            opened = state.at == problem.door and state.held == problem.metal
            return Turn(replace(state, opened=opened), "", True, tool=asked.argument)
        if verb == "go":
            to = (state.at + (1 if what == "right" else -1)) % len(problem.rooms)
            state = replace(state, at=to)
        elif verb == "take":
            return self._take(state)
        seen = "nothing" if verb == "wait" else describe(problem, state)
        return Turn(state, toolbox.result(seen), False, tool=asked.argument)

    def _take(self, state: State) -> Turn:
        """Take the key that lies here; the one that was held takes its place."""
        here = [metal for room, metal in state.keys if room == state.at]
        if not here:
            return Turn(state, toolbox.result("nothing"), False, tool="take key")
        rest = tuple(key for key in state.keys if key != (state.at, here[0]))
        left = ((state.at, state.held),) if state.held else ()
        return Turn(replace(state, keys=(*rest, *left), held=here[0]), toolbox.result("taken"), False, tool="take key")

    def verdict(self, problem: Problem, actions: Sequence[str], finished: bool) -> Verdict:
        """Right where the door opened. The answer is the colour of the room where it was tried."""
        episode = replay(self, problem, actions)
        state = episode.state
        points = {"invalid": -self.invalid_cost * episode.invalid} if self.invalid_cost else {}
        if state.opened is None:
            return Verdict(False, None, "never opened the door", points=points)
        won = bool(state.opened) and finished
        reason = "correct" if won else "opened in vain"
        return Verdict(won, problem.rooms[state.at], reason, points=points)

    def read(self, response_text: str, finished: bool) -> str | None:
        """The colour last seen before the door was tried, None where it was not; the start's stands in the prompt."""
        asked = read_call(response_text[-2000:], ("act",)) if finished else None
        if asked is None or asked.argument != "open door":
            return None
        return next((word for word in reversed(response_text.split()) if word in COLOURS), "start")
