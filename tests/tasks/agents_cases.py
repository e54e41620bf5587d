"""The environments in several settings, and ways to play them: by their own authors, at random, with rubbish."""

from __future__ import annotations

from random import Random
from typing import Any

from rlvr_lab.tasks.agents import demos, maze
from rlvr_lab.tasks.agents.base import advance
from rlvr_lab.tasks.registry import task

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "triples": ("triples", {}),
    "triples, ambiguous": ("triples", {"ambiguous": True, "max_turns": 8}),
    "triples, points": ("triples", {"reward": "aepo"}),
    "maze": ("maze", {}),
    "maze, every family": ("maze", {"families": ["five", "six", "seven", "decoy"]}),
    "feedback": ("feedback", {}),
    "feedback, no hint": ("feedback", {"hint": "none", "retry_cost": 0.1}),
}


def environment(case: str) -> Any:
    """The environment of a case."""
    name, settings = SETTINGS[case]
    return task(name, settings)


def authored(made: Any, problem: Any, rng: Random, slip: float) -> list[str]:
    """The actions of one demonstration."""
    author = demos.AUTHORS[made.name][2](problem, rng, slip)
    state, last, actions = made.reset(problem), "", list[str]()
    while True:
        actions.append(author.act(last))
        turn = advance(made, problem, state, actions[-1], len(actions) - 1)
        state, last = turn.state, turn.observation
        if turn.done:
            return actions


def wandered(rng: Random) -> list[str]:
    """More uniformly random actions of the maze than an episode has room for."""
    return [f"<act> {rng.choice(maze.ACTIONS)} </act>" for _ in range(40)]
