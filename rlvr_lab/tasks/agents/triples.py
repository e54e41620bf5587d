"""Questions of one to three hops over synthetic triples, with a search and a calculator.

    prompt     <bos> query E7 boss friend age + 3 ?
    episode    <search> E7 boss </search> <result> E12 </result> <search> E12 friend </search> <result> E3 </result>
               <search> E3 age </search> <result> 34 </result> <calc> 34 + 3 </calc> <result> 37 </result>
               <answer> 37 </answer>

reads: the age of the friend of the boss of E7, plus 3. Every problem has a corpus of its own, drawn from its number, so
that answers cannot be learned by heart: they have to be looked up. An entity lacks a relation now and then
(`<result> none </result>`), and a third of the entities have no age; questions are drawn so that they have an answer.

With `ambiguous`, a search gives three candidates in random order, `<result> E5 or E12 or E30 </result>`, and
`<search> E7 boss E12 </search>` says `yes` or `no`. After section 9 of our notes on AEPO (arXiv 2510.14545) [inferred].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from random import Random
from typing import Literal, get_args

from ...errors import UserError, nearest
from ..base import Verdict
from ..expressions import ExpressionError, parse
from . import tools as toolbox
from .base import Call, TextEnvironment, Turn, clean, distinct, read_call, replay
from .tools import ChildTool
from .words import ATTRIBUTE, ENTITIES, RELATIONS

YOUNGEST, OLDEST = 10, 60
LACKS_RELATION, LACKS_AGE = 0.1, 1 / 3
MOST_ADDED = 9
Ending = Literal["entity", "age", "sum"]
Reward = Literal["plain", "aepo"]
TAGS = ("search", "calc", "answer")


@lru_cache(maxsize=8192)
def corpus(number: int) -> Mapping[tuple[str, str], str]:
    """The triples of a corpus: (entity, relation) to entity or age."""
    rng = Random(f"triples corpus {number}")
    found: dict[tuple[str, str], str] = {}
    for entity in ENTITIES:
        for relation in RELATIONS:
            if rng.random() >= LACKS_RELATION:
                found[entity, relation] = ENTITIES[rng.randrange(len(ENTITIES))]
        if rng.random() >= LACKS_AGE:
            found[entity, ATTRIBUTE] = str(rng.randint(YOUNGEST, OLDEST))
    return found


@dataclass(frozen=True)
class Problem:
    """A chain of relations from `start` in a corpus; `added` is 0 where the question does not end in a sum."""

    corpus: int
    start: str
    relations: tuple[str, ...]
    added: int = 0

    @cached_property
    def sum_words(self) -> str:
        """The end of the question, `+ 3` or `- 3` or nothing."""
        return f"{'+' if self.added > 0 else '-'} {abs(self.added)}" if self.added else ""

    @property
    def key(self) -> str:
        """The question, whatever the corpus: evaluation asks questions that no training asked."""
        return " ".join((self.start, *self.relations, self.sum_words)).strip()

    @property
    def prompt(self) -> str:
        return f"<bos> query {self.key} ?"

    @cached_property
    def chain(self) -> tuple[str, ...]:
        """What each hop finds; shorter than `relations` where one finds nothing."""
        found: list[str] = []
        for relation in self.relations:
            at = corpus(self.corpus).get((found[-1] if found else self.start, relation))
            if at is None:
                break
            found.append(at)
        return tuple(found)

    @property
    def answer(self) -> str:
        """What is right. Raises ValueError where a hop finds nothing."""
        if len(self.chain) < len(self.relations):
            raise ValueError(f"{self} has no answer")
        last = self.chain[-1]
        return str(int(last) + self.added) if self.added else last

    def __str__(self) -> str:
        return self.key


def draw(rng: Random, hops: Sequence[int], endings: Sequence[Ending]) -> Problem:
    """A problem with an answer: `hops` relations between entities, and perhaps an age and a sum on top."""
    while True:
        count, ending = rng.choice(hops), rng.choice(endings)
        relations = [rng.choice(RELATIONS) for _ in range(count if ending == "entity" else count - 1)]
        relations += [] if ending == "entity" else [ATTRIBUTE]
        added = rng.choice((-1, 1)) * rng.randint(1, MOST_ADDED) if ending == "sum" else 0
        problem = Problem(rng.randrange(2**31), rng.choice(ENTITIES), tuple(relations), added)
        if len(problem.chain) == len(relations):
            return problem


@dataclass(frozen=True)
class State:
    """What of an episode its verdict needs."""

    answer: str | None = None
    """The text of the answer tag; None before it."""


@dataclass(frozen=True)
class TriplesTask(TextEnvironment):
    """k-hop questions with tools; an age counts as a hop, so `hops` of 2 is "the age of the boss of E7".

    `endings`: what questions end in, an entity, an age, or a sum on an age. `ambiguous`: see the head of this module.
    `tools` are further tools by tag, `{"date": "my_tools:date"}`, run in a child process with `tool_seconds` each.
    `reward`: "plain" is success, 0 or 1; "aepo" adds the points `format`, -1 where no answer could be read or an action
    was invalid, and `tools`, 0.1 where the answer is right and both search and calculator were used.
    Raises UserError for settings outside these.
    """

    hops: tuple[int, ...] = (1, 2, 3)
    endings: tuple[Ending, ...] = ("entity", "age", "sum")
    ambiguous: bool = False
    reward: Reward = "plain"
    tools: Mapping[str, str] = field(default_factory=dict)
    tool_seconds: float = 2.0
    max_turns: int = 6
    turn_tokens: int = 12
    name: str = "triples"

    guide = (
        "Answer a question about people. 'query E7 boss age + 3' asks for the age of the boss of E7, plus 3. "
        "Look one relation up with <search> E7 boss </search>, compute with <calc> 12 + 3 </calc>; what they find "
        "comes back between <result> tags. End with the answer alone, <answer> 15 </answer>."
    )

    def __post_init__(self) -> None:
        for ending in self.endings:
            if ending not in get_args(Ending):
                raise UserError(f"data.settings.endings: '{ending}' is none; {nearest(ending, get_args(Ending))}")
        if self.reward not in get_args(Reward):
            raise UserError(
                f"data.settings.reward '{self.reward}' is unknown; {nearest(self.reward, get_args(Reward))}"
            )
        if not self.hops or not self.endings or any(not 1 <= hop <= 8 for hop in self.hops):
            raise UserError(f"data.settings.hops must be numbers from 1 to 8, not {list(self.hops)}")
        if self.max_turns < 1 or self.turn_tokens < 1:
            raise UserError("data.settings.max_turns and turn_tokens must be at least 1")
        if self.tool_seconds <= 0:
            raise UserError(f"data.settings.tool_seconds must be more than 0, not {self.tool_seconds}")
        for tag, function in self.tools.items():
            ChildTool(function, self.tool_seconds)  # refuses what is no function's name
            if not tag.isidentifier() or tag in (*TAGS, "result"):
                raise UserError(f"data.settings.tools: '{tag}' cannot be the tag of a further tool")

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the actions that can be read."""
        return (*TAGS, *self.tools)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(f"</{tag}>" for tag in self.tags)

    @property
    def point_names(self) -> tuple[str, ...]:
        """Names of the partial credits that a verdict may hold."""
        return ("format", "tools") if self.reward == "aepo" else ()

    def problems(self, count: int, seed: int, evaluation: bool = False) -> list[Problem]:
        """At most `count` problems of different questions."""
        return distinct(lambda rng: draw(rng, self.hops, self.endings), count, f"triples {seed}", evaluation)

    def reset(self, problem: Problem) -> State:
        return State()

    def step(self, problem: Problem, state: State, action: str) -> Turn:
        asked = read_call(action, self.tags)
        if asked is None:
            return Turn(state, toolbox.result(toolbox.UNREADABLE), False, valid=False)
        if asked.tag == "answer":
            return Turn(State(asked.argument), "", True)
        return Turn(state, self._observe(problem, asked), False, tool=asked.tag)

    def _observe(self, problem: Problem, asked: Call) -> str:
        if asked.tag == "search":
            return toolbox.result(self._search(problem, asked.argument.split()))
        if asked.tag == "calc":
            return toolbox.call(toolbox.calculator, asked.argument)
        return toolbox.call(ChildTool(self.tools[asked.tag], self.tool_seconds), asked.argument)

    def _search(self, problem: Problem, query: Sequence[str]) -> str:
        if len(query) not in (2, 3):
            return toolbox.NONE
        found = corpus(problem.corpus).get((query[0], query[1]))
        if found is None or (len(query) == 3 and not self.ambiguous):
            return toolbox.NONE
        if len(query) == 3:
            return "yes" if query[2] == found else "no"
        if not self.ambiguous or query[1] == ATTRIBUTE:
            return found
        rng = Random(f"{problem.corpus} {query[0]} {query[1]}")
        others = rng.sample([entity for entity in ENTITIES if entity != found], 2)
        return " or ".join(rng.sample([found, *others], 3))

    def verdict(self, problem: Problem, actions: Sequence[str], finished: bool) -> Verdict:
        """Right where the answer is exactly the entity, or a number of the right value."""
        episode = replay(self, problem, actions)
        answer, reason = read_answer(episode.state.answer if finished else None, finished)
        right = answer == problem.answer
        points: dict[str, float] = {}
        if self.reward == "aepo":
            both = {"search", "calc"} <= set(episode.tools)
            points = {
                "format": -1.0 if answer is None or episode.invalid else 0.0,
                "tools": 0.1 if right and both else 0.0,
            }
        return Verdict(right, answer, "correct" if right else reason or f"not {problem.answer}", points=points)

    def read(self, response_text: str, finished: bool) -> str | None:
        """The inside of the last answer tag, whatever the question."""
        asked = read_call(response_text[-2000:], ("answer",)) if finished else None
        return read_answer(asked.argument)[0] if asked else None


def read_answer(text: str | None, finished: bool = True) -> tuple[str | None, str]:
    """An entity or a whole number in the form that equal answers share, or None and the reason."""
    if text is None:
        return None, "no answer" if finished else "no answer within the limits"
    if text in ENTITIES:
        return text, ""
    try:
        sign = -1 if text.startswith("-") else 1
        found = parse(text.removeprefix("-"))
    except ExpressionError as error:
        return None, f"the answer does not parse: {error}"
    if len(found.leaves) != 1:
        return None, f"the answer is a calculation: {clean(text, 40)}"
    return str(sign * found.value), ""
