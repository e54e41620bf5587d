import contextlib
import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.tasks import reasoning
from rlvr_lab.tasks.base import Outcome
from rlvr_lab.tasks.reasoning import JudgeProcess, Limits, ReasoningProblem, ReasoningTask, extract, held_out

LIBRARY = importlib.util.find_spec("reasoning_gym") is not None
needs_library = pytest.mark.skipif(
    not LIBRARY, reason="reasoning-gym is not installed: pip install 'rlvr-lab[reasoning]'"
)


@pytest.fixture(scope="module")
def child() -> ModuleType:
    """The child's script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(
        "reasoning_child", Path(reasoning.__file__).with_name("reasoning_child.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", 7), ("(8 - 2) // 4", 1), ("-2 ** 2", -4), ("0x1f << 3 & 0xff | 1", 249), ("7 % 4 / 2", 1.5),
        ("~5", -6), ("['a', 'b']", ["a", "b"]), ("[[1, 2], [3]]", [[1, 2], [3]]), ("(1, 2)", (1, 2)),
        ("{1, 2}", {1, 2}),
    ],
)  # fmt: skip
def test_arithmetic_gives_what_python_gives(child: ModuleType, text: str, value: object) -> None:
    assert child.arithmetic(text) == value


def test_only_named_functions_are_called(child: ModuleType) -> None:
    assert child.arithmetic("Integer(3) * x", {"Integer": int}, {"x": 2}) == 6
    with pytest.raises(child.Refused):
        child.arithmetic("lambdify(3)", {"lambdify": int})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "().__class__", "(lambda: 1)()", "[x for x in (1, 2)]", "open('x')", "x.y",
        "exec('1')", "f'{1}'", "9**9**9**9", "(9**9)**99999", "1 << 10**9", "_", "__builtins__", "Integer(1, base=3)",
        "[1][0]", "1 if 1 else 2", "(x := 1)",
    ],
)  # fmt: skip
def test_everything_else_is_refused_before_it_costs_anything(child: ModuleType, text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(child.Refused):
        child.arithmetic(text, {"Integer": int, "open": open})
    assert time.perf_counter() - start < 0.5


@settings(max_examples=300, deadline=500)
@given(st.text(alphabet="0123456789+-*/%<>&|~()[]{},.'\"_ abcdefilmnopstx:=\n", max_size=40))
def test_no_text_does_more_than_arithmetic(child: ModuleType, text: str) -> None:
    allowed = (child.Refused, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError)
    with contextlib.suppress(*allowed):
        child.arithmetic(text, {"Integer": int}, {"x": 2})


@pytest.mark.parametrize(
    ("response", "answer", "reason"),
    [
        ("so <answer> 5 </answer>.", "5", ""),
        ("<answer>1</answer> no, <answer>2\n3</answer>", "2\n3", ""),
        (r"thus \boxed{7}", "7", ""),
        (r"\boxed{7} <answer>8</answer>", "8", ""),
        ("5", None, "no <answer>"),
        ("", None, "no <answer>"),
        ("<answer>5", None, "<answer> is not closed"),
        ("<answer> </answer>", None, "empty answer"),
        ("<answer>" + "5" * 4001 + "</answer>", None, "answer longer than 4000 characters"),
        ("<answer>" * 100_000, None, "<answer> is not closed"),
    ],
)
def test_extraction(response: str, answer: str | None, reason: str) -> None:
    assert extract(response, Limits()) == (answer, reason)


def test_a_template_needs_the_question() -> None:
    with pytest.raises(UserError, match=r"data\.template must hold"):
        ReasoningTask(template="none")


def test_a_child_without_the_library_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "child.py"
    broken.write_text('print(\'{"error": "ModuleNotFoundError: No module named reasoning_gym"}\')')
    monkeypatch.setattr(reasoning, "_CHILD", broken)
    with pytest.raises(
        UserError, match=r"reasoning-gym cannot be imported \(ModuleNotFoundError.*pip install 'rlvr-lab"
    ):
        JudgeProcess(1024).ask({}, 5.0)


# -- with the library -------------------------------------------------------------------------------------------------


def judged(task: ReasoningTask, problem: ReasoningProblem, answer: str) -> Any:
    return task.grade(problem, f"<answer>{answer}</answer>", True)


@needs_library
def test_problems_are_distinct_repeat_and_are_held_out() -> None:
    task = ReasoningTask("chain_sum", {"min_terms": 2, "max_terms": 3})
    train, evaluation = task.problems(40, 1), task.problems(10, 1, evaluation=True)
    assert train == task.problems(40, 1)
    assert len({p.question for p in train}) == 40
    assert not any(held_out(p.question) for p in train)
    assert all(held_out(p.question) for p in evaluation)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain_sum", "countdown", "number_sorting", "polynomial_multiplication", "syllogism"])
def test_the_librarys_own_answers_are_right_and_others_are_not(name: str) -> None:
    task = ReasoningTask(name, limits=Limits(seconds=60.0))  # a loaded machine imports and computes slowly
    for problem in task.problems(3, 0):
        assert judged(task, problem, problem.answer).outcome is Outcome.CORRECT
        # the same answer through the library's judge, not through the equality of texts
        assert task._judged(problem, problem.answer, "form").correct
        assert judged(task, problem, "no such answer").outcome is not Outcome.CORRECT


@needs_library
@pytest.mark.slow
def test_hostile_answers_run_nothing_and_end_at_the_limit(tmp_path: Path) -> None:
    task = ReasoningTask("countdown")
    problem = task.problems(1, 0)[0]
    assert judged(task, problem, problem.answer + " + 0 - 0").outcome in (Outcome.CORRECT, Outcome.WRONG)  # warm
    mark = tmp_path / "mark"
    for answer in (
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        "9**9**9**9",
        "().__class__.__bases__",
        "99999999!",
    ):
        start = time.perf_counter()
        assert judged(task, problem, answer).outcome is Outcome.REFUSED
        assert time.perf_counter() - start < task.limits.seconds + 2
    assert not mark.exists()


@needs_library
@pytest.mark.slow
def test_a_hole_of_the_library_is_passed_on() -> None:
    """puzzle24 does not look whether the numbers are those of the problem (0.1.25): the chapter `verifiers` tells."""
    task = ReasoningTask("puzzle24", limits=Limits(seconds=60.0))
    problems = task.problems(3, 0)
    assert not any("6, 4, 1, 1" in problem.question for problem in problems)
    assert all(judged(task, problem, "6*4*1*1").correct for problem in problems)


@needs_library
def test_an_unknown_data_set_or_setting_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.settings\.dataset 'chain_sun' is not in reasoning_gym; did you mean"):
        ReasoningTask("chain_sun").problems(1, 0)
    with pytest.raises(UserError, match=r"data\.settings\.config .*min_term"):
        ReasoningTask("chain_sum", {"min_term": 3}).problems(1, 0)
