"""`rlvr-lab export --engine trl`: the launcher trains in TRL. tests/integrations has the rest, which needs no TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlvr_lab.integrations.trl_export import export
from rlvr_lab.policy.load import resolve
from rlvr_lab.train.config import load_config

TINY = [
    "steps=2", "data.pool=40", "rollout.prompts=4", "rollout.group_size=4", "rollout.max_tokens=24",
    "update.minibatches=2", "update.micro_batch_rows=3", "checkpoint.every=1", "logging.tensorboard=false",
]  # fmt: skip


def test_launcher_trains_two_rollouts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = export(load_config("grpo/tiny", TINY), out)[2]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", str(launcher)], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = sorted(out.glob("checkpoints/*/trainer_state.json"))
    history = json.loads(states[-1].read_text())["log_history"]
    assert [row["step"] for row in history if "token_entropy" in row] == [2, 4]
    assert [row["learning_rate"] for row in history if "loss" in row] == pytest.approx([6.1e-4 / 8 * k for k in (1, 2)])
    before, after = (load_file(Path(d) / "model.safetensors") for d in (resolve("tiny/S"), out / "model"))
    assert any(not before[name].equal(after[name]) for name in before)
