"""One run of a contest, in a process of its own: train, evaluate, keep the rows."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from ..train import checkpoint, logs
from ..train.config import TrainConfig
from ..train.console import Lines
from ..train.loop import Trainer, machine
from ..train.update import TrainingStopped
from .arms import Arm
from .contest import Contest, Job
from .digests import method_digests
from .results import Row

LEFT_OUT = (
    "interval",
    "avg@",
    "maj@",
    "ledger_",
    "seconds_",
    "memory",
    "mismatch",
    "importance_weight",
    "_min",
    "_max",
)
"""Parts of names that a contest does not keep: a results file holds what curves and tables show."""
NOT_KEPT = {"step", "tokens", "problems", "samples", "temperature", "held_out", "staleness", "vocabulary",
            "generated_tokens", "generation_batches", "sequence_mean_token_entropy", "behaviour_logprob", "accuracy",
            "skipped_updates", "rows_skipped", "tokens_per_second", "no_answer", "ratio_mean", "lr"}  # fmt: skip
CHECKPOINT_S = 60.0
"""Seconds between checkpoints."""


def open_job(out: Path, arm: str, seed: int) -> tuple[Contest, Job]:
    """A job of a contest that `prepare` has written."""
    found = json.loads((out / "contest.json").read_text())
    settings = found["contest"]
    contest = Contest(**settings | {"settings": tuple(settings["settings"])})
    return contest, Job(Arm.from_dict(found["arms"][arm]), seed, out)


def run_job(contest: Contest, job: Job) -> None:
    """Train from the start or the last checkpoint to the budget's end, and write the job's record.

    A run that cannot go on (a loss that is not finite, filters that leave nothing) is a result: its record says why.
    """
    config = contest.config(job.arm, job.seed)
    trainer = _open(config, job.folder)
    stopped = ""
    try:
        _train(trainer, contest.budget_tokens)
    except (TrainingStopped, FloatingPointError) as error:
        stopped = str(error)
    trainer.log.close()
    record = {
        "arm": job.arm.name,
        "seed": job.seed,
        "steps": _steps(job),
        "evaluations": _evaluations(job),
        "stopped": stopped,
        "digests": method_digests(config.methods),
        "machine": machine() | {"date": time.strftime("%Y-%m-%d")},
    }
    partial = job.record.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(job.record)
    shutil.rmtree(job.folder)


def _open(config: TrainConfig, folder: Path) -> Trainer:
    resumable = folder.exists() and checkpoint.newest(folder / "checkpoints")[0] is not None
    if folder.exists() and not resumable:
        shutil.rmtree(folder)
    return Trainer(config, folder, resume=resumable, console=Lines())


def _train(trainer: Trainer, budget: int | None) -> None:
    """Steps, evaluations on the way and at the end, checkpoints by the clock."""
    config, done = trainer.config, trainer.first_step
    tokens = sum(row["generated_tokens"] for row in logs.read_jsonl(trainer.out / "metrics.jsonl"))
    kept = time.monotonic()
    trainer.evaluate_once(done)
    while done < config.steps and (budget is None or tokens < budget):
        tokens += trainer.step(done)["generated_tokens"]
        done += 1
        if config.evaluation.every and done % config.evaluation.every == 0:
            trainer.evaluate_once(done)
        if time.monotonic() - kept > CHECKPOINT_S:
            trainer.checkpoint(done)
            kept = time.monotonic()
    trainer.evaluate_once(done)


def _steps(job: Job) -> list[Row]:
    """Training metrics with the tokens generated so far."""
    rows, tokens = [], 0.0
    for found in logs.read_jsonl(job.folder / "metrics.jsonl"):
        tokens += found["generated_tokens"]
        rows.append(_named(job, found["step"], tokens) | {k: v for k, v in found.items() if _kept(k)})
    return rows


def _evaluations(job: Job) -> list[Row]:
    """Held-out figures with the tokens generated before them."""
    tokens = [0.0, *(row["tokens"] for row in _steps(job))]
    rows = []
    for found in logs.read_jsonl(job.folder / "evaluations.jsonl"):
        figures = {k: v for k, v in found.items() if isinstance(v, int | float) and _kept(k)}
        rows.append(_named(job, found["step"], tokens[found["step"]]) | figures)
    return rows


def _kept(name: str) -> bool:
    return name not in NOT_KEPT and not any(part in name for part in LEFT_OUT)


def _named(job: Job, step: int, tokens: float) -> dict[str, Any]:
    return {"arm": job.arm.name, "seed": job.seed, "step": step, "tokens": int(tokens)}
