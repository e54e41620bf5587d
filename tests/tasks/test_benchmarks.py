"""The table of benchmarks, and loading: through `datasets` from a local repository, from files, and what goes wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.benchmarks import (
    BENCHMARKS,
    FOLDER,
    Benchmark,
    BenchmarkProblem,
    benchmark,
    load_benchmark,
    make_task,
    problem_of,
)
from rlvr_lab.tasks.jsonl import BadRow
from rlvr_lab.tasks.registry import MATH_TEMPLATE

OLYMPIAD = {
    "id": 1606, "question": "Find all roots.", "final_answer": ["$1,2$"], "is_multiple_answer": True, "unit": None,
    "answer_type": "Numerical", "error": None, "image_1": None, "solution": ["..."],
}  # fmt: skip
ROWS: Mapping[str, list[dict[str, object]]] = {
    "math500": [
        {"problem": "1+1?", "solution": "s", "answer": "2", "subject": "Algebra", "unique_id": "test/a/1.json"}
    ],
    "aime24": [{"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}],
    "aime25": [{"problem": "p", "answer": "70", "id": "0"}],
    "amc23": [{"id": 0, "question": "q", "answer": 27.0, "url": "u"}],
    "minerva": [{"question": "q", "answer": "4.5e33"}],
    "olympiadbench": [OLYMPIAD],
    "gsm8k": [{"question": "q", "answer": "2*9=<<2*9=18>>18\n#### 1,018"}],
}
EXPECTED = {
    "math500": ("2", "test/a/1.json"), "aime24": ("204", "60"), "aime25": ("70", "0"), "amc23": ("27", "0"),
    "minerva": ("4.5e33", "minerva:1"), "olympiadbench": ("$1,2$", "1606"), "gsm8k": ("1018", "gsm8k:1"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config

    monkeypatch.delenv(FOLDER, raising=False)
    # the cache knows a local repository by its folder's name, so tests must not share it
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def repository(folder: Path, which: Benchmark, rows: list[dict[str, object]], form: str = "parquet") -> Benchmark:
    """A local folder laid out as a repository of the Hub: a card that maps config and split to a data file."""
    import datasets

    folder.mkdir(parents=True)
    name = f"rows.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(folder / name))
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = which.config or "default"
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {which.split}\n    path: {name}\n---\n"
    )
    return replace(which, hub=str(folder), revision=None)


def load(which: Benchmark, **settings: object) -> tuple[list[BenchmarkProblem], list[str]]:
    said: list[str] = []
    loaded = load_benchmark(which, report=said.append, **settings)  # type: ignore[arg-type]
    assert loaded.skipped == sum("problems, where" not in line for line in said)
    return loaded.problems, said


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_by_datasets_in_its_published_layout(name: str, tmp_path: Path) -> None:
    which = benchmark(name)
    problems, said = load(repository(tmp_path / "repo", which, list(ROWS[name])))
    assert [(p.answer, p.id) for p in problems] == [EXPECTED[name]]
    assert len(said) == 1
    assert f"1 problems, where {which.title} has {which.size}" in said[0]
    assert load(repository(tmp_path / "other", which, list(ROWS[name]), "jsonl"), limit=1) == (problems, [])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_may_have_the_hubs_columns_or_question_and_answer(name: str, tmp_path: Path) -> None:
    hub, plain = tmp_path / "hub.jsonl", tmp_path / "plain.jsonl"
    hub.write_text(json.dumps(ROWS[name][0]) + "\n")
    plain.write_text('\n{"question": "q", "answer": "7"}\n')
    assert load(benchmark(name), file=hub, limit=1)[0][0].answer == EXPECTED[name][0]
    (problem,), _ = load(benchmark(name), file=plain, limit=1)
    assert (problem.question, problem.answer, problem.source_line, problem.id) == ("q", "7", 2, f"{name}:2")


def test_the_folder_of_the_environment_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aime25.jsonl").write_text('{"problem": "from the folder", "answer": "1"}\n')
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert load(benchmark("aime25"), limit=1)[0][0].question == "from the folder"
    other = tmp_path / "own.jsonl"
    other.write_text('{"problem": "from the file", "answer": "1"}\n')
    assert load(benchmark("aime25"), file=other, limit=1)[0][0].question == "from the file"


@pytest.mark.slow
def test_the_published_files(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "aime24.jsonl").exists():
        pytest.skip(f"{folder} has no aime24.jsonl")
    monkeypatch.setenv(FOLDER, str(folder))
    for name in ("aime24", "amc23", "gsm8k"):
        problems, said = load(benchmark(name))
        assert said == []  # the benchmark's own number of problems, none broken
        task = make_task(benchmark(name))
        assert all(task.grade(p, f"\\boxed{{{p.answer}}}", True).correct for p in problems[:40])


def test_broken_rows_are_named_counted_and_skipped_up_to_a_limit(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"problem": f"p{i}", "answer": str(i), "id": str(i)} for i in range(4)]
    rows[1]["answer"] = None
    rows[2]["problem"] = "  "
    which = repository(tmp_path / "repo", benchmark("aime25"), rows)
    problems, said = load(which)
    assert [p.answer for p in problems] == ["0", "3"]
    assert said[0] == f"{which.hub}:test:2: answer is null, not text"
    assert said[1] == f"{which.hub}:test:3: problem is empty"
    with pytest.raises(UserError, match=r"broken row number 2: mend the data or raise --max-bad-rows .now 1."):
        load(which, max_bad_rows=1)
    with pytest.raises(UserError, match="no usable row"):
        load(repository(tmp_path / "bad", benchmark("aime25"), rows[1:2]))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        load(benchmark("aime25"), file=empty)


def test_rows_of_one_id_stay_apart(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"problem": "p", "answer": "1", "id": "7"}] * 2
    assert [p.id for p in load(repository(tmp_path / "repo", benchmark("aime25"), rows))[0]] == ["7", "aime25:2"]


def test_without_network_one_line_names_the_file_that_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(benchmark("math500"))
    assert "\n" not in str(error.value)
    assert "benchmark 'math500' cannot be loaded from the Hub" in str(error.value)
    assert "--data math500=FILE, or math500.jsonl in the folder RLVR_LAB_DATA" in str(error.value)


def test_without_the_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the library `datasets`.*--data gsm8k=FILE"):
        load(benchmark("gsm8k"))


def test_a_repository_without_the_split_or_the_columns_is_told(tmp_path: Path) -> None:
    which = repository(tmp_path / "repo", benchmark("aime25"), [{"text": "p", "label": "1"}])
    with pytest.raises(UserError, match=r"cannot be loaded from the Hub: .*--data aime25=FILE"):
        load(replace(which, split="validation"))
    said: list[str] = []
    with pytest.raises(UserError, match="no usable row"):
        load_benchmark(which, report=said.append)
    assert "no question key; accepted: problem, question, prompt; found: 'text', 'label'" in said[0]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert benchmark("MATH-500") is BENCHMARKS["math500"]
    assert benchmark("aime_24").name == "aime24"
    with pytest.raises(UserError, match="unknown benchmark 'math50': did you mean 'math500'"):
        benchmark("math50")


def test_pinned_revisions_are_whole_hashes() -> None:
    pinned = [b.revision for b in BENCHMARKS.values() if b.revision is not None]
    assert pinned
    assert all(len(r) == 40 and set(r) <= set("0123456789abcdef") for r in pinned)


# -- prompts and grading ----------------------------------------------------------------------------------------------


def olympiad(**changes: object) -> BenchmarkProblem:
    return problem_of(benchmark("olympiadbench"), OLYMPIAD | changes, 1, set())


def test_olympiadbench_asks_with_its_own_prompt() -> None:
    task = make_task(benchmark("olympiadbench"))
    several = task.prompt(olympiad())
    assert several.endswith("\nFind all roots.")
    assert "multiple answers, each of them should be a numerical value. Please calculate" in several
    assert '\\boxed{multiple answers connected with commas}."' in several
    one = task.prompt(olympiad(is_multiple_answer=False, answer_type="Expression", unit="$\\mathrm{cm}$"))
    assert "The answer of The problem should be an expression. " in one
    assert '"So the final answer is \\boxed{answer}(unit)."' in one
    assert "the unit of the answer should not be included in \\boxed{}" in one
    mixed = task.prompt(olympiad(answer_type="Numerical,Interval"))
    assert "with the answers in order being a numerical value, an interval. " in mixed
    assert "should be" not in task.prompt(olympiad(answer_type="Tuple", is_multiple_answer=False))


def test_a_template_replaces_every_prompt_and_is_checked() -> None:
    assert make_task(benchmark("olympiadbench"), "Q: {question}").prompt(olympiad()) == "Q: Find all roots."
    plain = problem_of(benchmark("aime24"), {"problem": "p", "answer": "1"}, 1, set())
    assert make_task(benchmark("aime24")).prompt(plain) == MATH_TEMPLATE.replace("{question}", "p")
    with pytest.raises(UserError, match="exactly once"):
        make_task(benchmark("aime24"), "no question")


def test_each_benchmark_is_graded_by_its_grader() -> None:
    several = make_task(benchmark("olympiadbench"))
    assert several.grade(olympiad(), "So the final answer is \\boxed{2}, \\boxed{1}.", True).correct
    assert several.grade(olympiad(error="0.1,0.01", final_answer=["1,2"]), "\\boxed{2.009, 1.1}", True).correct
    assert not several.grade(olympiad(error="0.1,0.01", final_answer=["1,2"]), "\\boxed{2.1, 1}", True).correct
    minerva = problem_of(benchmark("minerva"), {"question": "q", "answer": "4.5e33"}, 1, set())
    exact = problem_of(benchmark("aime24"), {"problem": "q", "answer": "4.5e33"}, 1, set())
    text = "\\boxed{4.50001 \\times 10^{33}}"
    assert make_task(benchmark("minerva")).grade(minerva, text, True).correct
    assert not make_task(benchmark("aime24")).grade(exact, text, True).correct
    assert make_task(benchmark("minerva")).grade(minerva, text, False).answer is None  # cut off


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"error": "about 1"}, "error is no number"),
        ({"error": "-1"}, "error is no tolerance"),
        ({"error": "nan"}, "error is no tolerance"),
        ({"unit": 3}, "unit is not text"),
        ({"final_answer": []}, "final_answer is array, not text"),
        ({"final_answer": None}, "final_answer is null"),
    ],
)
def test_broken_rows_of_olympiadbench(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        olympiad(**changes)


def test_olympiadbench_tolerances() -> None:
    assert olympiad(error="").tolerances == ()
    assert olympiad(error="1e-1").tolerances == (0.1,)
    assert olympiad(error="0.1,,1").tolerances == (0.1, 0.0, 1.0)
