"""A contest's conditions, its folder and its runs: what differs is refused, and what was cut off goes on the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlvr_lab.arena import CATALOGUE, Results, load_results, resolve
from rlvr_lab.arena import worker as worker_module
from rlvr_lab.arena.contest import Contest, Job, collect, prepare, run
from rlvr_lab.arena.report import write_arena_report
from rlvr_lab.arena.worker import open_job, run_job
from rlvr_lab.errors import UserError
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.update import TrainingStopped

TINY = ("steps=4", "data.pool=12", "rollout.prompts=2", "rollout.group_size=4", "rollout.max_tokens=24",
        "update.minibatches=2", "update.micro_batch_rows=4", "evaluation.every=2", "evaluation.problems=3",
        "evaluation.samples=4", "optimizer.warmup=0")  # fmt: skip
CONTEST = Contest(settings=TINY, reference_every=1)


def test_conditions_are_shared_and_grpo_is_evaluated_more_often() -> None:
    reference, method = (CONTEST.config(CATALOGUE[name], 3) for name in ("grpo", "kl_cov"))
    assert (reference.seed, reference.evaluation.every) == (3, 1)
    assert (method.seed, method.evaluation.every) == (3, 2)
    assert "kl_cov" in method.methods
    assert reference.model_copy(update={"evaluation": None, "methods": None}) == method.model_copy(
        update={"evaluation": None, "methods": None}
    )


def test_a_budget_ends_runs_instead_of_steps() -> None:
    contest = replace(CONTEST, budget_tokens=5000)
    assert contest.conditions(CATALOGUE["grpo"])["steps"] is None
    assert contest.config(CATALOGUE["grpo"], 0).steps > 10_000
    with pytest.raises(UserError, match="schedule=constant"):
        replace(contest, settings=(*TINY, "optimizer.schedule=cosine")).config(CATALOGUE["grpo"], 0)


def test_what_is_done_is_not_done_again_and_arms_may_be_added(tmp_path: Path) -> None:
    jobs = prepare(CONTEST, resolve(["kl_cov"]), [0, 1], tmp_path)
    assert [(job.arm.name, job.seed) for job in jobs] == [("grpo", 0), ("kl_cov", 0), ("grpo", 1), ("kl_cov", 1)]
    jobs[0].record.parent.mkdir(parents=True)
    jobs[0].record.write_text("{}")
    again = prepare(CONTEST, resolve(["kl_cov:beta=3"]), [0], tmp_path)
    assert [job.arm.name for job in again] == ["kl_cov:beta=3"]
    assert set(json.loads((tmp_path / "contest.json").read_text())["arms"]) == {"grpo", "kl_cov", "kl_cov:beta=3"}
    contest, job = open_job(tmp_path, "kl_cov:beta=3", 0)
    assert contest == CONTEST
    assert job == Job(again[0].arm, 0, tmp_path)
    assert job.folder.parent.name == "kl_cov-beta-3"


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(CONTEST, settings=(*TINY, "optimizer.lr=1e-3")), "settings"),
        (replace(CONTEST, recipe="grpo/tiny"), "recipe"),
        (replace(CONTEST, budget_tokens=5000), "budget_tokens"),
    ],
)
def test_a_folder_keeps_its_conditions(tmp_path: Path, other: Contest, key: str) -> None:
    prepare(CONTEST, resolve([]), [0], tmp_path)
    before = (tmp_path / "contest.json").read_text()
    with pytest.raises(UserError, match=f"holds a contest with {key} "):
        prepare(other, resolve([]), [0], tmp_path)
    assert (tmp_path / "contest.json").read_text() == before


def test_how_often_to_evaluate_may_change_between_commands(tmp_path: Path) -> None:
    prepare(CONTEST, resolve([]), [0], tmp_path)
    finer = replace(CONTEST, settings=(*TINY, "evaluation.every=1"), reference_every=4)
    prepare(finer, resolve([]), [0], tmp_path)
    assert open_job(tmp_path, "grpo", 0)[0] == finer


def test_an_arm_keeps_its_settings(tmp_path: Path) -> None:
    prepare(CONTEST, resolve(["kl_cov"]), [0], tmp_path)
    other = replace(CATALOGUE["kl_cov"], settings=("methods.kl_cov={preset: paper}",))
    with pytest.raises(UserError, match="arm 'kl_cov' with other settings"):
        prepare(CONTEST, [CATALOGUE["grpo"], other], [0], tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("kl_cov:betta=3", "betta"), ("kl_cov:beta=much", r"methods\.kl_cov\.beta")]
)
def test_wrong_settings_are_refused_before_anything_runs(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(CONTEST, resolve([name]), [0], tmp_path)
    assert not (tmp_path / "contest.json").exists()


def record(job: Job, **values: Any) -> None:
    """Leave a finished run's record."""
    row = {"arm": job.arm.name, "seed": job.seed, "step": 0, "tokens": 0}
    made = {"steps": [row], "evaluations": [row | {"pass@1": 0.5}], "stopped": "", "digests": {}, "machine": {}}
    job.record.parent.mkdir(parents=True, exist_ok=True)
    job.record.write_text(json.dumps({"arm": job.arm.name, "seed": job.seed} | made | values))


