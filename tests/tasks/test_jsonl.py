import json
import os
import tracemalloc
from pathlib import Path

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.jsonl import MAX_LINE_BYTES, MathProblem, load_jsonl

DATA = Path(os.environ.get("RLVR_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(folder: Path, *rows: object) -> Path:
    """Rows that are text or bytes are written as they stand, others as JSON."""
    path = folder / "problems.jsonl"
    encoded = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def load(path: Path, **settings: object) -> tuple[list[MathProblem], list[str]]:
    reports: list[str] = []
    return load_jsonl(path, report=reports.append, **settings), reports  # type: ignore[arg-type]


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize("key", ["question", "problem", "prompt"])
def test_accepts_each_question_key(tmp_path: Path, key: str) -> None:
    found, reports = load(write(tmp_path, {key: " 1 + 1? ", "answer": "2"}))
    assert [(p.question, p.answer, p.source_line) for p in found] == [("1 + 1?", "2", 1)]
    assert reports == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has <<2*9=18>>18 eggs.\n#### 18", "18"),
        ("#### 1,450,000", "1450000"),
        ("#### -1,450.50", "-1450.50"),
        ("#### (1,234)", "(1,234)"),  # no number: the comma may separate
        ("1,234", "1,234"),  # only worked answers are reduced
        (27.0, "27"),
        (-1.0, "-1"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (7, "7"),
        (" \\frac{1}{2} ", "\\frac{1}{2}"),
    ],
)
def test_answer_is_reduced(tmp_path: Path, answer: object, expected: str) -> None:
    assert load(write(tmp_path, {"question": "q", "answer": answer}))[0][0].answer == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not JSON: Expecting property name"),
        ("[1, 2]", "a JSON array, not an object"),
        ("3", "a JSON number, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "q", "answer": ' + "1" * 5000 + "}", "too many digits"),
        ({"question": "q"}, "no answer key; accepted: answer; found: 'question'"),
        ({"answer": "2"}, "no question key; accepted: question, problem, prompt; found: 'answer'"),
        ({"qestion": "q", "answer": "2"}, "did you mean 'question'?"),
        ({"question": "q", "anwser": "2"}, "did you mean 'answer'?"),
        ({}, "found: none"),
        ({"question": "  ", "answer": "2"}, "question is empty"),
        ({"question": "q", "answer": ""}, "answer is empty"),
        ({"question": "q", "answer": "so ####  "}, "answer is empty after '####'"),
        ({"question": ["q"], "answer": "2"}, "question is array, not text"),
        ({"question": "q", "answer": True}, "answer is boolean, not text"),
        ({"question": "q", "answer": None}, "answer is null, not text"),
        ('{"question": "q", "answer": NaN}', "not a finite number"),
        ('{"question": "q", "answer": 1e999}', "not a finite number"),
        ({"question": "q", "answer": "9" * 501}, "answer longer than 500 characters"),
        ('{"question": "\\ud800", "answer": "2"}', "half of a surrogate pair"),
        ({"question": "q" * (MAX_LINE_BYTES + 1), "answer": "2"}, f"longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_broken_line_is_reported_with_its_place_and_skipped(tmp_path: Path, row: object, reason: str) -> None:
    path = write(tmp_path, GOOD, row, {"question": "last", "answer": "3"})
    found, reports = load(path)
    assert [(p.question, p.source_line) for p in found] == [("1 + 1?", 1), ("last", 3)]
    assert len(reports) == 1
    assert reports[0].startswith(f"{path}:2: ")
    assert reason in reports[0]
    assert len(reports[0]) < 400


def test_too_many_broken_lines_name_file_line_and_setting(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "x", "y", "z", GOOD)
    assert len(load(path, max_bad_lines=3)[1]) == 3
    with pytest.raises(UserError, match=r"problems\.jsonl:4: not JSON.*data\.max_bad_lines") as raised:
        load(path, max_bad_lines=2)
    assert "\n" not in str(raised.value)


def test_blank_lines_bom_and_crlf_are_harmless(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    found, reports = load(write(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"", b"   ", line))
    assert [p.source_line for p in found] == [1, 4]
    assert reports == []


def test_limit_stops_before_later_lines(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, GOOD, "broken")
    found, reports = load(path, limit=2, max_bad_lines=0)
    assert len(found) == 2
    assert reports == []
    with pytest.raises(UserError, match=r"data\.limit"):
        load(path, limit=0)


def test_ids_are_unique_and_kept_where_possible(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": 7}, {**GOOD, "id": 7}, GOOD, {**GOOD, "idx": "a"}]
    assert [p.id for p in load(write(tmp_path, *rows))[0]] == ["7", "problems:2", "problems:3", "a"]


def test_str_shows_question_and_answer() -> None:
    assert str(MathProblem("1 + 1?", "2", 4, "p:4")) == "p:4: 1 + 1? -> 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"{}\n", "no usable line"),
        (json.dumps(GOOD).encode() + b"\n" + '{"question": "é"}'.encode("latin-1"), ":2: not UTF-8 at byte 15"),
        (json.dumps(GOOD).encode("utf-16"), ":1: not UTF-8 at byte 1"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read: no such file"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="cannot be read: is a directory"):
        load(tmp_path)


def test_endless_line_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        file.truncate(200_000_000)  # sparse: one line of zero bytes
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    found, reports = load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.source_line for p in found] == [2]
    assert "longer than" in reports[0]
    assert peak < 10_000_000


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("aime24", 30), ("amc23", 40)])
def test_real_files_load_whole_with_integer_answers(name: str, count: int) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set RLVR_LAB_DATA")
    found, reports = load(path)
    assert reports == []
    assert len(found) == len({p.id for p in found}) == count
    assert all(p.answer.lstrip("-").isdecimal() for p in found)
