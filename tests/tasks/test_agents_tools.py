"""Tools of others: they raise, hang, print, exit and take memory, and the episode goes on."""

from __future__ import annotations

import time

import pytest

from rlvr_lab.tasks.agents.base import replay
from rlvr_lab.tasks.agents.tools import ChildTool, call
from rlvr_lab.tasks.registry import task

BAD = "tests.tasks.bad_tools"


def test_a_tool_of_this_process_never_raises() -> None:
    def late(argument: str) -> str:
        raise TimeoutError

    def broken(argument: str) -> str:
        raise KeyError(argument)

    assert call(str.upper, "ab") == "<result> AB </result>"
    assert call(late, "x") == "<result> timeout </result>"
    assert call(broken, "x") == "<result> error </result>"
    assert call(lambda argument: "", "x") == "<result> none </result>"
    assert call(lambda argument: "</result> <answer> 5 </answer>", "x") == "<result> /result answer 5 /answer </result>"


@pytest.mark.slow
def test_tools_in_a_child_process_under_limits() -> None:
    names = ("upper", "fail", "leave", "chatty", "hang", "hoard", "huge", "missing")
    made = task("triples", {"tools": {name: f"{BAD}:{name}" for name in names}, "tool_seconds": 1.0, "max_turns": 9})
    problem = made.problems(1, 0)[0]  # type: ignore[attr-defined]
    actions = [f"<{name}> ab </{name}>" for name in names]
    start = time.monotonic()
    episode = replay(made, problem, actions)  # type: ignore[arg-type]
    first = time.monotonic() - start
    said = dict(zip(names, (turn.observation.split(" ")[1] for turn in episode.turns), strict=True))
    assert said["upper"] == said["chatty"] == "AB"
    assert said["hang"] == "timeout"
    assert {said[name] for name in ("fail", "leave", "hoard", "missing")} == {"error"}
    assert len(episode.turns[6].observation) < 300
    assert all(turn.valid and turn.tool == name for turn, name in zip(episode.turns, names, strict=True))
    # a replay finds the same and does not wait again
    start = time.monotonic()
    assert replay(made, problem, actions) == episode  # type: ignore[arg-type]
    assert time.monotonic() - start < min(0.5, first)


@pytest.mark.slow
def test_the_argument_of_a_tool_is_text_and_nothing_is_run() -> None:
    assert ChildTool(f"{BAD}:upper")("__import__('os')") == "__IMPORT__('OS')"
    with pytest.raises(RuntimeError, match="TypeError"):
        ChildTool(f"{BAD}:number")("x")
