"""A GSM8K file and a local model directory, as `rlvr-lab train` takes them: loaded, rolled out, graded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from builders import byte_level_qwen2
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.tasks.jsonl import load_jsonl
from rlvr_lab.tasks.registry import MathTask
from rlvr_lab.train.logs import read_jsonl

DATA = Path(os.environ.get("RLVR_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL = (
    "steps=1", "rollout.prompts=2", "rollout.group_size=2", "rollout.max_tokens=8", "update.minibatches=2",
    "data.pool=20", "evaluation.problems=2", "evaluation.samples=2", "logging.tensorboard=false",
    "logging.samples_every=1", "model.device=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_a_gsm8k_file_is_loaded_rolled_out_and_graded(tmp_path: Path) -> None:
    source = DATA / "gsm8k.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not here; set RLVR_LAB_DATA")
    cut = tmp_path / "gsm8k_cut.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()[:20]
    cut.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, out = byte_level_qwen2(tmp_path / "model"), tmp_path / "run"
    arguments = ["train", "--model", str(model), "--data", str(cut), "--out", str(out), *SMALL]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    row = read_jsonl(out / "metrics.jsonl")[0]
    assert row["mean_tokens"] > 0
    assert 0 <= row["accuracy"] <= 1
    samples = read_jsonl(out / "samples.jsonl")
    references = {problem.question for problem in load_jsonl(cut)}
    assert len(references) == 20
    assert any(question in str(sample) for sample in samples for question in references)
    # what the run would have been paid for
    problem = load_jsonl(cut)[0]
    assert problem.answer == "18"
    assert MathTask().grade(problem, "16 - 3 - 4 = 9, 9 * 2 = 18.\n#### 18", True).correct
