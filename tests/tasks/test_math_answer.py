import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.tasks import child_process, countdown, sympy_process
from rlvr_lab.tasks.base import Outcome, Verdict
from rlvr_lab.tasks.jsonl import MathProblem, load_jsonl
from rlvr_lab.tasks.math_answer import DEFAULT_LIMITS, Limits, canonical, equal, extract, grade, guard, read
from rlvr_lab.tasks.registry import CountdownTask, MathTask, task
from rlvr_lab.tasks.sympy_process import SympyProcess

DATA = Path(os.environ.get("RLVR_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def warm() -> None:
    """Start the child before anything is timed: importing sympy takes seconds on a loaded machine."""
    assert grade(r"\boxed{x+1}", "1+x").correct


@pytest.fixture(scope="module")
def process() -> Iterator[SympyProcess]:
    own = SympyProcess(DEFAULT_LIMITS.megabytes)
    yield own
    own.close()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"first \boxed{1}, then \boxed{\frac{2}{3}}.", r"\frac{2}{3}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}} #### 7", r"\{1, 2\}"),
        ("work\n#### 18", "18"),
        ("#### 1\n#### 2", "2"),
        ("#### 18 dollars", "18"),
        ("#### Step 2: add 3\nThe answer is 7.", "7"),
        ("The answer is 5. Wait, the answer is 6, as 3 + 3 = 6 and 100 > 6.", "6"),
        ("**Final Answer:** $\\frac{3}{4}$ of 12", r"\frac{3}{4}"),
        ("the final answer is \\(3x+2\\).", "3x+2"),
        ("the answer is -1,450,000 dollars", "-1,450,000"),
        ("Answer: Tuesday", "Tuesday"),
        ("The answer is not known to anyone, but 3 apples", "3"),
        ("we get 10-3 = 7 apples.", "7"),
        ("it fell to -3", "-3"),
        ("it costs $18.50.", "$18.50"),
        ("x2", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{4", None),
        (r"\boxed{3} and then \boxed{4", None),
    ],
)
def test_extraction_order(response: str, expected: str | None) -> None:
    assert extract(response)[0] == expected


def test_only_the_tail_is_searched() -> None:
    limits = Limits(response_characters=100)
    assert extract(r"\boxed{5}" + " " * 80, limits)[0] == "5"
    assert extract(r"\boxed{5}" + " " * 100, limits)[0] is None


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ("27", "27"), ("027", "27"), ("27.0", "27"), ("$27", "27"), (r"\$27.00", "27"), ("1,234", "1234"),
        ("1{,}234", "1234"), ("-3", "-3"), ("−3", "-3"), ("0.50", "1/2"), (r"\dfrac{1}{2}", "1/2"), (r"\frac12", "1/2"),
        (r"-\frac{2}{4}", "-1/2"), ("50%", "50"), (r"50\%", "50"), (r"90^\circ", "90"), (r"18\text{ dollars}", "18"),
        ("18 dollars", "18"), (r"\text{(A)}", "A"), (r"\left( 1,\, 2 \right)", "(1,2)"), ("3 pi", "3 pi"),
        (r"3\pi", r"3\pi"), ("1/0", "1/0"), ("12,34", "12,34"), ("New   York.", "New York"), ("$x+1$", "x+1"),
        (r"10_\text{two}", "10_two"), ("5 cm^2", "5"), ("5 m/s", "5"), ("5 km / h", "5"), ("5 m³", "5"),
        ("1 1/2", "3/2"), ("5 x/y", "5 x/y"), ("5 ab^2", "5 ab^2"), ("5e3", "5000"), ("2.5E-1", "1/4"),
        ("４２", "42"), ("٤٢", "42"), ("五", "五"), ("∅", r"\emptyset"),
    ],
)  # fmt: skip
def test_canonical_form(written: str, form: str) -> None:
    assert canonical(written) == form
    assert canonical(form) == form


