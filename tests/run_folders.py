"""Run folders written by hand, for whatever reads them: quick, and with contents that no training run would give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028 'q'"


def metrics_row(step: int, **values: Any) -> dict[str, Any]:
    """A step with the columns that views and pages draw."""
    return {
        "step": step,
        "reward": 0.2 + 0.01 * step,
        "accuracy": 0.2 + 0.01 * step,
        "token_entropy": 0.2 - 0.002 * step,
        "dead_groups": 0.25,
        "clip_low": 0.001,
        "clip_high": 0.002 * (step % 2),
        "kl_old_new": 0.002,
        "mean_tokens": 25.0,
        "ledger_forecast": None if step == 0 else -0.003,
        "ledger_measured": -0.004,
        "seconds_rollout": 1.0,
        "seconds_loss": 0.75,
        "seconds_optimizer": 0.25,
        "seconds": 2.0,
        "tokens_per_second": 1234.0,
        "memory_process_gib": 0.5,
    } | values


def sample_row(step: int, **values: Any) -> dict[str, Any]:
    """A transcript of three tokens: certain, undecided, and a line break."""
    return {
        "step": step,
        "problem": "2, 3 -> 5",
        "response": "2 +\n",
        "correct": step % 2 == 0,
        "answer": "(2+3)",
        "reward": 1.0,
        "finished": True,
        "tokens": ["2", " +", "\n"],
        "token_ids": [7, 8, 9],
        "token_logprob": [0.0, math.log(0.25), -0.5],
        "token_entropy": [0.0, 1.5, 0.25],
    } | values


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_folder(out: Path, steps: int = 8, planned: int = 8, **settings: Any) -> Path:
    """An unfinished run of so many steps."""
    out.mkdir(parents=True)
    tree = {"seed": 0, "steps": planned, "methods": {"grpo": {"preset": "tiny"}}, "optimizer": {"lr": 1e-4}} | settings
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    write_lines(out / "metrics.jsonl", [metrics_row(step) for step in range(steps)])
    write_lines(out / "samples.jsonl", [sample_row(step) for step in range(0, steps, 2)])
    evaluation = {"held_out": True, "token_entropy": 0.2, "distinct_correct": 1.5, "mean_tokens": 25.0}
    passes = {"pass@1": 0.2, "pass@1_interval": [0.1, 0.3], "pass@4": 0.5, "pass@4_interval": [0.4, 0.6]}
    write_lines(out / "evaluations.jsonl", [{"step": step} | evaluation | passes for step in (0, steps)])
    return out
