import json
from pathlib import Path

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.base import Outcome
from rlvr_lab.tasks.multiple_choice import MOST_CHARACTERS, Choice, MultipleChoiceTask, grade

PROBLEM = Choice("What is half of one?", ("2", "4", "red dog", "0.5"), 2, 1, "p:1")
TASK = MultipleChoiceTask()


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{C}", r"\boxed{(C)}", r"\boxed{\text{C}}", r"\boxed{C: red dog}", r"\boxed{red dog}", "C", "(C)", "c",
        "so\nC.", "The answer is C.", "The answer is (C) red dog", "answer: Red  Dog.", "**Answer:** **C**",
        "I think it is (C).", "Ｃ", "Option C", "the correct option is [C]", "Answer is C because A is too small",
        "The answer is A. No, the answer is C.",
    ],
)  # fmt: skip
def test_letter_and_text_name_the_right_option(response: str) -> None:
    verdict = TASK.grade(PROBLEM, response, True)
    assert (verdict.outcome, verdict.answer) == (Outcome.CORRECT, "C"), verdict.reason


@pytest.mark.parametrize(
    ("response", "outcome", "answer"),
    [
        (r"\boxed{B}", Outcome.WRONG, "B"),
        (r"\boxed{\frac{1}{2}}", Outcome.WRONG, "D"),  # the text of D, as a number
        ("answer is E", Outcome.WRONG, "E"),
        ("С", Outcome.WRONG, "с"),  # a Cyrillic letter is none of ours
        ("the answer is a dog", Outcome.WRONG, "a dog"),
        ("A, C", Outcome.UNPARSABLE, None),
        ("The answer is A or C", Outcome.UNPARSABLE, None),
        (r"\boxed{A, C}", Outcome.UNPARSABLE, None),
        ("Final answer: C) 4", Outcome.UNPARSABLE, None),  # the letter of one option, the text of another
        ("", Outcome.UNPARSABLE, None),
        (r"\boxed{}", Outcome.UNPARSABLE, None),
        (r"\boxed{C", Outcome.UNPARSABLE, None),
        ("x" * (MOST_CHARACTERS + 1), Outcome.REFUSED, None),
        ("\\boxed{" + "x" * (MOST_CHARACTERS + 1) + "}", Outcome.REFUSED, None),
    ],
)
def test_what_is_not_right(response: str, outcome: Outcome, answer: str | None) -> None:
    verdict = grade(PROBLEM, response)
    assert (verdict.outcome, verdict.answer) == (outcome, answer), verdict.reason
    assert verdict.reason


def test_a_cut_response_has_no_answer() -> None:
    assert TASK.grade(PROBLEM, "C", False).outcome is Outcome.UNPARSABLE
    assert TASK.read("C", False) is None


def test_an_option_that_is_a_letter_gives_way_to_the_letter() -> None:
    swapped = Choice("q", ("B", "A"), 0, 1, "p")
    assert grade(swapped, r"\boxed{A}").correct
    assert grade(swapped, r"\boxed{B}").answer == "B"


def test_equal_texts_name_no_option() -> None:
    assert not grade(Choice("q", ("same", "same"), 0, 1, "p"), r"\boxed{same}").correct


def test_reading_needs_no_problem() -> None:
    assert TASK.read(r"\boxed{(c)}", True) == "C"
    assert TASK.read(r"\boxed{Red  dog}", True) == "red dog"
    assert TASK.read("", True) is None


def test_prompt_lists_the_options_once() -> None:
    problem = Choice("Is {choices} a name?", ("{question}", "no"), 0, 1, "p")
    assert MultipleChoiceTask("Q: {question} {choices}").prompt(problem) == (
        "Q: Is {choices} a name? (A) {question}\n(B) no"
    )
    with pytest.raises(UserError, match=r"data\.template must hold"):
        MultipleChoiceTask("{question} alone")


def loaded(tmp_path: Path, *rows: object) -> tuple[list[Choice], list[str]]:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    reports: list[str] = []
    return TASK.load(path, report=reports.append), reports


LIST = {"question": "q", "choices": ["x", "y", "z"]}


@pytest.mark.parametrize(
    "row",
    [
        LIST | {"answer": 1}, LIST | {"answer": "B"}, LIST | {"answer": "(B)"}, LIST | {"answer": "y"},
        {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "B"},
        {"question": "q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"},
    ],
)  # fmt: skip
def test_forms_of_a_row(tmp_path: Path, row: object) -> None:
    found, reports = loaded(tmp_path, row)
    assert (found[0].answer, found[0].options[1]) == ("B", "y")
    assert reports == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": "A"}, "no choices key"),
        (LIST, "no answer key"),
        (LIST | {"answer": None}, "answer is null"),
        (LIST | {"answer": 3}, "answer is 3, but there are 3 options"),
        (LIST | {"answer": "w"}, "'w' is no option"),
        (LIST | {"answer": True}, "answer is boolean"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "holds 1 options"),
        ({"question": "q", "choices": ["x", None], "answer": 0}, "choices[1] is null"),
        ({"question": "q", "choices": "x", "answer": 0}, "neither a list nor an object"),
        ({"question": "q", "choices": {"label": ["1"], "text": ["x", "y"]}, "answer": 0}, "1 labels for 2 texts"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(tmp_path: Path, row: object, reason: str) -> None:
    found, reports = loaded(tmp_path, LIST | {"answer": 0}, row)
    assert len(found) == 1
    assert reports[0].startswith(f"{tmp_path}/c.jsonl:2: ")
    assert reason in reports[0]