@given(st.fractions(max_denominator=10**6))
def test_numbers_are_reduced_exactly(value: object) -> None:
    top, bottom = value.numerator, value.denominator  # type: ignore[attr-defined]
    assert canonical(f"{3 * top}/{3 * bottom}") == canonical(f"\\frac{{{2 * top}}}{{{2 * bottom}}}") == str(value)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("18", "18"), ("18.0", "18"), ("025", "25"), ("0.333333", r"\frac{1}{3}"), ("0.1666667", "1/6"),
        (r"50\%", "0.5"), ("x+1", "1+x"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x=5", "5"), (r"\{2,1\}", r"\{1,2\}"), ("(x+1)^2", "x^2+2x+1"), ("2^{10}", "1024"), ("5!", "120"),
        (r"1\frac{1}{2}", "1.5"), ("2^{2023}", r"2\cdot 2^{2022}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("new york", "New York"), (r"x \le 3", "x<=3"), ("5, 6", "6, 5"),
    ],
)  # fmt: skip
def test_equal_answers_are_correct_and_share_the_reference_form(answer: str, reference: str) -> None:
    verdict = grade(f"\\boxed{{{answer}}}", reference)
    assert verdict.correct, verdict.reason
    assert verdict.answer == grade(f"\\boxed{{{reference}}}", reference).answer


@pytest.mark.parametrize("reference", [r"so it is \boxed{7}", "3+4 = <<3+4=7>>7\n#### 7", " 7 ", "$7$"])
def test_reference_may_be_a_worked_answer(reference: str) -> None:
    assert grade(r"\boxed{7}", reference) == Verdict(True, "7", "correct")
    assert not grade(r"\boxed{3}", reference).correct


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("18", "19"), ("0.33", r"\frac{1}{3}"), ("0.0000001", "0.0000002"), ("x+1", "x+2"), ("5,6", "5"), ("5x", "5"),
        (r"\text{east}", r"\text{seat}"), ("(1,3)", "(1,2)"), ("[0,1]", "[0,1)"), ("x", "5"), ("1/0", "5"),
        ("yes", "5"), (r"5\pm 1", "5"), ("3 pi", "3"), (r"\infty", "5"), ("B", "A"), ("-5", "5"), ("1,234", "1.234"),
    ],
)  # fmt: skip
def test_unequal_answers_are_wrong_and_keep_their_own_form(answer: str, reference: str) -> None:
    verdict = grade(f"\\boxed{{{answer}}}", reference)
    assert not verdict.correct
    assert verdict.answer == canonical(answer)
    assert verdict.reason


HOSTILE = [
    ("9**9**9**9", "tower"),
    ("9^9^9^9", "tower"),
    ("9^{9^{9^{9}}}", "tower"),
    ("10^{10^{10}}", "tower"),
    (r"99^{9^\frac{9^9}{1}}", "tower"),
    ("9^{99}^{99}", "tower"),
    (r"\exp(\exp(\exp(\exp(99))))", "tower"),
    ("((9^{99})^{99})^{99}", "exponents beyond"),
    ("2^{1 000 000 000}", "exponents beyond"),
    ("2^{1{,}000{,}000}", "exponents beyond"),
    ("10**1000000000", "exponents beyond"),
    ("1e999999999", "exponents beyond"),
    (r"\sqrt[99999999]{3}", "exponents beyond"),
    ("(x+y+z)^{9000}", "exponents beyond"),
    ("factorial(99999999)", "factorial"),
    (r"\operatorname{factorial}(99999999)", "factorial"),
    ("1000000!", "factorial"),
    ("(10^9)!", "factorial"),
    ("9^{9!}", "factorial"),
    ("3!!!!", "factorial"),
    (r"\binom{1000000000}{500000000}", "factorial"),
    (r"\Gamma(10^{9})", "factorial"),
    (r"\int_0^\infty e^{-x^2}dx", r"evaluated: \int"),
    (r"\sum_{n=1}^{10^{9}} n", r"evaluated: \sum"),
    (r"\prod_{i=1}^{999999} i", r"evaluated: \prod"),
    ("(" * 400, "nests brackets"),
    ("(" * 5, "unbalanced"),
    ("5)", "unbalanced"),
    ("(" * 200 + "5" + ")" * 200, "nests brackets"),
    (r"\{" * 3 + "5", "unbalanced"),
    ("1" * 499, "digits"),
    ("1+" * 240 + "1", "too long for algebra"),
    ("x" * 499, "too long for algebra"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE, ids=[t[:24] for t, _ in HOSTILE])
def test_hostile_answer_is_refused_by_its_text(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(megabytes: int) -> None:
        raise AssertionError("sympy must not see this")

    monkeypatch.setattr(sympy_process, "shared", forbidden)
    start = time.perf_counter()
    verdict = grade(f"\\boxed{{{text}}}", "5")
    assert time.perf_counter() - start < 0.5
    assert not verdict.correct
    assert reason in verdict.reason
    assert grade(f"\\boxed{{{text}}}", text).correct  # the same text is the same answer, no algebra needed


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        (r"\boxed{5}", Outcome.CORRECT), (r"\boxed{6}", Outcome.WRONG), ("nothing", Outcome.UNPARSABLE),
        (r"\boxed{5", Outcome.UNPARSABLE), (r"\boxed{}", Outcome.UNPARSABLE), ("", Outcome.UNPARSABLE),
        (r"\boxed{9**9**9**9}", Outcome.REFUSED), ("\\boxed{" + "1" * 600 + "}", Outcome.REFUSED),
        ("the answer is " + "9" * 600, Outcome.REFUSED), (r"\boxed{99999999!}", Outcome.REFUSED),
    ],
)  # fmt: skip
def test_every_verdict_has_its_word(response: str, outcome: Outcome) -> None:
    assert grade(response, "5").outcome is outcome


