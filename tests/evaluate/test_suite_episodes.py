"""Evaluations that are written down play environments too: the file holds what the verdicts of the episodes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlvr_lab.evaluate.suite import Job, Settings, run_job
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.engine import TransformersEngine
from rlvr_lab.tasks.registry import task


@pytest.mark.parametrize("name", ["triples", "feedback"])
def test_an_environment_is_played_and_a_killed_evaluation_goes_on(name: str, tmp_path: Path) -> None:
    policy, made = load_policy("tiny/A", device="cpu"), task(name)
    problems = made.problems(6, 0, evaluation=True)  # type: ignore[attr-defined]
    prompts = [made.prompt_ids(problem, policy.tokenizer) for problem in problems]
    job = Job(name, made, problems, prompts, "held-out", {})
    settings = Settings("tiny/A", "", "transformers", "cpu", "float32", 4, 1.0, 64, 8, 0, True)
    engine = TransformersEngine(policy)
    results = run_job(job, policy, engine, settings, tmp_path / "whole.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [result.correct for result in results] == [row["correct"] for row in rows]
    assert 0 < sum(result.correct for result in results) < 24
    for problem, row in zip(problems, rows, strict=True):
        for response in row["responses"]:
            assert response["finished"]
            assert "<result>" in response["text"] or response["text"].count("</answer>") == 1
            assert made.grade(problem, response["text"], True).correct is response["correct"]
    head = b"".join((tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)[:3])
    (tmp_path / "cut.jsonl").write_bytes(head)
    run_job(job, policy, engine, settings, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
