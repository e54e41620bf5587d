"""The three environments one by one: their rules, rewards and chances, on cases worked out by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.agents import feedback, maze, triples
from rlvr_lab.tasks.agents.base import held_out, replay
from rlvr_lab.tasks.agents.session import Session
from rlvr_lab.tasks.registry import task
from tests.tasks.agents_cases import environment, wandered

# -- triples ----------------------------------------------------------------------------------------------------------


def solved(problem: triples.Problem) -> list[str]:
    """The shortest right episode with the tools."""
    at, actions = problem.start, []
    for relation, found in zip(problem.relations, problem.chain, strict=True):
        actions.append(f"<search> {at} {relation} </search>")
        at = found
    if problem.added:
        actions.append(f"<calc> {at} {'+' if problem.added > 0 else '-'} {abs(problem.added)} </calc>")
    return [*actions, f"<answer> {problem.answer} </answer>"]


def test_every_question_can_be_answered_with_the_tools() -> None:
    made = environment("triples")
    endings = set()
    for problem in made.problems(200, 0):
        actions = solved(problem)
        episode = replay(made, problem, actions)
        assert made.verdict(problem, actions, True).correct
        assert [turn.observation for turn in episode.turns[: len(problem.chain)]] == [
            f"<result> {found} </result>" for found in problem.chain
        ]
        if problem.added:
            assert episode.turns[-2].observation == f"<result> {problem.answer} </result>"
        endings.add((len(problem.relations), problem.relations[-1] == "age", bool(problem.added)))
    assert len(endings) == 3 + 3 + 3  # one to three hops; an entity, an age, a sum


def test_the_answer_depends_on_the_corpus_so_that_it_cannot_be_learned_by_heart() -> None:
    asked = triples.Problem(0, "E7", ("boss", "friend"))
    chains = {triples.Problem(number, asked.start, asked.relations).chain for number in range(40)}
    assert len(chains) > 30
    # an entity that lacks the relation ends the chain, and `draw` never asks for one that does
    assert any(len(chain) < 2 for chain in chains)
    with pytest.raises(ValueError, match="has no answer"):
        _ = next(p for n in range(40) if len((p := triples.Problem(n, "E7", ("boss", "friend"))).chain) < 2).answer


@pytest.mark.parametrize(
    ("action", "said", "valid"),
    [
        ("<search> E99 boss </search>", "none", True),
        ("<search> E7 wife </search>", "none", True),
        ("<search> E7 </search>", "none", True),
        ("<search> </search>", "none", True),
        ("<calc> 12 + 3 </calc>", "15", True),
        ("<calc> 3 - 12 </calc>", "-9", True),
        ("<calc> 9**9**9**9 </calc>", "error", True),
        ("<calc> __import__('os').getcwd() </calc>", "error", True),
        ("<calc> 1 / 0 </calc>", "error", True),
        ("<calc> 999999999 * 999999999 </calc>", "error", True),
        ("<calc> </calc>", "error", True),
        ("search E7 boss", "invalid", False),
        ("<act> go left </act>", "invalid", False),
        ("", "invalid", False),
    ],
)
def test_what_the_tools_say(action: str, said: str, valid: bool) -> None:
    made, problem = environment("triples"), triples.Problem(1, "E7", ("boss",))
    turn = made.step(problem, made.reset(problem), action)
    assert (turn.observation, turn.valid, turn.done) == (f"<result> {said} </result>", valid, False)


@pytest.mark.parametrize(
    ("answer", "correct", "read"),
    [("{}", True, True), (" {} ", True, True), ("0{}", True, True), ("{} + 1", False, False), ("E3", False, True),
     ("", False, False), ("9**9", False, False), ("the answer is {}", False, False)],
)  # fmt: skip
def test_how_an_answer_is_judged(answer: str, correct: bool, read: bool) -> None:
    made = environment("triples")
    problem = next(p for p in made.problems(50, 0) if p.relations[-1] == "age")
    verdict = made.verdict(problem, [f"<answer> {answer.format(problem.answer)} </answer>"], True)
    assert verdict.correct is correct
    assert (verdict.answer is not None) is read
    assert verdict.points == {}


def test_the_points_of_aepo() -> None:
    """-1 for a bad format, right or wrong; 0.1 for both tools, only where the answer is right."""
    made = environment("triples, points")
    problem = next(p for p in made.problems(50, 0) if p.added)
    actions = solved(problem)

    def points(played: list[str]) -> dict[str, float]:
        return dict(made.verdict(problem, played, True).points)

    assert points(actions) == {"format": 0.0, "tools": 0.1}
    assert points([*actions[:-2], actions[-1]]) == {"format": 0.0, "tools": 0.0}  # without the calculator
    assert points([*actions[:-1], "<answer> 1 </answer>"]) == {"format": 0.0, "tools": 0.0}
    assert points(actions[:-1]) == {"format": -1.0, "tools": 0.0}
    assert points(["what", *actions]) == {"format": -1.0, "tools": 0.1} or made.max_turns < len(actions) + 1


def test_an_ambiguous_search_needs_a_second_one() -> None:
    made = environment("triples, ambiguous")
    places = set()
    for problem in made.problems(60, 0):
        relation, found = problem.relations[0], problem.chain[0]
        if relation == "age":
            continue
        state = made.reset(problem)
        said = made.step(problem, state, f"<search> {problem.start} {relation} </search>").observation
        candidates = said.removeprefix("<result> ").removesuffix(" </result>").split(" or ")
        assert len(set(candidates)) == 3
        assert found in candidates
        places.add(candidates.index(found))
        for candidate in candidates:
            query = f"<search> {problem.start} {relation} {candidate} </search>"
            wanted = "yes" if candidate == found else "no"
            assert made.step(problem, state, query).observation == f"<result> {wanted} </result>"
    assert places == {0, 1, 2}


# -- maze -------------------------------------------------------------------------------------------------------------

RING = maze.Problem("five", ("red", "blue", "green", "white", "black"), 0, 2, ((4, "iron"),))


def acts(*names: str) -> list[str]:
    return [f"<act> {name} </act>" for name in names]


def test_fetch_the_key_then_open_the_door() -> None:
    made = environment("maze")
    actions = acts("go left", "take key", "go right", "go right", "go right", "open door")
    episode = replay(made, RING, actions)
    assert [turn.observation for turn in episode.turns] == [
        "<result> black iron key </result>", "<result> taken </result>", "<result> red </result>",
        "<result> blue </result>", "<result> green door </result>", "",
    ]  # fmt: skip
    verdict = made.verdict(RING, actions, True)
    assert verdict.correct
    assert verdict.answer == "green"
    assert verdict.points == {"invalid": 0.0}


@pytest.mark.parametrize(
    "actions",
    [
        acts("open door"),  # no door here
        acts("go right", "go right", "open door"),  # no key
        acts("go left", "take key", "open door"),  # the key, but no door here
    ],
)
def test_opening_too_early_cannot_be_undone(actions: list[str]) -> None:
    made = environment("maze")
    rest = acts("go left", "take key", "go right", "go right", "go right", "open door")
    verdict = made.verdict(RING, [*actions, *rest], True)
    assert not verdict.correct
    assert verdict.answer in RING.rooms
    assert replay(made, RING, [*actions, *rest]).done
    assert len(replay(made, RING, [*actions, *rest]).turns) == len(actions)


def test_a_key_that_does_not_fit() -> None:
    made = environment("maze, every family")
    decoy = maze.Problem("decoy", RING.rooms, 0, 2, ((4, "iron"), (1, "copper")))
    wrong = acts("go right", "take key", "go right", "open door")
    assert not made.verdict(decoy, wrong, True).correct
    # taking the second key leaves the first in its place, where it is seen again
    swapped = acts("go right", "take key", "go left", "go left", "take key", "look", "take key", "take key", "go right")
    seen = [turn.observation for turn in replay(made, decoy, swapped).turns]
    assert seen[3] == "<result> black iron key </result>"
    assert seen[5] == "<result> black copper key </result>"
    won = [*swapped, *acts("go right", "go right", "open door")]
    assert made.verdict(decoy, won, True).correct


def test_an_invalid_action_wastes_its_turn_and_costs_a_point() -> None:
    made = environment("maze")
    actions = acts("go left", "take key", "go right", "go right", "go right", "open door")
    spoiled = [*acts("go up"), "key", *actions]
    verdict = made.verdict(RING, spoiled, True)
    assert verdict.correct
    assert verdict.points == {"invalid": pytest.approx(-0.2)}
    assert not made.verdict(RING, [*["key"] * 11, *actions], True).correct  # the cap of 16 turns comes first
    assert task("maze", {"invalid_cost": 0}).verdict(RING, spoiled, True).points == {}  # type: ignore[attr-defined]


def test_no_observation_tells_the_turn_and_early_and_late_ones_are_of_the_same_words() -> None:
    made = environment("maze")
    once = replay(made, RING, acts(*["go right"] * 5)).turns
    twice = replay(made, RING, acts(*["go right"] * 10)).turns
    assert [turn.observation for turn in twice[5:]] == [turn.observation for turn in once]


def test_at_random_it_is_hard_but_not_hopeless() -> None:
    """1 to 5 % of episodes succeed, and about a tenth of the groups of eight, which teach something, has both outcomes.

    Our notes ask for a tenth to a fifth of the groups; five rooms are at the lower edge of that."""
    made, rng = environment("maze"), Random(0)
    groups = [
        [made.verdict(problem, wandered(rng), True).correct for _ in range(8)] for problem in made.problems(500, 0)
    ]
    success = sum(map(sum, groups)) / (8 * len(groups))
    mixed = sum(0 < sum(group) < 8 for group in groups) / len(groups)
    print(f"uniform success {success:.3f}, mixed groups {mixed:.3f}")
    assert 0.01 < success < 0.05
    assert 0.07 < mixed < 0.2


def test_the_families_have_seen_and_unseen_variations() -> None:
    for family in maze.ROOMS:
        made = task("maze", {"families": [family]})
        seen, unseen = (made.problems(80, 0, evaluation) for evaluation in (False, True))  # type: ignore[attr-defined]
        assert {p.family for p in (*seen, *unseen)} == {family}
        assert all(len(p.rooms) == maze.ROOMS[family] for p in seen)
        assert not any(held_out(p.key) for p in seen)
        assert all(held_out(p.key) for p in unseen)


# -- feedback ---------------------------------------------------------------------------------------------------------


def test_hints_lead_to_the_solution() -> None:
    made, problem = task("feedback", {"max_turns": 5}), feedback.Problem(3, 4, 16)
    assert str(problem) == "3 * x + 4 = 52"
    for each in made.problems(100, 0):  # type: ignore[attr-defined]
        low, high, actions = 1, feedback.MOST_X, list[str]()
        while True:
            guess = (low + high) // 2
            actions.append(f"<answer> {guess} </answer>")
            turn = replay(made, each, actions).turns[-1]  # type: ignore[arg-type]
            if turn.done:
                break
            low, high = (guess + 1, high) if "higher" in turn.observation else (low, guess - 1)
        verdict = made.verdict(each, actions, True)  # type: ignore[attr-defined]
        assert verdict.correct
        assert verdict.answer == str(each.x)


def test_tries_run_out_and_retries_may_cost() -> None:
    problem, wrong, right = feedback.Problem(3, 4, 16), "<answer> 19 </answer>", "<answer> 16 </answer>"
    made = environment("feedback")
    assert made.verdict(problem, [wrong, wrong, right], True).correct
    assert not made.verdict(problem, [wrong, wrong, wrong, right], True).correct
    assert made.verdict(problem, [wrong, "what", "<answer> 8 + 8 </answer>"], True).answer == "19"
    assert [t.observation for t in replay(made, problem, [wrong, "<answer> 2 </answer>"]).turns] == [
        "<result> wrong lower </result>", "<result> wrong higher </result>",
    ]  # fmt: skip
    silent = environment("feedback, no hint")
    assert replay(silent, problem, [wrong]).turns[0].observation == "<result> wrong </result>"
    assert silent.verdict(problem, [wrong, wrong, right], True).points == {"retries": -0.2}
    assert silent.verdict(problem, [right], True).points == {"retries": 0.0}


# -- settings and sessions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("triples", {"hops": []}, "data.settings.hops must be numbers from 1 to 8"),
        ("triples", {"endings": ["sums"]}, "data.settings.endings"),
        ("triples", {"reward": "dense"}, "data.settings.reward"),
        ("triples", {"max_turns": 0}, "data.settings.max_turns"),
        ("triples", {"tools": {"result": "a:b"}}, "'result' cannot be the tag"),
        ("triples", {"tools": {"date": "no function"}}, "data.settings.tools: 'no function' is no 'module:function'"),
        ("triples", {"tool_seconds": 0}, "data.settings.tool_seconds"),
        ("maze", {"families": ["nine"]}, "data.settings.families"),
        ("maze", {"families": []}, "data.settings.families must name a family"),
        ("maze", {"invalid_cost": -1}, "invalid_cost must not be negative"),
        ("feedback", {"hint": "all"}, "data.settings.hint"),
        ("feedback", {"retry_cost": -1}, "retry_cost must not be negative"),
    ],
)
def test_a_wrong_setting_is_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(name, settings)


def test_a_session_has_the_shape_that_others_expect() -> None:
    session = Session(environment("maze"))
    with pytest.raises(ValueError, match="call reset"):
        session.step("<act> look </act>")
    first = session.reset(3, seed=1)
    assert first == environment("maze").problems(4, 1)[3].prompt == session.reset(3, seed=1)
    result = session.step("<act> look </act>")
    assert (result.reward, result.done, result.info["is_action_valid"], result.info["turn"]) == (0.0, False, True, 1)
    assert "<act> take key </act>" in result.info["admissible"]
    result = session.step("x" * 10**6)
    assert not result.info["is_action_valid"]
    result = session.step("<act> open door </act>")
    assert (result.done, result.info["won"], result.reward) == (True, False, pytest.approx(-0.1))
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
    with pytest.raises(ValueError, match="is over"):
        session.step("<act> look </act>")
    with pytest.raises(ValueError, match="no problem number -1"):
        session.reset(-1)


def test_a_session_pays_at_the_end_what_the_verdict_says() -> None:
    made = environment("triples, points")
    session = Session(made, evaluation=True)
    session.reset(2, seed=5)
    actions = solved(session.problem)
    results = [session.step(action) for action in actions]
    verdict = made.verdict(session.problem, actions, True)
    assert [result.reward for result in results] == [0.0] * (len(actions) - 1) + [1 + sum(verdict.points.values())]
    assert results[-1].info["answer"] == session.problem.answer
    assert held_out(session.problem.key)