def test_a_comparison_that_is_cut_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in ("the comparison took longer than 1 s", "memory", "nested too deeply", "the comparison crashed"):
        late = type("Late", (), {"equal": lambda self, *_, why=reason: (False, why)})()
        monkeypatch.setattr(sympy_process, "shared", lambda megabytes, late=late: late)
        assert grade(r"\boxed{a+b}", f"c+{len(reason)}").outcome is Outcome.REFUSED
    late = type("Unread", (), {"equal": lambda self, *_: (False, "cannot read the answer as LaTeX")})()
    monkeypatch.setattr(sympy_process, "shared", lambda megabytes: late)
    assert grade(r"\boxed{a+b}", "c+99").outcome is Outcome.WRONG


def test_reading_looks_at_no_reference() -> None:
    assert read(r"so \boxed{\frac{2}{4}}") == read("#### 0.5") == "1/2"
    assert read("") is None
    assert read(r"\boxed{}") is None
    # the verdict of a right answer takes the reference's form, and would tell the label
    assert grade(r"\boxed{x+1}", "1+x").answer == "1+x"
    assert read(r"\boxed{x+1}") == "x+1"
    assert equal("x+1", "1+x")
    assert not equal("x+1", "x+2")
    assert MathTask().read(r"\boxed{2}", finished=False) is None


def test_a_hostile_reference_is_refused_too() -> None:
    assert "reference holds a tower" in grade(r"\boxed{x}", "9^{9^{9^{9}}}").reason
    assert "reference longer" in grade("5", "1" * 1_000_000).reason


@pytest.mark.parametrize(
    "text",
    ["e^{x^2}", "2^{2^n}", "2^{100}+3^{50}", "10!", r"\binom{10}{3}", "(x+1)^2", r"\sqrt[3]{7}", "[0,1)", r"\{1,2\}"],
)
def test_guard_lets_ordinary_answers_pass(text: str) -> None:
    assert guard(text) is None


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" + "1" * 1_000_000 + "}",
        "\\boxed{" * 100_000,
        "\\boxed{" + "{" * 1_000_000,
        "####" * 100_000,
        "answer is " * 100_000,
        "1" * 1_000_000,
        "$" * 1_000_000,
        "1,111" * 200_000,
        "answer:" + "*" * 19_000,
        "answer is \\(" + "\\(" * 9_000,
        "- " * 10_000,
        "{,}" * 7_000,
        "9" + " " * 19_000,
        "\\" * 100_000,
    ],
    ids=lambda r: r[:12],
)
def test_hostile_response_is_searched_in_linear_time(response: str) -> None:
    start = time.perf_counter()
    verdict = grade(response, "5")
    assert time.perf_counter() - start < 0.5
    assert not verdict.correct


def test_long_answer_is_named() -> None:
    assert "more than 500 characters" in grade("\\boxed{" + "1+" * 300 + "}", "5").reason
    assert "longer than 500 characters" in grade("9" * 501, "5").reason


@settings(max_examples=300, deadline=500)
@given(st.text(alphabet="\\{}()[]^*!$#.,=/-+ 0129eix", max_size=60))
def test_no_text_breaks_extraction_canonical_form_or_guard(text: str) -> None:
    answer, reason = extract(text)
    assert (answer is None) == bool(reason)
    form = canonical(text)
    assert canonical(form) is not None
    assert guard(form) is None or guard(form)


# --- the child process ------------------------------------------------------------------------------------------------

