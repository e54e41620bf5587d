"""Environments: tasks of several turns, text in and text out.

The policy writes an *action*, a piece of text that ends with one of the environment's stops; the environment answers
with an *observation*, a piece of text that is put behind the action; and so on until the environment is done. States
are immutable and a pure function of (problem, actions so far): whoever copies the text of an episode may go on from it
elsewhere, and a verdict is a replay.

Whatever a policy writes is answered: `advance` turns what an environment raises into an observation, and ends an
episode at the cap on turns. An environment never has to trust its own tools (`tools.call`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from ..base import Task, Verdict
from . import words

ERROR = "<result> error </result>"
"""The observation where an environment itself raised."""
MAX_ACTION = 4000
"""Most characters of an action that is looked into; a longer one is invalid. Far beyond any sensible `turn_tokens`."""
SPECIAL = ("<bos>", "<eos>", "<pad>")
"""Words of the tiny vocabulary that may stand in an action's text and mean nothing there."""

ProblemT_contra = TypeVar("ProblemT_contra", contravariant=True)


@dataclass(frozen=True)
class Turn:
    """What an environment answers to one action.

    `observation` is "" where nothing needs to be said. `valid`: the action could be read. `tool` names the tool that
    was called, None where none was.
    """

    state: Any
    observation: str
    done: bool
    valid: bool = True
    tool: str | None = None


@runtime_checkable
class Environment(Task[ProblemT_contra], Protocol[ProblemT_contra]):
    """A task of several turns. `isinstance(task, Environment)` tells it from a task of one answer."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an action, such as `</search>`."""

    @property
    def turn_tokens(self) -> int:
        """Most tokens of one action."""

    @property
    def max_turns(self) -> int:
        """Most actions of one episode."""

    def reset(self, problem: ProblemT_contra) -> Any:
        """The state before the first action; immutable. The first observation is part of the prompt."""

    def step(self, problem: ProblemT_contra, state: Any, action: str) -> Turn:
        """Answer one action. Call it through `advance`, which keeps the promises of this module."""

    def verdict(self, problem: ProblemT_contra, actions: Sequence[str], finished: bool) -> Verdict:
        """Judge an episode by its actions alone.

        `finished` says that the episode ended by itself: the environment was done, or the policy wrote its end token.
        False means that a limit cut it.
        """


def advance(environment: Environment[Any], problem: Any, state: Any, action: str, turns: int) -> Turn:
    """The environment's answer to the action after `turns` earlier ones; never raises.

    An exception of the environment becomes the observation `ERROR` of an invalid turn that leaves the state as it was.
    The last turn allowed is done whatever the environment says.
    """
    try:
        turn = environment.step(problem, state, action)
    except Exception:  # whatever the policy wrote must not end the run; RecursionError and MemoryError included
        turn = Turn(state, ERROR, False, valid=False)
    if turns + 1 >= environment.max_turns and not turn.done:
        turn = Turn(turn.state, turn.observation, True, turn.valid, turn.tool)
    return turn


@dataclass(frozen=True)
class Episode:
    """A replayed episode: its turns in order, and the state after the last."""

    start: Any
    turns: tuple[Turn, ...] = ()

    @property
    def state(self) -> Any:
        """The state after the last turn."""
        return self.turns[-1].state if self.turns else self.start

    @property
    def done(self) -> bool:
        """Whether the environment, or the cap on turns, ended the episode."""
        return bool(self.turns) and self.turns[-1].done

    @property
    def invalid(self) -> int:
        """How many actions could not be read."""
        return sum(not turn.valid for turn in self.turns)

    @property
    def tools(self) -> tuple[str, ...]:
        """The tools that were called, in order."""
        return tuple(turn.tool for turn in self.turns if turn.tool is not None)


def replay(environment: Environment[Any], problem: Any, actions: Sequence[str]) -> Episode:
    """Play `actions` from the start; those after the end of the episode are not looked at."""
    start = environment.reset(problem)
    turns: list[Turn] = []
    state = start
    for action in actions:
        turn = advance(environment, problem, state, action, len(turns))
        turns.append(turn)
        state = turn.state
        if turn.done:
            break
    return Episode(start, tuple(turns))


def transcript(environment: Environment[Any], problem: Any, actions: Sequence[str]) -> str:
    """The response that `actions` and the observations on them make together."""
    turns = replay(environment, problem, actions).turns
    parts = (part for action, turn in zip(actions, turns, strict=False) for part in (action, turn.observation))
    return " ".join(part.strip() for part in parts if part.strip())


