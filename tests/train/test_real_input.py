"""A reader's own model and own files: a byte-level Qwen2 of random weights, GSM8K and AIME as they are published."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from builders import byte_level_qwen2
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from rlvr_lab.cli import app
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.logs import read_jsonl

DATA = Path(os.environ.get("RLVR_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL = [
    "steps=2", "rollout.prompts=2", "rollout.group_size=2", "rollout.max_tokens=6", "update.minibatches=2",
    "evaluation.problems=2", "evaluation.samples=2", "data.pool=12", "logging.tensorboard=false", "model.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gsm8k() -> Path:
    return existing("gsm8k.jsonl")


def existing(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set RLVR_LAB_DATA to a folder that holds {name}")
    return path


def lab(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def assert_one_line(result: Result, *parts: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_the_models_tokenizer_goes_round(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Natalia sold 48/2 = 24 clips in May.\n\\boxed{72} é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert load_policy(str(model), device="cpu").eos_ids == (258,)


def test_train_on_gsm8k_then_evaluate_on_aime(model: Path, gsm8k: Path, tmp_path: Path) -> None:
    aime = existing("aime24.jsonl")
    out, results = tmp_path / "run", tmp_path / "results.jsonl"
    done = lab("train", "grpo/math", *SMALL, "--model", model, "--data", gsm8k, "--out", out)
    assert done.exit_code == 0, done.output
    assert "training problems" in done.output  # no held-out file was named, and the report says so
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["mean_tokens"] <= 6 and row["token_entropy"] > 1 for row in rows)
    assert [row["step"] for row in read_jsonl(out / "evaluations.jsonl")] == [0, 2]
    assert load_policy(str(out / "model"), device="cpu").eos_ids == (258,)

    done = lab(
        "evaluate", "--model", out / "model", "--data", aime, "--problems", 3, "--samples", 2, "--max-tokens", 6,
        "--device", "cpu", "--out", results,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "pass@2" in done.output
    problems = read_jsonl(results)
    assert len(problems) == 3
    assert all(p["samples"] == 2 and 0 <= p["correct"] <= 2 for p in problems)


def test_a_held_out_file_is_evaluated_and_called_so(model: Path, gsm8k: Path, tmp_path: Path) -> None:
    other = existing("amc23.jsonl")
    done = lab(
        "train", "grpo/math", *SMALL, "steps=1", f"evaluation.file={other}", "--model", model, "--data", gsm8k,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "held-out problems" in done.output
    evaluated = read_jsonl(tmp_path / "run" / "evaluations" / "step_000000.jsonl")
    assert len(evaluated) == 2
    questions = other.read_text()
    assert all(json.dumps(p["problem"].split(": ", 1)[1][:20])[1:-1] in questions for p in evaluated)


def test_broken_lines_are_reported_with_their_place_and_skipped(model: Path, gsm8k: Path, tmp_path: Path) -> None:
    good = gsm8k.read_text().splitlines()[:6]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join([good[0], "{not json", good[1], '{"question": "only"}', "", *good[2:]]) + "\n")
    done = lab("train", "grpo/math", *SMALL, "steps=1", "--model", model, "--data", data, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    said = done.output.replace("\n", "")
    assert f"{data}:2: not JSON" in said
    assert f"{data}:4: no answer key" in said


def test_files_that_cannot_be_used_are_one_line(model: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "data.jsonl"

    def train() -> Result:
        return lab("train", "grpo/math", *SMALL, "--model", model, "--data", data, "--out", out)

    assert_one_line(train(), f"{data}: cannot be read: no such file")
    data.write_text("")
    assert_one_line(train(), f"{data}: the file is empty")
    data.write_text("{}\n")
    result = train()
    assert result.exit_code == 2
    assert "no usable line" in result.stderr
    data.write_bytes(b'{"question": "\xff", "answer": "1"}\n')
    assert_one_line(train(), "data.jsonl:1: not UTF-8")
    data.write_text(json.dumps({"question": "long " * 400, "answer": "1"}) + "\n")
    assert_one_line(train(), "no problem fits", "rollout.max_tokens")
    assert not out.exists()


def test_too_many_broken_lines_stop_the_run(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{\n" * 5 + '{"question": "1+1?", "answer": "2"}\n')
    done = lab(
        "train", "grpo/math", *SMALL, "data.max_bad_lines=3", "--model", model, "--data", data,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert_one_line(done, "data.jsonl:4", "broken line number 4", "data.max_bad_lines (now 3)")
