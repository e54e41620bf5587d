"""Record whole runs of the tiny lab, transcripts included, for the chapter that teaches how to read one.

    python benchmarks/full_runs.py --work DIR [--only NAME] [--pack-only]

One healthy run and four whose fault is planted as in `benchmarks/doctor.py`. Run folders are kept in the work folder
and are not repeated. Written: `book/data/reading_a_run.json` with every logged column of every step, all evaluations,
some transcripts, what the doctor says at the end, and the first step after which it says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from doctor import LengthReward, MajorityReward, NucleusSampler, StaleSampler

from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import Method
from rlvr_lab.train.config import load_config
from rlvr_lab.train.console import Lines
from rlvr_lab.train.doctor import examine, read_history
from rlvr_lab.train.doctor_record import History
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "reading_a_run.json"
COMMON = (
    "update.recompute_old_logprob=true", "evaluation.every=20", "evaluation.problems=64", "evaluation.samples=32",
    "checkpoint.every=1000", "logging.tensorboard=false", "logging.samples=12", "logging.samples_every=10",
)  # fmt: skip
TRANSCRIPTS = 6  # kept of each logged step


@dataclass(frozen=True)
class Run:
    """One recorded run: what is done to the recipe."""

    recipe: str
    planted: str
    settings: tuple[str, ...]
    methods: tuple[Callable[[], Method], ...] = ()


RUNS = {
    "healthy": Run("arena/tiny", "nothing", ("steps=80",)),
    "majority": Run(
        "arena/tiny", "the reward pays for agreeing with the group's most frequent answer", ("steps=60",),
        (MajorityReward,),
    ),
    "truncated": Run(
        "arena/tiny", "the sampler draws with top-p 0.8 and reports renormalised log-probs", ("steps=60",),
        (NucleusSampler,),
    ),
    "length": Run(
        "grpo/tiny_retries", "0.05 of extra reward for every token",
        ("steps=24", "rollout.prompts=8", "rollout.group_size=8", "evaluation.problems=32", "evaluation.samples=8",
         "evaluation.every=12"),
        (LengthReward,),
    ),
    "stale": Run(
        "arena/tiny", "responses are eight steps old, as behind a slow queue",
        ("steps=32", "rollout.prompts=8", "rollout.group_size=8", "evaluation.samples=16", "evaluation.every=16"),
        (StaleSampler,),
    ),
}  # fmt: skip


def make(name: str, work: Path, seed: int) -> None:
    """Train one run unless its folder is finished."""
    run, out = RUNS[name], work / name
    if (out / "summary.json").exists():
        return
    config = load_config(run.recipe, [*COMMON, *run.settings, f"seed={seed}"])
    trainer = Trainer(config, out, console=Lines())
    if run.methods:
        own = [build(slug, settings) for slug, settings in config.methods.items()]
        trainer.use(compose([*own, *(make() for make in run.methods)]))
    trainer.run()


def first_told(history: History) -> int | None:
    """Steps logged when the doctor's first finding above a note is for the first time the one it is at the end."""

    def first(n: int) -> str | None:
        part = {name: values[:n] for name, values in history.columns.items()}
        until = [e for e in history.evaluations if e["step"] <= n]
        report = examine(replace(history, steps=history.steps[:n], columns=part, evaluations=until))
        return next((f.fault for f in report.findings if f.severity != "note"), None)

    last = first(len(history))
    return None if last is None else next(n for n in range(1, len(history) + 1) if first(n) == last)


def pack(name: str, work: Path) -> dict[str, Any]:
    """What is kept of a run folder."""
    out = work / name
    history, _ = read_history(out)
    report = examine(history, name)
    summary = json.loads((out / "summary.json").read_text())
    samples: dict[int, list[Any]] = {}
    for row in read_jsonl(out / "samples.jsonl"):
        samples.setdefault(row["step"], []).append(row)
    return {
        "recipe": RUNS[name].recipe,
        "planted": RUNS[name].planted,
        "settings": dict(history.settings),
        "steps": history.steps.tolist(),
        "columns": {k: [_rounded(x) for x in v] for k, v in history.columns.items() if not np.isnan(v).all()},
        "evaluations": [{k: _rounded(v) for k, v in row.items()} for row in history.evaluations],
        "samples": [_sample(row) for rows in samples.values() for row in rows[:TRANSCRIPTS]],
        "doctor": [f.fault for f in report.findings if f.severity != "note"],
        "doctor_after": first_told(history),
        "machine": summary["machine"],
        "date": summary["date"],
    }


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "problem", "correct", "answer", "reward", "tokens")
    return {k: row[k] for k in kept} | {k: [_rounded(x) for x in row[k]] for k in ("token_logprob", "token_entropy")}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if np.isfinite(value) else None


def main(
    work: Annotated[Path, typer.Option(help="Where run folders are kept; a second call goes on there.")],
    only: Annotated[list[str] | None, typer.Option(help="Runs to make, by name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every run.")] = 0,
    pack_only: Annotated[bool, typer.Option("--pack-only", help="Train nothing.")] = False,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
) -> None:
    """Record the runs; see the head of this file."""
    torch.set_num_threads(1)
    for name in () if pack_only else (only or RUNS):
        started = time.process_time()
        make(name, work, seed)
        print(f"{name}: {time.process_time() - started:.0f} CPU s", flush=True)
    done = {name: pack(name, work) for name in RUNS if (work / name / "summary.json").exists()}
    command = "python benchmarks/full_runs.py --work DIR"
    provenance = {"command": command, "seed": seed, "machine": machine(), "load_note": load_note}
    DATA.write_text(json.dumps({"provenance": provenance, "runs": done}, separators=(",", ":")) + "\n")
    print(f"written {DATA.relative_to(ROOT)}: {DATA.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
