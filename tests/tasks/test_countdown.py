from collections import Counter

import numpy as np
import pytest

from rlvr_lab.tasks import countdown as cd
from rlvr_lab.tasks.base import Outcome, Verdict
from rlvr_lab.tasks.expressions import parse

N = 400


def words(tokens: list[int]) -> list[str]:
    return [cd.VOCABULARY[t] for t in tokens]


def sequences(style: cd.Traces, seed: int = 0) -> list[tuple[cd.Problem, list[str]]]:
    """Problem read back from each trace's prompt, and its response words."""
    found = []
    for tokens in cd.traces(N, style, np.random.default_rng(seed)):
        prompt = words(tokens[: cd.PROMPT_TOKENS])
        numbers = tuple(int(w) for w in prompt[1:5] if w != "_")
        found.append((cd.Problem(numbers, int(prompt[6])), words(tokens[cd.PROMPT_TOKENS :])))
    return found


STYLES = pytest.mark.parametrize("style", [cd.SINGLE, cd.RETRIES], ids=["single", "retries"])


def attempts(response: list[str]) -> list[tuple[list[list[str]], str]]:
    """The thinking part as (steps of five words, verdict)."""
    found: list[tuple[list[list[str]], str]] = []
    steps: list[list[str]] = []
    thinking = response[: response.index("</think>")]
    while thinking:
        if thinking[0] in ("yes", "no"):
            found.append((steps, thinking[0]))
            steps, thinking = [], thinking[1:]
        else:
            steps.append(thinking[:5])
            thinking = thinking[5:]
    assert not steps
    return found


def test_vocabulary_has_128_entries_and_numbers_at_28() -> None:
    assert len(cd.VOCABULARY) == len(set(cd.VOCABULARY)) == 128
    assert cd.VOCABULARY[cd.NUMBER_OFFSET : cd.NUMBER_OFFSET + 100] == tuple(map(str, range(100)))
    assert cd.NUMBER_OFFSET == 28


