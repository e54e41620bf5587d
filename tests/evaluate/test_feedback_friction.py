"""Rounds of answer and feedback: what is counted, and that only the judge's words reach the solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.paths import Piece, Start
from rlvr_lab.errors import UserError
from rlvr_lab.evaluate.feedback_friction import Asking, Rounds, ask_again, pick, ramp
from rlvr_lab.evaluate.feedback_text import CATEGORIES, category_fractions, error_category, mask
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import TransformersEngine
from rlvr_lab.tasks.agents import words
from rlvr_lab.tasks.agents.feedback import FeedbackTask, Problem

ANSWERS = st.one_of(st.none(), st.sampled_from("ABCD"))
TABLE = st.integers(1, 5).flatmap(
    lambda rounds: st.tuples(
        st.just(rounds),
        st.lists(st.lists(st.tuples(ANSWERS, st.booleans()), min_size=rounds, max_size=rounds), min_size=1, max_size=6),
    )
)


@given(TABLE)
def test_what_is_counted_adds_up(table: tuple[int, list[list[tuple[str | None, bool]]]]) -> None:
    rounds, rows = table
    found = Rounds([[a for a, _ in row] for row in rows], [[c for _, c in row] for row in rows], rounds)
    assert sum(found.solved) + len(found.unsolved) == len(rows)
    assert found.accuracy == sorted(found.accuracy)
    assert found.active[0] == len(rows)
    assert all(b == a - s for a, b, s in zip(found.active, found.active[1:], found.solved, strict=False))
    assert 0 <= found.gain <= 1
    friction = found.friction()
    assert friction is None if found.accuracy[0] == 1 else 0 <= friction <= 1  # type: ignore[operator]
    for problem in found.unsolved:
        named = [attempt for attempt in found.attempts(problem) if attempt != "None"]
        assert len(named) == len(set(named))


def test_what_follows_a_right_answer_is_not_read() -> None:
    cut = Rounds([["A"], ["B", "B", "C"]], [[True], [False, False, False]], 3)
    told = Rounds([["A", "X", "X"], ["B", "B", "C"]], [[True, False, True], [False] * 3], 3)
    for found in (cut, told):
        assert found.accuracy == [0.5, 0.5, 0.5]
        assert found.attempts(1) == ["B", "C"]
        assert found.repeat_rate == 0.5


def test_what_is_undefined_is_none() -> None:
    solved = Rounds([["A"]], [[True]], 1)
    assert (solved.friction(), solved.repeat_rate, solved.distinct_wrong) == (None, None, None)
    assert Rounds([["B"]], [[False]], 1).repeat_rate is None  # nothing was retried
    assert Rounds([["B"]], [[False]], 1).friction(target=0.0) is None


@pytest.mark.parametrize(
    ("answers", "correct", "rounds"), [([], [], 3), ([["A"]], [[False]], 2), ([["A"]], [[True]], 0)]
)
def test_impossible_tables_are_refused(answers: Any, correct: Any, rounds: int) -> None:
    with pytest.raises(ValueError, match=r"asked 1 times of 2|a problem and a round"):
        Rounds(answers, correct, rounds)


def test_temperatures_rise_to_a_cap() -> None:
    assert [ramp(r) for r in (0, 1, 10, 99)] == [0.0, 0.15, 1.5, 1.5]
    assert [Asking(ramp=True).heat(2), Asking(temperature=0.7).heat(2)] == [0.3, 0.7]


def test_a_new_answer_is_picked_where_there_is_one() -> None:
    picked = {pick(["A", "B", "C", None], ["A", "C"], Random(seed)) for seed in range(40)}
    assert picked == {1, 3}
    assert pick(["A", None], ["None", "B"], Random(0)) == 0
    assert {pick(["A", "A"], ["A"], Random(seed)) for seed in range(20)} == {0, 1}
    with pytest.raises(ValueError, match="no draws"):
        pick([], [], Random(0))


# -- the loop ---------------------------------------------------------------------------------------------------------


def decode(ids: Sequence[int]) -> str:
    return " ".join(words.VOCABULARY[i] for i in ids)


@pytest.fixture(scope="module")
def tiny_a() -> Policy:
    return load_policy("tiny/A", device="cpu")


class Solver:
    """An engine whose answer is a function of the dialogue so far; `contexts` holds every dialogue it saw."""

    def __init__(self, think: Callable[[str, Random], int], window: int = 256) -> None:
        self.think, self.contexts = think, []  # type: tuple[Any, list[str]]
        config = SimpleNamespace(max_position_embeddings=window)
        self.policy = SimpleNamespace(
            tokenizer=None, eos_ids=(1,), encode=words.encode, decode=decode, model=SimpleNamespace(config=config)
        )

    def extend(self, starts: Sequence[Start], sampling: Any, generator: Any, stops: Sequence[str]) -> list[Piece]:
        assert "</answer>" in stops
        found = []
        for start in starts:
            context = decode(start.ids)
            self.contexts.append(context)
            ids = words.encode(f"<answer> {self.think(context, Random(start.key))} </answer>")
            found.append(Piece(ids, [0.0] * len(ids), [1.0] * len(ids), stopped=True))
        return found


def halving(context: str, rng: Random) -> int:
    """Uses every hint."""
    low, high, guess = 1, 30, 0
    for word in context.split():
        if word == "higher":
            low = guess + 1
        elif word == "lower":
            high = guess - 1
        elif word.isdigit():
            guess = int(word)
    return (low + high) // 2


ENVIRONMENT = FeedbackTask(max_turns=6)
PROBLEMS = [Problem(2, 1, x) for x in (3, 15, 22, 29)]


def ask(solver: Any, **settings: Any) -> Rounds:
    asking = Asking(rounds=6, **settings)
    return ask_again(solver, ENVIRONMENT, PROBLEMS, asking, torch.Generator().manual_seed(0))


def test_a_solver_that_uses_every_hint_has_no_friction() -> None:
    assert ask(Solver(halving)).friction() == 0
    without = ask(Solver(halving), feedback="none")
    assert without.friction() == 1  # the same guess from the same question, six times
    assert without.repeat_rate == 1


def test_the_solution_never_reaches_the_solver() -> None:
    solver = Solver(lambda context, rng: 1)
    ask(solver)
    assert solver.contexts
    for context in solver.contexts:
        said = context.split("?")[1]
        assert set(said.split()) <= {"<answer>", "1", "</answer>", "<result>", "wrong", "higher", "</result>"}


def test_shuffled_hints_are_those_of_the_same_round() -> None:
    solver = Solver(halving)
    ask(solver, feedback="shuffled")
    second = solver.contexts[4:7]  # the first guess solves one of the four
    assert [c.count("<result>") for c in second] == [1, 1, 1]
    assert sorted(word for c in second for word in c.split() if word in ("higher", "lower")) == ["higher"] * 2 + [
        "lower"
    ]
    assert ask(Solver(halving), feedback="shuffled").friction() != 0


def test_draws_avoid_what_was_tried() -> None:
    solver = Solver(lambda context, rng: rng.randint(1, 30))
    found = ask(solver, draws=30)
    assert all(len(set(row)) == len(row) for row in found.answers)
    assert found.repeat_rate in (0, None)


def test_the_same_seed_asks_the_same(tiny_a: Policy) -> None:
    engine = TransformersEngine(tiny_a)
    environment = FeedbackTask(max_turns=3)
    problems = environment.problems(12, 0, True)

    def once(seed: int) -> Rounds:
        return ask_again(engine, environment, problems, Asking(3), torch.Generator().manual_seed(seed))

    assert once(0).answers == once(0).answers
    assert once(0).answers != once(1).answers


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"rounds": 0}, "at least 1"),
        ({"draws": 0}, "at least 1"),
        ({"feedback": "loud"}, "own, shuffled or none"),
        ({"temperature": -1.0}, "negative"),
    ):
        with pytest.raises(UserError, match=message):
            Asking(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="allows 6 turns and 7 rounds"):
        ask_again(Solver(halving), ENVIRONMENT, PROBLEMS, Asking(7), torch.Generator())
    with pytest.raises(UserError, match="no problems"):
        ask_again(Solver(halving), ENVIRONMENT, [], Asking(6), torch.Generator())
    with pytest.raises(UserError, match="window of 20 tokens"):
        ask_again(Solver(lambda context, rng: 1, window=20), ENVIRONMENT, PROBLEMS, Asking(6), torch.Generator())


# -- text -------------------------------------------------------------------------------------------------------------


def test_masks_leak_where_the_card_says_they_do() -> None:
    assert mask("math", "x = -3, not 3", "-3") == "x = -3, not 3"  # no word boundary in front of a sign
    assert mask("math", "42.5 is close to 42", "42") == "[masked].5 is close to [masked]"
    assert mask("mcq", "A good reason speaks for (A).", "A") == "[masked] good reason speaks for [masked]."
    assert mask("mcq", "so (c) it is", "c") == "so (c) it is"
    assert mask("hex", r"\boxed{ab} but 0xAB", "AB") == "[masked] but 0xAB"
    with pytest.raises(UserError, match="did you mean 'math'"):
        mask("maths", "", "1")


@given(st.integers(0, 10**7), st.text("abc ,.\n", max_size=30))
def test_a_whole_number_does_not_survive_its_mask(number: int, around: str) -> None:
    for written in (str(number), f"{number:,}"):
        hidden = mask("arith", f"{around} {written} {around}", number)
        assert "[Mask1]" in hidden
        assert str(number) not in hidden.replace("[Mask1]", "").replace(",", "")


def test_a_judgement_that_names_nothing_is_unknown() -> None:
    assert error_category("feedback is wrong, I think") == "unknown"  # said before the verdict, or without one
    assert error_category("THE ERROR IS:   Too complicated!") == "too complicated"
    found = category_fractions(["the error is: too complicated", "?"])
    assert (found["too complicated"], found["unknown"]) == (0.5, 0.5)
    assert set(found) == set(CATEGORIES)
    with pytest.raises(ValueError, match="no judgement"):
        category_fractions([])
