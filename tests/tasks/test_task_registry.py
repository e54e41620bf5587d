"""Every task by name: settings, problems, and one interface."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.registry import TASKS, CountdownTask, entry, task
from rlvr_lab.train.config import load_config


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_its_name_and_the_whole_interface(name: str) -> None:
    made = task(name)
    assert made.name == name
    for method in ("prompt_ids", "grade", "read"):
        assert callable(getattr(made, method))
    assert hasattr(made, "load") is (entry(name).file is not None)
    assert made.read("", True) is None
    assert made.read("x", False) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chek": "exact"}, "unknown setting data.settings.chek of task 'countdown': did you mean 'check'"),
        ({"check": "never"}, r"data.settings.check: .*'exact' or 'at_least' \(got 'never'\)"),
        ({"name": "x"}, "unknown setting data.settings.name"),
    ],
)
def test_a_wrong_setting_of_a_task_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task("countdown", settings)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].file is None and name != "reasoning_gym"])
def test_problems_repeat_with_the_seed_and_evaluation_ones_are_others(name: str) -> None:
    made = task(name)
    train = entry(name).problems(made, 50, 3)
    assert train == entry(name).problems(made, 50, 3)
    assert train != entry(name).problems(made, 50, 4)
    evaluation = entry(name).problems(made, 50, 3, evaluation=True)
    assert not {str(p) for p in train} & {str(p) for p in evaluation}
    assert len({str(p) for p in train}) == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.task=cuontdown"], "setting 'data.task': unknown task 'cuontdown': did you mean 'countdown'"),
        (["data.task=multiple_choice"], "task 'multiple_choice' needs data.file, a JSONL file with question, choices"),
        (["data.settings.chek=exact"], "unknown setting data.settings.chek"),
        (["data.template=x"], "unknown setting data.settings.template of task 'countdown'"),
        (["data.task=math", "data.file=x.jsonl", "data.template=x"], "must hold {question} exactly once"),
        (["data.task=reasoning_gym", "data.file=x.jsonl"], "makes its own problems"),
        (["data.task=reasoning_gym", "data.settings.config.seed=1"], "cannot set seed and size"),
    ],
)
def test_a_run_with_a_wrong_task_is_refused_before_it_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("grpo/tiny", overrides)
    assert message in str(caught.value)


def test_settings_reach_the_task() -> None:
    assert load_config("grpo/tiny", ["data.settings.check=at_least"]).data.make_task() == CountdownTask("at_least")
    math = load_config("grpo/math", ["data.file=x.jsonl", "data.template='Q: {question}'"]).data.make_task()
    assert getattr(math, "template", None) == "Q: {question}"


def test_a_duplicate_id_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"question": "q", "answer": "1", "id": i}) for i in (7, 8, 7)))
    reports: list[str] = []
    found = task("math").load(path, report=reports.append)  # type: ignore[attr-defined]
    assert [problem.id for problem in found] == ["7", "8", "p:3"]
    assert reports == [f"{path}:3: id '7' is that of an earlier row; this one is called 'p:3'"]


def test_a_missing_answer_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"question": "q", "answer": "1"}, {"question": "q"}, {"question": "q", "answer": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    reports: list[str] = []
    assert len(task("math").load(path, report=reports.append)) == 1  # type: ignore[attr-defined]
    assert [line.split(": ")[0] for line in reports] == [f"{path}:2", f"{path}:3"]
