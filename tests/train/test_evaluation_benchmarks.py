"""`evaluation.benchmarks`: measured before and after training, beside the evaluation problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import byte_level_qwen2

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.benchmarks import FOLDER
from rlvr_lab.train.config import TrainConfig, load_config
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import Trainer

SMALL = (
    "steps=1", "rollout.prompts=2", "rollout.group_size=2", "rollout.max_tokens=4", "update.minibatches=2",
    "evaluation.problems=2", "evaluation.samples=2", "data.pool=4", "logging.tensorboard=false", "model.device=cpu",
)  # fmt: skip


def config(tmp_path: Path, *settings: str) -> TrainConfig:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(4)))
    return load_config("grpo/math", [*SMALL, f"data.file={path}", *settings])


def test_benchmarks_are_measured_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "amc23.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 3)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    model = byte_level_qwen2(tmp_path / "model")
    benchmarks = f"evaluation.benchmarks=[amc23, minerva={tmp_path / 'own.jsonl'}]"
    Trainer(config(tmp_path, f"model.path={model}", benchmarks), tmp_path / "run").run()
    rows = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["problems"], row["amc23/problems"], row["minerva/problems"]) == (2, 3, 4)
        assert 0 <= row["amc23/pass@1"] <= row["amc23/pass@2"] <= 1
    lines = read_jsonl(tmp_path / "run" / "evaluations" / "step_000001_minerva.jsonl")
    assert [line["problem"] for line in lines] == [f"minerva:{i + 1}: {i}+1? -> {i + 1}" for i in range(4)]


def test_mistakes_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.benchmarks.*unknown benchmark 'aime2': did you mean 'aime2"):
        config(tmp_path, "evaluation.benchmarks=[aime2]")
    with pytest.raises(UserError, match=r"evaluation.benchmarks needs data.task: math, not countdown"):
        Trainer(load_config("grpo/tiny", ["evaluation.benchmarks=[aime24]"]), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
