"""Run many arms under equal conditions: same seeds, same budget of generated tokens, same evaluations.

    OUT/contest.json               conditions and arms
    OUT/runs/ARM/seed-N/           a run's folder as `rlvr-lab train` writes it, until it is done
    OUT/runs/ARM/seed-N.json       its rows, once it is
    OUT/runs/ARM/seed-N.log        what it said
    OUT/results.json               all finished runs (see `results`)

Every run is a process of its own, so that one which dies takes nothing with it. What is done is not done again, and a
run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..train.config import TrainConfig, load_config
from .arms import REFERENCE, Arm
from .results import MATCHED, Results, save_results

WITHOUT_EFFECT = ("evaluation.every=", "checkpoint.", "logging.")  # settings that change no figure
UNBOUNDED = 1_000_000  # steps of a contest that its budget ends


@dataclass(frozen=True)
class Contest:
    """Conditions that all arms share. `settings`: dotted overrides of the recipe.

    `budget_tokens`: a run ends with the first step after which it has generated so many; None leaves it to the
    recipe's steps. `reference_every`: GRPO is evaluated as often as this, because all are compared with its curve.
    """

    recipe: str = "arena/tiny"
    settings: tuple[str, ...] = ()
    budget_tokens: int | None = None
    reference_every: int = 5

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Settings of one run. Raises UserError that names a wrong one."""
        fixed = [f"seed={seed}", "logging.tensorboard=false", "logging.samples=0"]
        config = load_config(self.recipe, [*fixed, *self.settings, *arm.settings])
        if arm.name == REFERENCE and config.evaluation.every:
            every = min(self.reference_every, config.evaluation.every)
            config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": every})})
        if self.budget_tokens is not None:
            if config.optimizer.schedule != "constant":
                raise UserError(
                    "--budget-tokens ends a run by tokens, so that a schedule over steps has no end; set "
                    "optimizer.schedule=constant"
                )
            config = config.model_copy(update={"steps": UNBOUNDED})
        return config

    def conditions(self, arm: Arm) -> dict[str, Any]:
        """What results files record, and what must be equal for two runs to be compared."""
        config = self.config(arm, 0)
        evaluation = {"problems": config.evaluation.problems, "samples": config.evaluation.samples}
        return {
            "recipe": self.recipe,
            "settings": [text for text in self.settings if not text.startswith(WITHOUT_EFFECT)],
            "budget_tokens": self.budget_tokens,
            "steps": None if self.budget_tokens is not None else config.steps,
            "evaluation": evaluation | {"temperature": config.evaluation.temperature},
        }


@dataclass(frozen=True)
class Job:
    """One run of a contest."""

    arm: Arm
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return self.out / "runs" / _file_name(self.arm.name) / f"seed-{self.seed}"

    @property
    def record(self) -> Path:
        """Its rows, which are there once it is done."""
        return self.folder.with_suffix(".json")

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.folder.with_suffix(".log")

    @property
    def steps_done(self) -> int:
        """Steps that stand in the record of a run that is going on."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def _file_name(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in arm)


def prepare(contest: Contest, arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Job]:
    """Check every arm's settings, write or extend `contest.json`, and list what is to be run.

    Raises UserError for a wrong setting, or a folder that holds a contest under other conditions.
    """
    from ..methods import build, compose

    for arm in arms:
        methods = contest.config(arm, seeds[0]).methods
        compose([build(slug, settings) for slug, settings in methods.items()])
    path = out / "contest.json"
    new = {"contest": asdict(contest), "conditions": contest.conditions(arms[0]), "arms": {}}
    found = json.loads(path.read_text()) if path.exists() else new
    found["contest"] = new["contest"]  # how often to evaluate may change from one command to the next
    for key in MATCHED:
        if found["conditions"][key] != new["conditions"][key]:
            raise UserError(
                f"{out} holds a contest with {key} {found['conditions'][key]}, not {new['conditions'][key]}; "
                "choose another --out, or the same settings"
            )
    for arm in arms:
        before = found["arms"].get(arm.name)
        if before and before["settings"] != list(arm.settings):
            raise UserError(f"{out} holds an arm '{arm.name}' with other settings; choose another --out")
        found["arms"][arm.name] = arm.as_dict()
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    jobs = [Job(arm, seed, out) for seed in seeds for arm in arms]
    return [job for job in jobs if not job.record.exists()]


def run(
    jobs: Sequence[Job],
    parallel: int,
    *,
    threads: int = 1,
    report: Callable[[Sequence[Job], int, int], None] = lambda running, done, failed: None,
    every: float = 1.0,
) -> list[Job]:
    """Run jobs as processes of `threads` threads, `parallel` at a time; returns those that died.

    `report(running, done, failed)` is called every so many seconds. Processes are ended where this one is interrupted;
    their checkpoints stay.
    """
    waiting, died, done = list(jobs), list[Job](), 0
    running: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job] = _start(job, threads)
            time.sleep(every)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                done += 1
                if code:
                    died.append(job)
            report(list(running), done, len(died))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return died


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "20000"}
    command = [sys.executable, "-m", "rlvr_lab.arena", str(job.out), job.arm.name, str(job.seed)]
    with job.log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def collect(out: Path) -> Results:
    """All finished runs of a contest as one; also written to `results.json`.

    Raises UserError where a method's code changed between its runs.
    """
    found = json.loads((out / "contest.json").read_text())
    arms = {name: Arm.from_dict(arm) for name, arm in found["arms"].items()}
    records = [
        json.loads(path.read_text())
        for name in arms
        for path in sorted((out / "runs" / _file_name(name)).glob("seed-*.json"))
    ]
    done = {record["arm"] for record in records}
    contest = found["conditions"] | {"seeds": sorted({r["seed"] for r in records}), "digests": {}, "machines": {}}
    for record in records:
        for slug, digest in record["digests"].items():
            if contest["digests"].setdefault(slug, digest) != digest:
                raise UserError(
                    f"the code of '{slug}' changed between the runs in {out}; delete the older runs/*/seed-*.json of "
                    "the arms that use it and run the same command again"
                )
        contest["machines"][f"{record['arm']} seed {record['seed']}"] = record["machine"]
    results = Results(
        contest,
        {name: arm for name, arm in arms.items() if name in done},
        [row for record in records for row in record["steps"]],
        [row for record in records for row in record["evaluations"]],
        {f"{r['arm']} seed {r['seed']}": r["stopped"] for r in records if r["stopped"]},
    )
    save_results(out / "results.json", results)
    return results
