"""The planner against recorded and fresh measurements of real training steps (benchmarks/plan_memory.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlvr_lab.plan.devices import GIB
from rlvr_lab.plan.gate import processor
from rlvr_lab.plan.job import job_of
from rlvr_lab.plan.memory import memory
from rlvr_lab.plan.shapes import shape_from, shape_of
from rlvr_lab.train.config import parse_config

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "plan_memory.json").read_text())
AIM = 0.15


@pytest.mark.parametrize("row", RESULT["rows"], ids=lambda row: row["case"])
def test_a_recorded_peak_is_still_planned_within_the_aim(row: dict[str, Any]) -> None:
    shape = shape_from(row["model"], row["case"], "the benchmark") if row["model"] else shape_of("tiny/S")
    job = job_of(parse_config(row["config"]), processor(32 * GIB), row["ranks"],
                 prompt_tokens=row["prompt_tokens"], shape=shape)  # fmt: skip
    found = memory(job)
    assert found.peak == pytest.approx(row["measured_bytes"], rel=AIM)
    # the phase that the planner names as the greediest is the one that was
    assert found.peak_phase == max(row["measured_phases"], key=row["measured_phases"].get)


def test_the_record_covers_sizes_and_settings() -> None:
    sizes = [row["parameters"] for row in RESULT["rows"]]
    assert min(sizes) < 1e6
    assert max(sizes) > 9e7
    configs = [row["config"] for row in RESULT["rows"]]
    assert any(c["update"]["packing"] for c in configs)
    assert any(c["parallel"]["shard"] == "fsdp2" for c in configs)
    assert any(c["parallel"]["activation_checkpointing"] for c in configs)
    assert any(c["model"]["lora"]["rank"] for c in configs)
    assert {c["model"]["precision"] for c in configs} == {"same", "bfloat16"}
    assert RESULT["within_aim"] == RESULT["cases"] == len(sizes)
    assert RESULT["machine"]["torch"]


@pytest.mark.slow
def test_a_fresh_run_agrees_with_its_plan(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_memory.py"), "--case", "1M, vocabulary 1000",
               "--out", str(out)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=900)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"] == pytest.approx(1, abs=AIM)
    for phase in ("rollout", "update", "optimizer"):
        assert row["planned_phases"][phase] == pytest.approx(row["measured_phases"][phase], rel=0.25)
