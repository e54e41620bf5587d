"""Minerva's and OlympiadBench's graders: what the official ones accept, what they do not, and hostile text."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.tasks.benchmarks_grading import MAX_ITEMS, grade_minerva, grade_olympiad, minerva_close, number_of
from rlvr_lab.tasks.math_answer import DEFAULT_LIMITS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.5e33", Fraction(45) * 10**32),
        ("4.5E+33", Fraction(45) * 10**32),
        ("4.5 \\times 10^{33}", Fraction(45) * 10**32),
        ("$4.5\\cdot10^{33}$", Fraction(45) * 10**32),
        ("-2.19 \\times 10^6", Fraction(-2190000)),
        ("10^{-5}", Fraction(1, 10**5)),
        ("2.7 \\times 10^{5} \\mathrm{~m/s}", Fraction(270000)),
        ("\\frac{1}{4}", Fraction(1, 4)),
        ("0.50", Fraction(1, 2)),
        ("210^3", None),
        ("\\times 10^{3}", None),
        ("e5", None),
        ("1e99999", None),
        ("2\\pi", None),
        ("9" * 400 + "e1", None),
    ],
)
def test_numbers_and_powers_of_ten(text: str, value: Fraction | None) -> None:
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("a", "b", "close"),
    [
        ("4.5e33", "4.5e33", True),
        ("4.5e33", "4.50004e33", True),
        ("4.5e33", "4.5001e33", False),
        ("-3", "-3", True),  # the original's (a + b) / 2 refuses every negative number ...
        ("0", "0", True),  # ... and 0
        ("1.05e-12", "1.06e-12", True),  # near zero: one per cent
        ("1.05e-12", "1.07e-12", False),
        ("1e-12", "-1e-12", False),
        ("1", "1.00002", False),
    ],
)
def test_minervas_tolerance(a: str, b: str, close: bool) -> None:
    x, y = number_of(a), number_of(b)
    assert x is not None
    assert y is not None
    assert minerva_close(x, y) is close
    assert minerva_close(-x, -y) is close


@pytest.mark.parametrize(
    ("response", "reference", "correct", "answer"),
    [
        ("\\boxed{2190000}", "2.19e6", True, "2190000"),
        ("\\boxed{2.2 \\times 10^{6}}", "2.19e6", False, "2.2\\times 10^{6}"),
        ("\\boxed{\\frac{1}{8}}", "0.125", True, "1/8"),
        ("\\boxed{x+1}", "1+x", True, "1+x"),
        ("\\boxed{3.1}", "\\pi", False, "31/10"),
        ("nothing", "1", False, None),
    ],
)
def test_minerva_verdicts(response: str, reference: str, correct: bool, answer: str | None) -> None:
    verdict = grade_minerva(response, reference, DEFAULT_LIMITS)
    assert (verdict.correct, verdict.answer) == (correct, answer)


ONE = {"multiple": False}
MANY = {"multiple": True}


@pytest.mark.parametrize(
    ("response", "reference", "settings", "correct"),
    [
        ("\\boxed{1,2}", "2,1", MANY, True),
        ("\\boxed{1,2}", "2,3", MANY, False),
        ("\\boxed{1,1}", "1,2", MANY, False),  # one to one
        ("\\boxed{5}", "5,6", MANY, False),
        ("\\boxed{5,6}", "5", MANY, False),
        ("So the final answer is \\boxed{1} and \\boxed{2}.", "$2,1$", MANY, True),
        ("\\boxed{9}. So the final answer is \\boxed{1}, \\boxed{2}", "1,2", MANY, True),
        ("\\boxed{1} \\boxed{2}", "1,2", MANY, False),  # without the sentence the last box counts
        ("\\boxed{\\pm 2}", "$2,-2$", MANY, True),
        ("\\boxed{1-\\sqrt{2}, \\sqrt{2}+1}", "$1 \\pm \\sqrt{2}$", MANY, True),
        ("\\boxed{(3,4),(1,2)}", "(1,2),(3,4)", MANY, True),
        ("\\boxed{x=5}", "5", ONE, True),
        ("\\boxed{5}", "$x=5$", ONE, True),
        ("\\boxed{x \\approx 3.14}", "3.14", ONE, True),
        ("\\boxed{x \\in (1,2)}", "(1,2)", ONE, True),
        ("\\boxed{[1,2]}", "(1,2)", ONE, False),
        ("\\boxed{3.15}", "3.14", ONE | {"tolerances": (0.01,)}, True),
        ("\\boxed{3.16}", "3.14", ONE | {"tolerances": (0.01,)}, False),
        ("\\boxed{0.51, 0.2}", "0.5,0.3", MANY | {"tolerances": (0.01, 0.1)}, True),
        ("\\boxed{0.6, 0.3}", "0.5,0.3", MANY | {"tolerances": (0.01, 0.1)}, False),
        ("\\boxed{0.6, 0.35}", "0.5,0.3", MANY | {"tolerances": (0.1,)}, True),
        ("\\boxed{50\\%}", "0.5", ONE, True),
        ("\\boxed{50}", "0.5", ONE, False),  # the original takes x, x/100 and 100x for equal
        ("\\boxed{30 \\mathrm{cm}}", "30", ONE | {"unit": "$\\mathrm{cm}$"}, True),
        ("\\boxed{}", "30", ONE, False),
        ("\\boxed{y=2x+1}", "$y-1=2x$", ONE, True),
    ],
)
def test_olympiadbench_verdicts(response: str, reference: str, settings: dict[str, object], correct: bool) -> None:
    verdict = grade_olympiad(response, reference, DEFAULT_LIMITS, **settings)  # type: ignore[arg-type]
    assert verdict.correct is correct, verdict


def test_right_answers_are_one_class_in_any_order() -> None:
    found = {grade_olympiad(f"\\boxed{{{a}}}", "2,1", DEFAULT_LIMITS, multiple=True).answer for a in ("1,2", "2, 1.0")}
    assert len(found) == 1
    wrong = {grade_olympiad(f"\\boxed{{{a}}}", "2,1", DEFAULT_LIMITS, multiple=True).answer for a in ("3,4", "4,3")}
    assert len(wrong) == 1


def test_hostile_answers_end_soon() -> None:
    """Towers, long lists and deep nesting go through the same guard as everything else."""
    started = time.monotonic()
    for text in (
        "9^{9^{9^{9}}}, 8^{8^{8^{8}}}",
        ", ".join(f"x^{{{i}}}+{i}" for i in range(MAX_ITEMS + 1)),
        "(" * 200 + ")" * 200,
        "1e999999999",
        "\\pm " * 100,
        "=" * 400,
    ):
        verdict = grade_olympiad(f"\\boxed{{{text}}}", "x+1, x+2", DEFAULT_LIMITS, multiple=True, tolerances=(0.1,))
        assert not verdict.correct
        assert not grade_minerva(f"\\boxed{{{text}}}", "4.5e33", DEFAULT_LIMITS).correct
    assert time.monotonic() - started < 30


@given(st.text(alphabet="\\boxed{}()[]$,=^+-pmin 0123456789e.%", max_size=60), st.booleans())
def test_any_text_gets_a_verdict(text: str, multiple: bool) -> None:
    verdict = grade_olympiad(f"So the final answer is \\boxed{{{text}}}", "1,2", DEFAULT_LIMITS, multiple=multiple)
    assert verdict.answer is not None or not verdict.correct
    number_of(text)
