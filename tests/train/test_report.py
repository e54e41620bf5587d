"""`rlvr-lab report`: from run folders to a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import run_folder
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.train.report import flat, view, write_report


def test_a_folder_becomes_plain_data(tmp_path: Path) -> None:
    made = view(run_folder(tmp_path / "run", steps=10, planned=12), "run")
    assert list(made.steps) == list(range(10))
    assert made.columns["reward"][3] == pytest.approx(0.23)
    assert made.settings["optimizer.lr"] == "0.0001"
    assert made.settings["methods.grpo.preset"] == "tiny"
    assert made.facts["steps"] == "steps 0 to 9 of 12 planned"
    assert [row["step"] for row in made.samples] == [0, 4, 8]
    assert any("not finished" in remark for remark in made.remarks)
    assert made.verdict


def test_flat_settings() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}


def test_a_damaged_folder_still_gives_a_page(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "config.yaml").write_text("[")
    (run / "summary.json").write_text('{"machine": 3}')
    (run / "samples.jsonl").write_text('{"step": 0, "resp')
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('broken\n{"step": 8, "rew')
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "2 unreadable lines left out" in text
    assert "No transcript" in text


def test_the_command(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run", seed=1)

    def call(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        return result.exit_code, result.output

    assert call(first) == (0, f"page: {first / 'report.html'}\n")
    code, out = call(first, second)
    assert code == 2
    assert "--out is missing" in out
    code, out = call(first, second, "--out", tmp_path / "both.html", "--steps", "2,4")
    assert code == 0
    text = (tmp_path / "both.html").read_text()
    assert str(second) in text, "folders of one name are told apart by their paths"
    assert text.count('data-step="2"') == 2
    assert 'data-step="0"' not in text
    assert "--steps must be numbers" in call(first, "--steps", "a")[1]
    assert "recorded: 0, 2, 4, 6" in call(first, "--steps", "3")[1]
    assert "is no run to examine" in call(tmp_path / "nowhere")[1]
    assert "4 runs apart, not 5" in call(*[first] * 5, "--out", tmp_path / "x.html")[1]


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*; choose another --out"):
        write_report([run_folder(tmp_path / "run")], tmp_path / "no" / "page.html")
