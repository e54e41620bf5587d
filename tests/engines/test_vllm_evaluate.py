"""`evaluate` on vLLM itself: draws per problem, a continued run, figures without token entropies.

Run by `nox -s vllm`; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("RLVR_LAB_ENGINE") == "vllm":
    importlib.import_module("vllm")
else:
    pytest.importorskip("vllm")

from rlvr_lab.evaluate.evaluation import summarise
from rlvr_lab.evaluate.suite import Job, Settings, run_job
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_settings import VllmSection
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask

SETTINGS = Settings(
    "tiny/S", "digest", "vllm", "cpu", "float32", samples=4, temperature=1.0, max_tokens=32, rows=8, seed=0, texts=True
)
POLICY = load_policy("tiny/S", device="cpu")


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    it = VllmEngine(POLICY, VllmSection(eager=True))
    yield it
    it.close()


def make_job() -> Job:
    found = list(countdown.problems(5, 0, evaluation=True))
    return Job("countdown", CountdownTask(), found, [list(p.prompt_ids) for p in found], "Countdown", {})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_continued_evaluation_equals_a_whole_one(engine: VllmEngine, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    results = run_job(make_job(), POLICY, engine, SETTINGS, whole)
    cut.write_bytes(whole.read_bytes()[:-10])  # the last problem is a batch of its own
    run_job(make_job(), POLICY, engine, SETTINGS, cut)
    assert cut.read_bytes() == whole.read_bytes()
    for problem, row in zip(make_job().problems, rows(whole), strict=True):
        for r in row["responses"]:
            verdict = countdown.verify(problem, r["text"], r["finished"])
            assert (verdict.correct, verdict.answer) == (r["correct"], r["answer"])
    summary = summarise(results, 1.0)
    assert 0 < summary["mean_tokens"] <= 32
    assert summary["token_entropy"] is None  # vLLM gives none


def test_problems_draw_apart_and_by_seed(engine: VllmEngine, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.jsonl"
        run_job(make_job(), POLICY, engine, replace(SETTINGS, seed=seed), path)
        texts.append([[r["text"] for r in row["responses"]] for row in rows(path)])
    assert texts[0] != texts[1]
    assert all(len(set(group)) > 1 for group in texts[0])
