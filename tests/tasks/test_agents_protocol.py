"""What every environment promises: immutable states, replay, splits, caps; and it survives whatever is written."""

from __future__ import annotations

import copy
import time
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlvr_lab.policy import tiny
from rlvr_lab.tasks.agents import maze, words
from rlvr_lab.tasks.agents.base import (
    ERROR,
    MAX_ACTION,
    Environment,
    Turn,
    advance,
    clean,
    read_call,
    replay,
    split_actions,
    transcript,
)
from rlvr_lab.tasks.agents.demos import HASTY, demonstrations, learned
from rlvr_lab.tasks.registry import task
from tests.tasks.agents_cases import SETTINGS, authored, environment
from tests.tasks.hostile import PIECES

CASES = pytest.mark.parametrize("case", SETTINGS)
_WORDS = st.lists(st.sampled_from(words.VOCABULARY), max_size=12).map(" ".join)
_HOSTILE = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=6).map("".join)
_TAGGED = st.tuples(st.sampled_from(("search", "calc", "act", "answer", "result")), st.one_of(_WORDS, _HOSTILE)).map(
    lambda pair: f"<{pair[0]}> {pair[1]} </{pair[0]}>"
)
_SENSIBLE = st.one_of(
    st.sampled_from(maze.ACTIONS).map(lambda action: f"<act> {action} </act>"),
    st.integers(-5, 99).map(lambda number: f"<answer> {number} </answer>"),
)
ACTIONS = st.lists(st.one_of(_WORDS, _HOSTILE, _TAGGED, _SENSIBLE), max_size=20)


@CASES
def test_it_is_an_environment_and_other_tasks_are_not(case: str) -> None:
    made = environment(case)
    assert isinstance(made, Environment)
    assert made.stops
    assert all(stop.startswith("</") for stop in made.stops)
    assert not isinstance(task("countdown"), Environment)
    assert not isinstance(task("instructions"), Environment)


@CASES
def test_prompts_are_words_of_the_vocabulary_and_fit_the_context(case: str) -> None:
    made = environment(case)
    for problem in made.problems(100, 0):
        ids = made.prompt_ids(problem)
        assert words.ID["<unk>"] not in ids
        assert " ".join(words.VOCABULARY[i] for i in ids) == problem.prompt
        assert len(ids) + made.max_turns * (made.turn_tokens + 7) <= tiny.AGENTS.positions


@CASES
def test_a_replay_gives_the_episode_that_was_played(case: str) -> None:
    """Turn by turn, from a copy of every state, and from any prefix: the state is a function of the actions."""
    made, rng = environment(case), Random(0)
    for problem in made.problems(30, 1):
        actions = authored(made, problem, rng, 0.5)
        episode = replay(made, problem, actions)
        assert len(episode.turns) == len(actions) <= made.max_turns
        assert episode.done
        state = made.reset(problem)
        for place, (action, turn) in enumerate(zip(actions, episode.turns, strict=True)):
            assert replay(made, problem, actions[:place]).state == state
            before = copy.deepcopy(state)
            again = advance(made, problem, state, action, place)
            assert state == before
            assert again == turn
            state = again.state
        assert replay(made, problem, [*actions, *actions]) == episode
        with pytest.raises(AttributeError):
            state.anything = 1


@CASES
def test_the_text_of_an_episode_holds_its_actions(case: str) -> None:
    made, rng = environment(case), Random(1)
    outcomes = set()
    for problem in made.problems(60, 2):
        actions = authored(made, problem, rng, 0.4)
        text = transcript(made, problem, actions)
        assert [action.strip() for action in split_actions(made, problem, text)] == actions
        verdict = made.verdict(problem, actions, True)
        assert made.grade(problem, text, True) == verdict == made.verdict(problem, actions, True)
        assert set(verdict.points) == set(made.point_names)
        assert not made.verdict(problem, actions, False).correct
        if verdict.answer is not None and made.read(text, True) != "start":
            assert made.read(text, True) == verdict.answer
        outcomes.add(verdict.correct)
    assert outcomes == {True, False}


@CASES
def test_results_that_a_policy_invents_are_its_own_words(case: str) -> None:
    """Only the true observation is taken off: what stands there instead belongs to the next action."""
    made = environment(case)
    problem = made.problems(1, 3)[0]
    first = f"<calc> 1 + 1 {made.stops[0]}"
    actions = split_actions(made, problem, f"{first} <result> gold </result> go on")
    assert actions[0] == first
    assert actions[1].startswith(" <result> gold </result>")


@CASES
def test_nothing_that_is_written_raises_or_takes_long(case: str) -> None:
    made = environment(case)
    problems = made.problems(5, 4)
    counts = {"tried": 0, "ended": 0, "invalid": 0, "valid": 0}

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ACTIONS, st.integers(0, 4), st.booleans())
    def fuzz(actions: list[str], which: int, finished: bool) -> None:
        start = time.process_time()
        episode = replay(made, problems[which], actions)
        verdict = made.verdict(problems[which], actions, finished)
        assert episode == replay(made, problems[which], actions)
        assert len(episode.turns) <= made.max_turns
        assert all(len(turn.observation) < 300 for turn in episode.turns)
        assert all(turn.observation != ERROR for turn in episode.turns) or made.name == "triples"
        assert verdict.reason
        assert not verdict.correct or verdict.answer is not None
        assert made.grade(problems[which], " ".join(actions), finished).reason
        assert time.process_time() - start < 2
        counts["tried"] += 1
        counts["ended"] += episode.done
        counts["invalid"] += episode.invalid
        counts["valid"] += len(episode.turns) - episode.invalid

    fuzz()
    assert min(counts.values()) > 10, counts