def test_collecting_refuses_runs_of_changed_code(tmp_path: Path) -> None:
    first, second = prepare(CONTEST, resolve([]), [0, 1], tmp_path)
    record(first, digests={"grpo": "aa"}, stopped="not finite")
    record(second, digests={"grpo": "aa"})
    found = collect(tmp_path)
    assert found.contest["digests"] == {"grpo": "aa"}
    assert found.stopped == {"grpo seed 0": "not finite"}
    record(second, digests={"grpo": "bb"})
    with pytest.raises(UserError, match="code of 'grpo' changed"):
        collect(tmp_path)


def rows(results: Results, arm: str) -> list[list[dict[str, Any]]]:
    """Both tables of an arm without what a clock says."""
    return [
        [{k: v for k, v in row.items() if k != "seconds"} for row in results.rows(arm, 0, table)]
        for table in ("steps", "evaluations")
    ]


DIE = """
import os, sys
from pathlib import Path
import rlvr_lab.arena.worker as worker

worker.CHECKPOINT_S = 0.0
step = worker.Trainer.step
def dies(trainer, number):
    row = step(trainer, number)
    if number == 2:
        os._exit(9)  # as a killed process: the step is logged, its checkpoint is not written
    return row
worker.Trainer.step = dies
worker.run_job(*worker.open_job(Path(sys.argv[1]), "epo", 0))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        prepare(CONTEST, resolve(["epo"]), [0], out)  # epo carries a history of entropies from step to step
    run_job(*open_job(whole, "epo", 0))
    died = subprocess.run([sys.executable, "-c", DIE, str(cut)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    contest, job = open_job(cut, "epo", 0)
    assert died.returncode == 9
    assert job.steps_done == 3
    assert not job.record.exists()
    run_job(contest, job)
    assert rows(collect(cut), "epo") == rows(collect(whole), "epo")
    assert [row["step"] for row in collect(cut).rows("epo", 0)] == [0, 1, 2, 3]
    assert not job.folder.exists()


@pytest.mark.slow
def test_runs_end_die_or_stop_and_the_results_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = prepare(CONTEST, resolve(["clip_higher"]), [0], tmp_path)
    found = json.loads((tmp_path / "contest.json").read_text())
    found["arms"]["clip_higher"]["settings"] = ["methods.clip_higher={clip_high: broken}"]
    (tmp_path / "contest.json").write_text(json.dumps(found))
    seen: list[tuple[int, int]] = []
    assert run([bad, good], 2, every=0.2, report=lambda running, done, died: seen.append((done, died))) == [bad]
    assert seen[-1] == (2, 1)
    assert "clip_high" in bad.log.read_text()

    step = Trainer.step

    def stops(trainer: Trainer, number: int) -> Any:
        if number == 2:
            raise TrainingStopped("no group is left")
        return step(trainer, number)

    monkeypatch.setattr(worker_module.Trainer, "step", stops)
    (job,) = prepare(CONTEST, resolve(["kl_cov"]), [0], tmp_path)  # grpo is done
    run_job(CONTEST, job)
    results = collect(tmp_path)
    assert list(results.arms) == ["grpo", "kl_cov"]
    assert results.stopped == {"kl_cov seed 0": "no group is left"}
    assert [row["step"] for row in results.rows("kl_cov", 0, "evaluations")] == [0, 2]
    assert [row["step"] for row in results.rows("grpo", 0, "evaluations")] == [0, 1, 2, 3, 4]
    tokens = [[row["tokens"] for row in results.rows("grpo", 0, table)] for table in ("steps", "evaluations")]
    assert tokens[1] == [0, *tokens[0]]
    assert load_results(tmp_path / "results.json").rows("grpo", 0)[0]["reward"] is not None
    assert "kl_cov seed 0: no group is left" in write_arena_report(tmp_path).read_text()
