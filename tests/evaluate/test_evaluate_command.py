"""`rlvr-lab evaluate` with benchmarks: a byte-level Qwen2 of random weights on the published files, and `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import byte_level_qwen2
from typer.testing import CliRunner, Result

from rlvr_lab.cli import app
from rlvr_lab.tasks.benchmarks import FOLDER, benchmark, load_benchmark

DATA = Path(os.environ.get(FOLDER, Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("aime24.jsonl", "amc23.jsonl"):
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not here; set {FOLDER} to a folder that holds it")
    monkeypatch.setenv(FOLDER, str(DATA))
    return DATA


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of six problems, so that no test here depends on files outside the repository."""
    monkeypatch.delenv(FOLDER, raising=False)
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(6)))
    return path


def lab(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", *map(str, arguments)])


def test_several_benchmarks_in_one_go(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    done = lab(
        model, "--benchmarks", "aime24,AMC-23", "--problems", 3, "--samples", 4, "--k", "1,4", "--max-tokens", 8,
        "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert list(report["benchmarks"]) == ["aime24", "amc23"]
    for name, summary in report["benchmarks"].items():
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        problems = load_benchmark(benchmark(name), limit=3, report=print).problems
        assert [row["problem"] for row in rows] == [str(p) for p in problems]
        assert (summary["problems"], summary["samples"], summary["source"]) == (3, 4, str(folder / f"{name}.jsonl"))
        assert {"pass@1", "pass@4", "maj@1", "maj@4", "avg@4"} <= set(summary)
        assert "pass@2" not in summary
        assert summary["avg@4"] == summary["pass@1"] == sum(row["correct"] for row in rows) / 12
        # random weights hardly ever draw the end token: nearly everything is cut, and has no answer
        assert summary["truncated"] == 1 - summary["finished"] > 0.5
        assert name in done.output
    page = (out / "report.html").read_text()
    assert "aime24: pass@1 is" in page
    assert "Plotly" in page
    assert not any(f'src="{scheme}' in page for scheme in ("http:", "https:", "//"))


def test_a_file_for_a_benchmark_chooses_it(model: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "minerva.jsonl"
    done = lab("-m", model, "--data", f"minerva={own}", "--samples", 2, "--max-tokens", 4, "--device", "cpu", "-o", out)
    assert done.exit_code == 0, done.output
    assert "6 problems, where Minerva (OCWCourses) has 272" in done.output.replace("\n", "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["problem"] for row in rows] == [f"minerva:{i + 1}: {i}+1? -> {i + 1}" for i in range(6)]
    assert [len(row["responses"]) for row in rows] == [2] * 6


def test_other_prompts_give_other_responses(model: Path, own: Path, tmp_path: Path) -> None:
    texts = []
    for i, extra in enumerate(([], ["--template", "Q: {question} A:"])):
        out = tmp_path / f"{i}"
        done = lab(
            model, "--data", f"aime25={own}", "--samples", 2, "--max-tokens", 4, "--device", "cpu", "--texts", *extra,
            "--out", out,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        texts.append(
            [
                r["text"]
                for line in (out / "aime25.jsonl").read_text().splitlines()
                for r in json.loads(line)["responses"]
            ]
        )
    assert texts[0] != texts[1]
    assert json.loads((tmp_path / "1" / "report.json").read_text())["settings"]["template"] == "Q: {question} A:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", "aime24,math50"], "unknown benchmark 'math50': did you mean 'math500'"),
        (["--benchmarks", ","], "--benchmarks names none; there are math500, aime24"),
        (["--data", "aime42=OWN"], "unknown benchmark 'aime42': did you mean 'aime2"),
        (["--data", "aime24="], "names no file; write NAME=FILE"),
        (
            ["--benchmarks", "aime25", "--data", "aime24=OWN"],
            "aime24=... stands for a benchmark that --benchmarks does not",
        ),
        (["--benchmarks", "aime25", "--data", "OWN"], "with --benchmarks, --data is NAME=FILE: aime25="),
        (["--data", "OWN", "--data", "OWN"], "--data takes one file of problems"),
        (["--data", "OWN", "--samples", "8", "--k", "1,16"], "pass@16 needs --samples 16 or more; --samples is 8"),
        (["--data", "OWN", "--k", "0,1"], "--k '0,1' is no list of whole numbers from 1 on"),
        (["--data", "OWN", "--engine", "vlm"], "--engine 'vlm' is unknown: did you mean 'vllm'"),
        (["--data", "OWN", "--resume"], "--resume needs --out"),
        (["--data", "OWN", "--resume", "--out", "x.jsonl"], "a single file cannot be resumed; name a folder"),
        (["--benchmarks", "aime24,aime25", "--out", "x.jsonl"], "a single file holds one set of problems"),
        (["--benchmarks", "aime25"], "benchmark 'aime25' cannot be loaded from the Hub"),
        (["--data", "aime25=EMPTY"], "EMPTY: the data set is empty"),
        (["--data", "aime25=/no/such.jsonl"], "/no/such.jsonl: cannot be read: no such file"),
        (["--data", "OWN", "--template", "no question"], "must hold {question} exactly once"),
        (["--data", "OWN", "--max-tokens", "2000"], "and --max-tokens is 2000: no problem fits. Lower --max-tokens"),
    ],
)
def test_a_mistake_is_one_line(model: Path, own: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    names = {"OWN": str(own), "EMPTY": str(empty)}
    for name, path in names.items():
        arguments, message = [a.replace(name, path) for a in arguments], message.replace(name, path)
    result = lab(model, *arguments, "--device", "cpu")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert message in line


def test_resuming_with_other_settings_names_the_setting(model: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    arguments = [model, "--data", f"aime25={own}", "--max-tokens", 4, "--device", "cpu", "--out", out]
    assert lab(*arguments, "--samples", 2).exit_code == 0
    again = lab(*arguments, "--samples", 2)
    assert "already exists; choose another --out or add --resume" in again.stderr
    other = lab(*arguments, "--samples", 3, "--resume")
    assert "was made with --samples 2, not 3: resume with --samples 2" in other.stderr
    report = (out / "report.json").read_bytes()
    (out / "report.json").unlink()
    assert lab(*arguments, "--samples", 2, "--resume").exit_code == 0  # nothing is left to sample: it only reports
    assert (out / "report.json").read_bytes() == report


@pytest.mark.slow
def test_kill_9_in_the_middle_and_resume(model: Path, folder: Path, tmp_path: Path) -> None:
    """The real thing: a process is killed while it samples. What it leaves is completed to the same bytes."""

    def arguments(out: Path) -> list[str]:
        options = "--benchmarks aime24,amc23 --problems 8 --samples 4 --rows 8 --max-tokens 64 --device cpu"
        return [str(model), *options.split(), "--out", str(out)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert lab(*arguments(whole)).exit_code == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "rlvr_lab.cli", "evaluate", *arguments(cut)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first = cut / "aime24.jsonl"
    deadline = time.monotonic() + 300
    while not (first.exists() and first.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    left = first.read_bytes()
    assert not (cut / "report.json").exists()
    assert (whole / "aime24.jsonl").read_bytes().startswith(left[: left.rindex(b"\n") + 1])

    assert lab(*arguments(cut), "--resume").exit_code == 0
    for name in ("aime24.jsonl", "amc23.jsonl", "report.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert (cut / "aime24.jsonl").read_bytes().startswith(left[: left.rindex(b"\n") + 1])