SLOW = "(x+y+z+w+v)^{400}"  # the guard refuses it; asked of the child directly it takes minutes


def test_deadline_kills_the_child_and_a_new_one_answers(process: SympyProcess) -> None:
    assert process.equal("x+1", "1+x", 20.0) == (True, "")
    first = process.process
    assert first is not None
    start = time.perf_counter()
    equal, reason = process.equal("5", SLOW, 1.0)
    assert time.perf_counter() - start < 3.0
    assert not equal
    assert reason == "the comparison took longer than 1 s"
    assert first.poll() is not None
    assert process.equal("x+1", "1+x", 20.0) == (True, "")
    assert process.process is not first


def test_a_killed_child_is_replaced(process: SympyProcess) -> None:
    assert process.equal("x+1", "1+x", 20.0)[0]
    assert process.process is not None
    process.process.kill()
    process.process.wait()
    assert process.equal("x+1", "1+x", 20.0) == (True, "")


def test_a_child_that_dies_during_the_question_is_a_reason_not_an_exception(process: SympyProcess) -> None:
    assert process.equal("x+1", "1+x", 20.0)[0]
    child = process.process
    assert child is not None
    threading.Timer(0.3, child.kill).start()
    assert process.equal("5", SLOW, 20.0) == (False, "the comparison crashed")
    assert process.equal("x+1", "1+x", 20.0) == (True, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
def test_memory_limit_bites() -> None:
    child = Path(sympy_process.__file__).with_name("sympy_child.py")
    code = f"""
import runpy
runpy.run_path({str(child)!r})["limit_memory"](512)
bytearray(100 << 20)
try:
    bytearray(600 << 20)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "refused"


def test_child_out_of_memory_is_a_reason_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "child.py"
    full.write_text(
        "import sys\nprint('{\"ready\": true}', flush=True)\n"
        'for line in sys.stdin: print(\'{"error": "memory"}\', flush=True)'
    )
    monkeypatch.setattr(sympy_process, "_CHILD", full)
    process = SympyProcess(700)
    try:
        assert process.equal("x", "y", 20.0) == (False, "the comparison needed more than 700 MB")
        monkeypatch.setattr(sympy_process, "_CHILD", Path(sympy_process.__file__).with_name("sympy_child.py"))
        process.close()
        assert process.equal("x+1", "1+x", 20.0) == (True, "")
    finally:
        process.close()


@pytest.mark.parametrize("noise", ["not json", "[1]", "x" * 10_000])
def test_a_broken_protocol_is_a_reason(noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    babbler = tmp_path / "child.py"
    babbler.write_text(
        f"import sys\nprint('{{\"ready\": true}}', flush=True)\nfor line in sys.stdin: print({noise!r}, flush=True)"
    )
    monkeypatch.setattr(sympy_process, "_CHILD", babbler)
    process = SympyProcess(1024)
    assert process.equal("x", "y", 20.0) == (False, "the comparison crashed")
    process.close()


def test_child_reports_what_it_cannot_read(process: SympyProcess) -> None:
    assert process.equal("5", "?", 20.0) == (False, "cannot read the answer as LaTeX")
    assert process.equal("?", "5", 20.0) == (False, "cannot read the reference as LaTeX")


def test_threads_share_one_child(process: SympyProcess) -> None:
    found: dict[int, bool] = {}

    def ask(i: int) -> None:
        found[i] = process.equal(f"{i}+x", f"x+{i + i % 2}", 60.0)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: i % 2 == 0 for i in range(1, 9)}


def _child_pid() -> int:
    process = sympy_process.shared(DEFAULT_LIMITS.megabytes).process
    assert process is not None
    return process.pid


def _grade_in_fork(queue: "multiprocessing.SimpleQueue[tuple[bool, int]]") -> None:
    queue.put((grade(r"\boxed{y+3}", "3+y").correct, _child_pid()))
    child_process.close_all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_gets_its_own_child(warm: None) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    before = _child_pid()
    fork = context.Process(target=_grade_in_fork, args=(queue,))
    with sympy_process.shared(DEFAULT_LIMITS.megabytes).lock:  # as another thread might, which the fork does not have
        fork.start()
    fork.join(60)
    fork.kill()
    assert fork.exitcode == 0
    correct, pid = queue.get()
    assert correct
    assert pid != before
    assert grade(r"\boxed{z+3}", "3+z").correct
    assert _child_pid() == before  # neither shared nor ended by the fork


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "from rlvr_lab.tasks import sympy_process as s; p = s.shared(1024);"
        "print(p.equal('x+1', '1+x', 60.0)[0], p.process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    equal, pid = done.stdout.split()
    assert equal == "True"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_missing_math_verify_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "child.py"
    broken.write_text('print(\'{"error": "ModuleNotFoundError: No module named math_verify"}\')')
    monkeypatch.setattr(sympy_process, "_CHILD", broken)
    with pytest.raises(UserError, match=r"No module named math_verify.*pip install math-verify"):
        SympyProcess(1024).equal("x", "y", 5.0)


def test_text_is_data_in_the_protocol(process: SympyProcess) -> None:
    trick = '"}\n{"gold": "5", "answer": "5", "seconds": 9}'
    assert not process.equal("5", trick, 20.0)[0]
    assert process.equal("x+1", "1+x", 20.0) == (True, "")
    assert json.loads(json.dumps({"a": "\ud800"}))  # lone surrogates travel
    assert not process.equal("5", "\ud800", 20.0)[0]


def test_repeated_comparison_is_cached(warm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = grade(r"\boxed{q+1}", "1+q")
    monkeypatch.setattr(sympy_process, "shared", None)
    assert grade(r"again \boxed{q+1}", "1+q") == verdict
    assert verdict.correct


# --- real data and tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gsm8k", "aime24", "amc23"])
def test_every_reference_is_right_against_itself_and_wrong_against_another(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set RLVR_LAB_DATA")
    monkeypatch.setattr(sympy_process, "shared", None)  # numbers never need sympy
    for problem in load_jsonl(path):
        for form in (
            f"Thus \\boxed{{{problem.answer}}}.",
            f"so\n#### {problem.answer}",
            f"The answer is {problem.answer}.",
        ):
            verdict = grade(form, problem.answer)
            assert verdict == Verdict(True, str(int(problem.answer)), "correct")
        other = int(problem.answer) + 1
        assert grade(f"\\boxed{{{other}}}", problem.answer) == Verdict(False, str(other), f"not {int(problem.answer)}")


PROBLEM = MathProblem("What is {1} + 1?", "2", 1, "p:1")


class PlainTokenizer:
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


class ChatTokenizer(PlainTokenizer):
    chat_template = "x"

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: object) -> list[int]:
        assert settings == {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        return list(f"<{messages[0]['role']}>{messages[0]['content']}<assistant>".encode())


def test_math_prompt_with_and_without_chat_template() -> None:
    math = MathTask(template="Q: {question} Use \\boxed{}.")
    assert bytes(math.prompt_ids(PROBLEM, PlainTokenizer())) == b"Q: What is {1} + 1? Use \\boxed{}."
    assert bytes(math.prompt_ids(PROBLEM, ChatTokenizer())) == b"<user>Q: What is {1} + 1? Use \\boxed{}.<assistant>"
    assert "\\boxed{}" in MathTask().prompt(PROBLEM)


@pytest.mark.parametrize("template", ["no place", "{question} {question}"])
def test_template_needs_the_question_once(template: str) -> None:
    with pytest.raises(UserError, match=r"task\.template"):
        MathTask(template=template)


def test_math_task_grades_and_refuses_cut_off_responses() -> None:
    assert MathTask().grade(PROBLEM, r"\boxed{2}", finished=True).correct
    assert not MathTask().grade(PROBLEM, r"\boxed{3}", finished=True).correct
    assert MathTask().grade(PROBLEM, r"\boxed{2}", finished=False) == Verdict(
        False, None, "no end of text within the length limit"
    )


def test_countdown_task() -> None:
    problem = countdown.Problem((10, 1, 4), 44)
    assert CountdownTask().prompt_ids(problem) == list(problem.prompt_ids)
    assert CountdownTask().grade(problem, "</think> ( 10 + 1 ) * 4 <eos>", True).correct
    assert not CountdownTask().grade(problem, "</think> ( 10 + 1 ) * 4", False).correct


def test_tasks_by_name() -> None:
    assert (task("math").name, task("countdown").name) == ("math", "countdown")
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        task("cuntdown")


def test_module_imports_no_heavy_library() -> None:
    heavy = {"torch", "sympy", "math_verify", "transformers"}
    code = f"import sys, rlvr_lab.tasks.math_answer; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