@STYLES
def test_every_step_is_legal_and_uses_what_is_there(style: cd.Traces) -> None:
    for problem, response in sequences(style):
        for steps, _ in attempts(response):
            left = Counter(problem.numbers)
            for a, sign, b, equals, c in steps:
                x, y, z = int(a), int(b), int(c)
                assert equals == "="
                assert x >= y >= 1
                left.subtract([x, y])
                assert min(left.values()) >= 0
                left[z] += 1
                assert z == {"+": x + y, "-": x - y, "*": x * y}.get(sign, x // y)
                assert 1 <= z <= cd.MAX_VALUE
                assert sign != "/" or (x % y == 0 and y > 1)
                assert sign != "*" or y > 1
            assert sum(left.values()) == 1


@STYLES
def test_trace_verdict_agrees_with_verify(style: cd.Traces) -> None:
    outcomes = Counter()
    for problem, response in sequences(style):
        tried = attempts(response)
        claimed = tried[-1][1] == "yes"
        verdict = cd.verify(problem, " ".join(response))
        assert verdict.correct == claimed
        assert verdict.answer is not None
        assert all(said == "no" for _, said in tried[:-1])
        assert all((steps[-1][4] == str(problem.target)) == (said == "yes") for steps, said in tried)
        answer = parse(" ".join(response[response.index("</think>") + 1 : -1]))
        assert answer.value == int(tried[-1][0][-1][4])
        outcomes[claimed] += 1
    assert min(outcomes[True], outcomes[False]) > N // 20  # both cases were seen


@STYLES
def test_lengths_are_bounded_and_prompts_have_eight_tokens(style: cd.Traces) -> None:
    found = sequences(style)
    assert max(len(response) for _, response in found) <= style.max_tokens
    assert all(response[-1] == "<eos>" for _, response in found)
    assert {len(p.numbers) for p, _ in found} == {3, 4}
    assert all(len(p.prompt_ids) == cd.PROMPT_TOKENS for p, _ in found)
    assert max(len(attempts(response)) for _, response in found) == style.attempts


def test_max_tokens_is_reached() -> None:
    """An 11-token answer needs ((a b) c) d: the bound is tight, not merely safe."""
    longest = max(len(response) for _, response in sequences(cd.SINGLE))
    assert longest == cd.SINGLE.max_tokens


def test_problem_prompt_text() -> None:
    assert cd.Problem((10, 1, 4), 44).prompt == "<bos> _ 10 1 4 to 44 <think>"
    assert str(cd.Problem((10, 1, 4), 44)) == "10, 1, 4 -> 44"


def test_held_out_split_is_disjoint_and_about_a_tenth() -> None:
    def keys(problems: list[cd.Problem]) -> set[tuple[tuple[int, ...], int]]:
        return {(tuple(sorted(p.numbers)), p.target) for p in problems}

    train, test = keys(cd.problems(1500, seed=1)), keys(cd.problems(1500, seed=1, evaluation=True))
    assert len(train) == len(test) == 1500
    assert not train & test
    shown = {(tuple(sorted(p.numbers)), p.target) for p, _ in sequences(cd.RETRIES)}
    assert not shown & test
    numbers, count = cd.draw_numbers(20_000, np.random.default_rng(0))
    share = cd.held_out(numbers, np.random.default_rng(1).integers(1, 61, 20_000)).mean()
    assert 0.08 < share < 0.12
    assert 0.45 < (count == 3).mean() < 0.55


def test_held_out_ignores_the_order_of_numbers() -> None:
    numbers, _ = cd.draw_numbers(500, np.random.default_rng(0))
    target = np.random.default_rng(1).integers(1, 61, 500)
    assert (cd.held_out(numbers, target) == cd.held_out(numbers[:, ::-1], target)).all()
    assert (cd.held_out(numbers, target) != cd.held_out(numbers, target + 1)).any()


def solvable(values: tuple[int, ...], target: int) -> bool:
    """Brute force over legal steps."""
    if len(values) == 1:
        return values[0] == target
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i == j or a < b:
                continue
            rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
            results = [a + b, a - b, a * b] + ([a // b] if a % b == 0 else [])
            if any(1 <= r <= cd.MAX_VALUE and solvable((*rest, r), target) for r in results):
                return True
    return False


def test_problems_are_solvable_and_not_trivial() -> None:
    found = cd.problems(120, seed=3) + cd.problems(30, seed=3, evaluation=True)
    assert all(solvable(p.numbers, p.target) for p in found)
    assert all(p.target not in p.numbers for p in found)
    assert not solvable((1, 1, 1), 60)


def test_same_seed_same_problems_other_seed_others() -> None:
    assert cd.problems(50, seed=7) == cd.problems(50, seed=7)
    assert cd.problems(50, seed=7) != cd.problems(50, seed=8)
    assert sequences(cd.RETRIES, 5) == sequences(cd.RETRIES, 5)
    assert sequences(cd.RETRIES, 5) != sequences(cd.RETRIES, 6)


PROBLEM = cd.Problem((10, 1, 4), 44)
SOLVED = "10 + 1 = 11 11 * 4 = 44 yes </think> ( 10 + 1 ) * 4 <eos>"


@pytest.mark.parametrize(
    ("response", "correct", "answer", "reason"),
    [
        (SOLVED, True, "((1+10)*4)", "correct"),
        ("</think> 4 * ( 1 + 10 ) <eos>", True, "((1+10)*4)", "correct"),
        ("</think> 10 * 4 + 1 <eos>", False, "((10*4)+1)", "gives 41, not 44"),
        ("</think> 44 <eos>", False, "44", "each number exactly once"),
        ("</think> 10 * 4 + 4 <eos>", False, "((10*4)+4)", "each number exactly once"),
        ("</think> ( 10 + 1 * 4 <eos>", False, None, "does not parse"),
        ("</think> <eos>", False, None, "does not parse"),
        ("( 10 + 1 ) * 4 <eos>", False, None, "exactly one </think>"),
        ("</think> ( 10 + 1 ) * 4 </think> ( 10 + 1 ) * 4 <eos>", False, None, "exactly one </think>"),
        ("</think> 9**9**9**9 <eos>", False, None, "does not parse"),
    ],
)
def test_verify(response: str, correct: bool, answer: str | None, reason: str) -> None:
    verdict = cd.verify(PROBLEM, response)
    assert (verdict.correct, verdict.answer) == (correct, answer)
    assert reason in verdict.reason


def test_unfinished_response_is_wrong() -> None:
    verdict = cd.verify(PROBLEM, "</think> ( 10 + 1 ) * 4", finished=False)
    assert not verdict.correct
    assert verdict.answer is None


def test_token_class_names() -> None:
    response = SOLVED.split()
    step = ["first operand", "operator", "second operand", "equals", "result"]
    assert cd.token_class(response) == [*step, *step, "verdict", "close", *["answer"] * 7, "end"]


@STYLES
def test_token_class_fits_every_written_trace(style: cd.Traces) -> None:
    for _, response in sequences(style):
        names = cd.token_class(response)
        assert len(names) == len(response)
        assert "other" not in names


def test_token_class_says_other_from_the_first_misfit() -> None:
    assert cd.token_class(["10", "+", "=", "11", "yes"]) == ["first operand", "operator", "other", "other", "other"]
    assert cd.token_class(["10", "yes"]) == ["first operand", "other"]


def test_arithmetic_slips() -> None:
    slipped = "10 + 1 = 11 11 * 4 = 45 no 7 / 2 = 3 no </think> 1 <eos>"
    assert cd.arithmetic_slips(slipped.split()) == (2, 3)
    assert cd.arithmetic_slips(["</think>", "1", "+", "1", "=", "3"]) == (0, 0)
    assert all(cd.arithmetic_slips(response)[0] == 0 for _, response in sequences(cd.RETRIES))


def test_a_verdict_is_one_of_four_words() -> None:
    assert Verdict(True, "a", "correct").outcome is Outcome.CORRECT
    assert Verdict(False, "a", "not b").outcome is Outcome.WRONG
    assert Verdict(False, None, "no answer").outcome is Outcome.UNPARSABLE
    assert Verdict(False, "9**9**9", "too large", refused=True).outcome is Outcome.REFUSED


def test_reading_looks_at_no_problem() -> None:
    assert cd.read("</think> 4 * ( 1 + 10 ) <eos>") == cd.read("</think> ( 10 + 1 ) * 4 <eos>") is not None
    assert cd.read("</think> ( 10 + 1 ) * 4", finished=False) is None
    assert cd.read("( 10 + 1 ) * 4 <eos>") is None


def test_the_loose_check_accepts_what_passes_the_target_and_nothing_else() -> None:
    problem = cd.Problem((10, 1, 4), 44)
    written = ("( 10 + 1 ) * 4", "( 4 + 1 ) * 10", "10 * 4 + 1", "10 * 10 * 4", "44", "( 10 +")
    accepted = [text for text in written if cd.verify(problem, f"</think> {text} <eos>", check="at_least").correct]
    assert accepted == ["( 10 + 1 ) * 4", "( 4 + 1 ) * 10"]
    assert not cd.verify(problem, "</think> ( 4 + 1 ) * 10 <eos>").correct


def test_limits_are_refusals_and_the_rest_is_unparsable() -> None:
    problem = cd.Problem((10, 1, 4), 44)
    outcomes = {text: str(cd.verify(problem, f"</think> {text} <eos>").outcome)
                for text in ("9 ** 9", "", "( " * 20 + "1", "1" * 500, "99999 * 99999", "1 / 0")}  # fmt: skip
    assert list(outcomes.values()) == ["unparsable", "unparsable", "refused", "refused", "refused", "unparsable"]