def split_actions(environment: Environment[Any], problem: Any, response: str) -> list[str]:
    """The actions in the text of a whole episode.

    An action reaches to the first stop; the observation on it is taken off where it stands behind it, word by word.
    Who has the tokens uses their `action_mask` instead: there, what the policy invented is known for sure.
    """
    rest = response
    actions: list[str] = []
    state = environment.reset(problem)
    while rest.strip():
        ends = [at + len(stop) for stop in environment.stops if (at := rest.find(stop)) >= 0]
        end = min(ends, default=len(rest))
        action, rest = rest[:end], rest[end:]
        turn = advance(environment, problem, state, action, len(actions))
        actions.append(action)
        rest = _without(rest, turn.observation)
        state = turn.state
        if turn.done:
            break
    return actions


def _without(text: str, observation: str) -> str:
    """`text` without the words of `observation` at its beginning, or as it is where it begins otherwise."""
    rest = text
    for word in observation.split():
        rest = rest.lstrip()
        if not rest.startswith(word):
            return text
        rest = rest[len(word) :]
    return rest


@dataclass(frozen=True)
class Call:
    """What an action asks for: the tag, and what stands between it and its end."""

    tag: str
    argument: str


def read_call(action: str, tags: Sequence[str]) -> Call | None:
    """The last `<tag> argument </tag>` of an action, which must end with it; None where it does not, or is too long.

    The argument's blanks are collapsed. Text before the tag is the policy's own and is not judged.
    """
    if len(action) > MAX_ACTION:
        return None
    words = action
    for special in SPECIAL:
        words = words.replace(special, " ")
    words = words.rstrip()
    for tag in tags:
        if words.endswith(f"</{tag}>"):
            _, found, argument = words.removesuffix(f"</{tag}>").rpartition(f"<{tag}>")
            return Call(tag, " ".join(argument.split())) if found else None
    return None


def clean(text: str, longest: int = 200) -> str:
    """A tool's output as the inside of an observation: one line, no tags, at most `longest` characters."""
    return " ".join(text[: 4 * longest].replace("<", " ").replace(">", " ").split())[:longest]


def held_out(question: str) -> bool:
    """True for the tenth of all questions that no training ever sees."""
    return blake2b(question.encode()).digest()[0] % 10 == 0


P = TypeVar("P", bound="Question")
PATIENCE = 5000


class Question(Protocol):
    """A problem of an environment, as text."""

    @property
    def prompt(self) -> str:
        """The whole prompt in words of the tiny vocabulary, first observation included."""

    @property
    def key(self) -> str:
        """What makes it the same question as another."""


def distinct(draw: Callable[[Random], P], count: int, label: str, evaluation: bool) -> list[P]:
    """At most `count` problems of different keys, from one side of the split; fewer where `PATIENCE` draws in a row
    give nothing new. `label` names the random stream."""
    rng, found, misses = Random(f"{label} {evaluation}"), dict[str, P](), 0
    while len(found) < count and misses < PATIENCE:
        problem = draw(rng)
        misses += 1
        if problem.key not in found and held_out(problem.key) == evaluation:
            found[problem.key] = problem
            misses = 0
    return list(found.values())


class TextEnvironment(ABC):
    """What the environments of this package share: their prompts, and a verdict on the text of a whole episode."""

    guide: str
    """What a chat model is told before the question."""

    @abstractmethod
    def verdict(self, problem: Any, actions: Sequence[str], finished: bool) -> Verdict:
        """See `Environment.verdict`."""

    def prompt_ids(self, problem: Any, tokenizer: Any = None) -> list[int]:
        """Words of the tiny vocabulary, by `words.encode` or by the tokenizer; with a chat template, the guide and the
        question as the user's turn."""
        if tokenizer is None:
            return words.encode(problem.prompt)
        if not getattr(tokenizer, "chat_template", None):
            return list(tokenizer(problem.prompt)["input_ids"])
        from ..registry import encode_prompt

        return encode_prompt(f"{self.guide}\n\n{problem.prompt.removeprefix('<bos>').strip()}", tokenizer)

    def grade(self, problem: Any, response_text: str, finished: bool) -> Verdict:
        """The verdict on an episode given as text, see `split_actions`."""
        return self.verdict(problem, split_actions(cast(Environment[Any], self), problem, response_text), finished)