@CASES
def test_a_megabyte_is_an_invalid_action_and_costs_no_time(case: str) -> None:
    made = environment(case)
    problem = made.problems(1, 5)[0]
    for piece in ("<search> ", "x", "</act>", "( ", "9**9**9**9 ", made.stops[0]):
        start = time.process_time()
        turn = advance(made, problem, made.reset(problem), piece * (1_000_000 // len(piece)), 0)
        assert not turn.valid
        assert not turn.done
        split_actions(made, problem, piece * (100_000 // len(piece)))
        assert time.process_time() - start < 2, piece


@CASES
def test_an_episode_that_goes_nowhere_ends_at_the_cap(case: str) -> None:
    made = environment(case)
    problem = made.problems(1, 6)[0]
    episode = replay(made, problem, ["nonsense"] * 1000)
    assert len(episode.turns) == episode.invalid == made.max_turns
    assert [turn.done for turn in episode.turns] == [False] * (made.max_turns - 1) + [True]
    verdict = made.verdict(problem, ["nonsense"] * 1000, True)
    assert not verdict.correct
    assert verdict.answer is None


class Endless:
    """Never done; counts in its state; raises when told to."""

    name, stops, turn_tokens, max_turns = "endless", ("</act>",), 4, 3

    def reset(self, problem: Any) -> int:
        return 0

    def step(self, problem: Any, state: int, action: str) -> Turn:
        if action == "raise":
            raise RuntimeError("no")
        if action == "recurse":
            return self.step(problem, state, action)
        return Turn(state + 1, "seen", False)


def test_what_an_environment_raises_becomes_an_observation() -> None:
    made: Any = Endless()
    for action in ("raise", "recurse"):
        episode = replay(made, None, ["go", action, "go", "go"])
        assert [turn.observation for turn in episode.turns] == ["seen", ERROR, "seen"]
        assert [turn.valid for turn in episode.turns] == [True, False, True]
        assert episode.state == 2  # the failed turn left the state as it was
        assert episode.turns[-1].done


@pytest.mark.parametrize(
    ("action", "argument"),
    [
        ("<search> E7 boss </search>", "E7 boss"),
        ("first think <search>\n E7   boss</search><eos>", "E7 boss"),
        ("<search> E1 <search> E7 boss </search>", "E7 boss"),
        ("<search></search>", ""),
        ("E7 boss </search>", None),
        ("<search> E7 boss", None),
        ("<search> E7 boss </search> and more", None),
        ("<calc> E7 boss </search>", None),
        ("<search> " + "x" * MAX_ACTION + " </search>", None),
        ("", None),
    ],
)
def test_how_a_call_is_read(action: str, argument: str | None) -> None:
    found = read_call(action, ("search", "calc"))
    assert (found.argument if found else None) == argument


def test_an_observation_is_one_short_line_without_tags() -> None:
    assert clean("a </result> <search>\n b\t c") == "a /result search b c"
    assert len(clean("y" * 10**6)) == 200


def test_demonstrations_repeat_and_never_show_a_held_out_question() -> None:
    first, again = (list(demonstrations(400, HASTY, [1, 2])) for _ in range(2))
    assert first == again
    assert first != list(demonstrations(400, HASTY, [1, 3]))
    shown = {" ".join(words.VOCABULARY[i] for i in ids[: ids.index(words.ID["?"]) + 1]) for ids in first}
    for case in ("triples", "feedback"):
        held = {problem.prompt for problem in environment(case).problems(300, 9, evaluation=True)}
        assert not shown & held
    starts = [words.VOCABULARY[ids[1]] for ids in first]
    for word, share in (("query", HASTY.triples), ("maze", HASTY.maze), ("solve", HASTY.feedback)):
        assert abs(starts.count(word) / len(starts) - share) < 0.1


def test_the_loss_counts_the_policys_words_only() -> None:
    ids = words.encode(
        "<bos> query E7 boss ? <search> E7 boss </search> <result> E2 </result> <answer> E2 </answer> <eos>"
    )
    assert learned(ids) == [False] * 5 + [True] * 4 + [False] * 3 + [True] * 4
    ids = words.encode("<bos> maze 5 iron key ? <result> red </result> <act> wait </act>")
    assert learned(ids) == [False] * 9 + [True] * 3


class ChatTokenizer:
    """The part of a chat model's tokenizer that `encode_prompt` uses."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        assert options["add_generation_prompt"]
        return [ord(letter) for letter in messages[0]["content"]]


@CASES
def test_a_chat_model_is_told_the_rules(case: str) -> None:
    made = environment(case)
    problem = made.problems(1, 0)[0]
    text = "".join(map(chr, made.prompt_ids(problem, ChatTokenizer())))
    assert text.startswith(made.guide)
    assert text.endswith(problem.prompt.removeprefix("<bos> "))
    assert all(f"<{stop[2:-1]}>" in made.guide for stop in made.stops)  # every tag is explained
