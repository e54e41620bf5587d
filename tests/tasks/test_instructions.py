"""Instructions: every problem can be solved, verdicts agree with a plain reading of the rules, demonstrations keep what
they preview."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.base import Outcome
from rlvr_lab.tasks.instructions import (
    DIGITS,
    FORMATS,
    MARKS,
    MAX_RESPONSE_TOKENS,
    POINTS,
    PROMPT_TOKENS,
    InstructionsTask,
    Problem,
    Row,
    Rule,
    held_out,
    keeps,
    kept,
    problems,
    read_row,
    verify,
)
from rlvr_lab.tasks.instructions_demos import Demonstrations, demonstrations

# a rule, a row that keeps it, and one that does not
EXAMPLES = [
    (Rule("start", "7"), "7 1", "1 7"),
    (Rule("end", "7"), "1 7", "7 1"),
    (Rule("count", "3", "2"), "3 1 3", "3 3 3"),
    (Rule("count", "3", "2"), "1 3 - 3", "3"),
    (Rule("at_least", "3", "2"), "3 3 3", "3 1"),
    (Rule("forbid", "3"), "1 2", "1 3"),
    (Rule("length", "2", "3"), "1 - 2 - 3", "1"),
    (Rule("length", "2", "3"), "1 2", "1 2 3 4"),
    (Rule("order", "1", "2"), "3 1 2 1", "2 1 2"),
    (Rule("order", "1", "2"), "1 2", "1 3"),
    (Rule("format", "+"), "1 1 4", "1 4 3"),
    (Rule("format", "*"), "1 4 3", "1 3 4"),
    (Rule("format", "-"), "1 - 4 - 3", "1 - 4 3"),
    (Rule("format", "-"), "5", "5 5"),
]


@pytest.fixture(scope="module")
def pool() -> list[Problem]:
    return problems(400, 0) + problems(60, 3, sizes=(1,))


@pytest.mark.parametrize(("rule", "good", "bad"), EXAMPLES)
def test_a_rule_tells_a_row_that_keeps_it_from_one_that_does_not(rule: Rule, good: str, bad: str) -> None:
    for text, expected in ((good, True), (bad, False)):
        row = read_row(text)
        assert row is not None
        assert keeps(row, rule) is expected
    assert str(rule)


def test_every_kind_has_an_example_a_mark_and_points() -> None:
    assert {rule.kind for rule, *_ in EXAMPLES} == set(MARKS) == set(POINTS)
    assert {rule.first for rule, *_ in EXAMPLES if rule.kind == "format"} == set(FORMATS)


def test_every_problem_is_solved_by_its_solution(pool: list[Problem]) -> None:
    for problem in pool:
        verdict = verify(problem, f"</think> {problem.solution} <eos>")
        assert verdict.correct
        assert verdict.outcome == Outcome.CORRECT
        assert sum(verdict.points.values()) == pytest.approx(sum(POINTS[rule.kind] for rule in problem.rules))


def test_prompts_are_of_one_length_and_made_of_countdowns_words(pool: list[Problem]) -> None:
    assert {len(problem.prompt_ids) for problem in pool} == {PROMPT_TOKENS}
    assert PROMPT_TOKENS + MAX_RESPONSE_TOKENS <= 128
    assert all(set(problem.prompt.split()) <= set(countdown.VOCABULARY) for problem in pool)
    assert pool[0].prompt.split()[0] == "<bos>"
    assert pool[0].prompt.split()[-1] == "<think>"


def test_problems_are_distinct_seeded_and_divided() -> None:
    first = problems(60, 5)
    assert first == problems(60, 5)
    assert first != problems(60, 6)
    assert len({frozenset(problem.rules) for problem in first}) == 60
    assert Counter(len(problem.rules) for problem in first) == {2: 20, 3: 20, 4: 20}
    assert not any(map(held_out, first))
    assert all(map(held_out, problems(30, 0, evaluation=True)))
    one = first[0]
    assert held_out(one) == held_out(Problem(tuple(reversed(one.rules))))


def test_kinds_in_a_problem_differ(pool: list[Problem]) -> None:
    assert all(len({rule.kind for rule in problem.rules}) == len(problem.rules) for problem in pool)
    seen = Counter(rule.kind for problem in pool for rule in problem.rules)
    assert set(seen) == set(MARKS)
    assert min(seen.values()) > 0.05 * seen.total()


def test_problems_of_one_rule_run_out_and_others_take_their_place() -> None:
    few = problems(90, 0, evaluation=True, sizes=(1, 2))
    assert len(few) == 90
    assert 10 < sum(len(problem.rules) == 1 for problem in few) < 45
    assert 10 < len(problems(90, 0, evaluation=True, sizes=(1,))) < 45
    for sizes in ((), (5,)):
        with pytest.raises(ValueError, match="from 1 to 4"):
            problems(1, 0, sizes=sizes)


# -- verdicts ---------------------------------------------------------------------------------------------------------

TWO = Problem((Rule("start", "7"), Rule("count", "3", "2")))


def test_points_are_given_for_single_rules_and_success_for_all() -> None:
    half = verify(TWO, "( * </think> 7 3 <eos>")
    assert (half.correct, half.answer, half.reason) == (False, "7 3", "breaks: 3 exactly 2 times")
    assert half.points == {"rule_start": 0.1}
    assert verify(TWO, "</think> 7 3 3").points == {"rule_start": 0.1, "rule_count": 0.1}
    assert verify(TWO, "</think> 7 3 3", dense=False).points == {}


def test_loose_scoring_forgives_a_word_at_either_end() -> None:
    for text in ("</think> 1 7 3 3", "</think> 7 3 3 3"):
        assert not verify(TWO, text).correct
        assert verify(TWO, text, scoring="loose").correct
    assert not verify(TWO, "</think> 1 1 7 3 3", scoring="loose").correct


@pytest.mark.parametrize(
    ("response", "finished", "reason"),
    [
        ("", True, "no </think>"),
        ("7 3 3 <eos>", True, "no </think>"),
        ("</think> <eos>", True, "no row of digits"),
        ("</think> 7 3 3", False, "no <eos>"),
        ("</think> 7 ten 3", True, "no row of digits"),
        ("</think> - 7 3", True, "no row of digits"),
        ("</think> 7 - - 3", True, "no row of digits"),
        ("</think> 7 3 -", True, "no row of digits"),
        ("</think> 73 3", True, "no row of digits"),
        ("</think> ７ ٣", True, "no row of digits"),
    ],
)
def test_what_is_no_row_has_no_answer_and_no_point(response: str, finished: bool, reason: str) -> None:
    verdict = verify(TWO, response, finished)
    assert (verdict.outcome, verdict.points) == (Outcome.UNPARSABLE, {})
    assert reason in verdict.reason
    assert InstructionsTask().read(response, finished) is None


def test_the_text_after_the_last_tag_is_judged() -> None:
    assert verify(TWO, "</think> 1 </think> 7 3 3 <eos>").correct
    assert not verify(TWO, "</think> 7 3 3 </think> 1 <eos>").correct


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*countdown.VOCABULARY, "7", "3"]), max_size=30).map(" ".join))
def test_no_response_raises_and_loose_scoring_only_forgives(response: str) -> None:
    strict, loose = (verify(TWO, response, scoring=scoring) for scoring in ("strict", "loose"))
    assert loose.correct >= strict.correct
    assert set(strict.points) <= set(loose.points)
    assert strict.correct == (len(strict.points) == 2)
    assert (strict.answer is None) == (InstructionsTask().read(response, True) is None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DIGITS), st.booleans()), min_size=1, max_size=9))
def test_a_row_reads_back_as_it_was_written(pairs: list[tuple[str, bool]]) -> None:
    words, after = zip(*pairs, strict=True)
    row = Row(words, after[:-1])
    assert read_row(row.text) == row


def test_an_endless_answer_is_judged_at_once() -> None:
    assert verify(TWO, "</think> " + "7 " * 500_000).answer is not None


# -- the task and its demonstrations ----------------------------------------------------------------------------------


def test_settings_choose_scoring_points_and_sizes() -> None:
    task = InstructionsTask(dense=False, scoring="loose", sizes=(4,))
    assert task.point_names == ()
    assert all(len(problem.rules) == 4 for problem in task.problems(10, 0))
    assert task.grade(TWO, "</think> 1 7 3 3", True).correct
    assert set(InstructionsTask().point_names) == {f"rule_{kind}" for kind in MARKS}
    with pytest.raises(UserError, match="did you mean 'strict'"):
        InstructionsTask(scoring="strickt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="from 1 to 4"):
        InstructionsTask(sizes=(0,))


def words_of(tokens: list[int]) -> list[str]:
    return [countdown.VOCABULARY[i] for i in tokens]


def rules_of(words: list[str]) -> list[Rule]:
    kind_of = {mark: kind for kind, mark in MARKS.items()}
    triples = [words[i : i + 3] for i in range(1, PROMPT_TOKENS - 1, 3)]
    return [Rule(kind_of[mark], x, y) for mark, x, y in triples if mark != "_"]


def test_a_demonstration_keeps_the_rules_that_it_previews_and_often_breaks_others() -> None:
    broken = 0
    for tokens in demonstrations(300, Demonstrations(0.5), [1]):
        words = words_of(tokens)
        rules, response = rules_of(words[:PROMPT_TOKENS]), words[PROMPT_TOKENS:]
        preview, answer = response[: response.index("</think>")], response[response.index("</think>") + 1 : -1]
        assert response[-1] == "<eos>"
        assert len(response) <= MAX_RESPONSE_TOKENS
        row = read_row(" ".join(answer))
        assert row is not None
        minded = [rule for rule in rules if MARKS[rule.kind] in preview]
        assert [MARKS[rule.kind] for rule in minded] == preview
        assert all(kept(row, minded))
        assert not held_out(Problem(tuple(rules)))
        broken += not all(kept(row, rules))
    assert 60 < broken < 260


def test_a_writer_who_minds_everything_is_always_right_and_one_who_minds_nothing_previews_nothing() -> None:
    for tokens in demonstrations(60, Demonstrations(1.0), [2]):
        words = words_of(tokens)
        assert verify(Problem(tuple(rules_of(words[:PROMPT_TOKENS]))), " ".join(words[PROMPT_TOKENS:])).correct
    for tokens in demonstrations(20, Demonstrations(0.0), [2]):
        assert words_of(tokens)[PROMPT_TOKENS] == "</think>"


def test_demonstrations_are_seeded() -> None:
    one, again, other = (list(demonstrations(5, Demonstrations(), seed)) for seed in ([0, 1], [0, 1], [0, 2]))
    assert one == again != other
