"""Multi-turn sampling: the policy speaks until a turn ends, the environment answers, and so on.

One response is one episode, with what the environment said in between as tokens that are no actions. Text in, text out:
the environment sees the text of a turn and returns a text; tokens are never made from decoded text again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.paths import Path, Piece, Start, to_rollout
from ..core.rollout import Rollout
from ..policy.load import Policy
from ..tasks.agents.base import Environment, Turn, advance
from .engine import Sampling
from .factory import Continues


class Turns:
    """Plays one environment. `problems[path.problem]` is what a path is about."""

    def __init__(self, environment: Environment[Any], problems: Sequence[Any], policy: Policy) -> None:
        self.environment, self.problems, self.policy = environment, problems, policy
        self.stops = tuple(environment.stops)
        self._window = getattr(policy.model.config, "max_position_embeddings", None)

    def open(self, path: Path) -> None:
        """Begin the episode; its first observation is the prompt."""
        path.state = self.environment.reset(self.problems[path.problem])

    def room(self, path: Path, sampling: Sampling) -> int:
        """Most tokens of the next turn: of the turn, of the response and of the model's window what is left."""
        left = min(self.environment.turn_tokens, sampling.max_tokens - len(path))
        return left if self._window is None else min(left, self._window - len(path.prompt) - len(path))

    def respond(self, path: Path) -> Turn:
        """Give the newest piece to the environment and append what it says.

        The end token ends a turn, not the episode: the path is finished where the environment ends it, which it does
        after its last turn too. `room` closes a path whose tokens, or the model's window, are used up.
        """
        turn = advance(self.environment, self.problems[path.problem], path.state, self.said(path), path.turns)
        path.state, path.finished, path.open = turn.state, turn.done, not turn.done
        if path.open:
            path.tell(self.policy.encode(turn.observation))
        return turn

    def said(self, path: Path) -> str:
        """Text of the newest segment, without end tokens."""
        start = path.segment.index(path.segment[-1]) if path.segment else 0
        return action_text(self.policy, path.ids[start:])


class EpisodeEngine:
    """An engine whose responses are episodes; continues paths with `engine`."""

    def __init__(self, engine: Continues, environment: Environment[Any], problems: Sequence[Any]) -> None:
        self.engine = engine
        self.turns = Turns(environment, problems, engine.policy)

    @property
    def policy(self) -> Policy:
        """What is sampled from."""
        return self.engine.policy

    def extend(
        self, starts: Sequence[Start], sampling: Sampling, generator: torch.Generator, *, stops: Sequence[str] = (),
        report: Callable[[int], None] = lambda rows: None,
    ) -> list[Piece]:  # fmt: skip
        """See `rollout.factory.Engine`."""
        return self.engine.extend(starts, sampling, generator, stops=stops, report=report)

    def with_entropy(self, paths: Sequence[Path], rows: int = 64) -> None:
        """See `rollout.factory.Engine`."""
        self.engine.with_entropy(paths, rows)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
        report: Callable[[int], None] = lambda rows: None,
    ) -> Rollout:
        """`group_size` episodes of each prompt; `problem_ids` index the engine's problems. All open episodes take a
        turn in one batch. `sampling.max_tokens` bounds a whole episode, the environment's words included."""
        ids = list(problem_ids) if problem_ids is not None else list(range(len(prompts)))
        paths = [
            Path(problem, group, sampling.first + group, number, prompt)
            for group, (problem, prompt) in enumerate(zip(ids, prompts, strict=True))
            for number in range(group_size)
        ]
        play(self, paths, sampling, generator, report)
        device = self.policy.device
        policy_temperature = None if sampling.temper is None else sampling.temperature
        return to_rollout(
            paths, pad_id=self.policy.pad_id, version=version, device=device, policy_temperature=policy_temperature
        )


def play(
    engine: Any,
    paths: Sequence[Path],
    sampling: Sampling,
    generator: torch.Generator,
    report: Callable[[int], None] = lambda rows: None,
) -> None:
    """Play episodes to their ends, in place; paths that have no state begin theirs."""
    turns: Turns = engine.turns
    for path in paths:
        if path.state is None:
            turns.open(path)
    active = [path for path in paths if path.open]
    while active:
        round_of(engine, active, sampling, generator)
        still = [path for path in active if path.open]
        report(len(active) - len(still))
        active = still


def round_of(engine: Any, paths: Sequence[Path], sampling: Sampling, generator: torch.Generator) -> None:
    """One turn of every path; one without room is closed instead."""
    turns: Turns = engine.turns
    rooms = [turns.room(path, sampling) for path in paths]
    for path, room in zip(paths, rooms, strict=True):
        path.open = path.open and room > 0
    able = [(path, room) for path, room in zip(paths, rooms, strict=True) if path.open]
    starts = [path.start(room) for path, room in able]
    pieces = engine.extend(starts, sampling, generator, stops=turns.stops) if starts else []
    for (path, _), piece in zip(able, pieces, strict=True):
        path.add(piece)
        turns.respond(path)


def action_text(policy: Policy, ids: Sequence[int]) -> str:
    """Text of a turn, without the end token that may close it."""
    own = list(ids)
    while own and own[-1] in policy.eos_ids:
        own.pop()
    return policy.decode(own)


def actions_of(rollout: Rollout, row: int, policy: Policy) -> list[str]:
    """Text of every turn of one response; a turn without a token of its own is an empty text."""
    assert rollout.turn_id is not None
    length = int(rollout.lengths[row])
    ids, turns = rollout.response_ids[row, :length].tolist(), rollout.turn_id[row, :length].tolist()
    chosen = rollout.action_mask[row, :length].tolist()
    texts: list[list[int]] = [[] for _ in range(turns[-1] + 1 if turns else 0)]
    for token, turn, action in zip(ids, turns, chosen, strict=True):
        if action:
            texts[turn].append(token)
    return [action_text(policy, own) for own in texts]


def for_task(engine: Continues, task: Any, problems: Sequence[Any]) -> Continues:
    """`engine`, or an engine of episodes around it where `task` is an environment."""
    return EpisodeEngine(engine, task, problems) if isinstance(task, Environment) else engine
