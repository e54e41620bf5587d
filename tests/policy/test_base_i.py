"""The shipped base I: what it can do, measured as its model card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import load_policy
from rlvr_lab.policy.pretrain import SHIPPED
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.grading import grade
from rlvr_lab.tasks import instructions


@pytest.fixture(scope="module")
def rates() -> dict[int, float]:
    """Strict success by number of rules, on 40 held-out problems of 12 samples."""
    policy, task, found = load_policy("tiny/I", device="cpu"), instructions.InstructionsTask(), {}
    for size in (2, 3, 4):
        problems = instructions.problems(40, 0, True, (size,))
        prompts = [task.prompt_ids(problem) for problem in problems]
        sampling = Sampling(max_tokens=24, rows=480)
        rollout = TransformersEngine(policy).sample(prompts, 12, sampling, torch.Generator().manual_seed(0))
        graded = grade(rollout, task, problems, policy)
        assert graded.correct is not None
        assert float(rollout.finished.float().mean()) > 0.95
        assert set(graded.reward_components) == {"correct", *task.point_names}
        found[size] = float(graded.correct.float().mean())
    return found


def test_it_succeeds_sometimes_and_hardly_ever_with_four_rules(rates: dict[int, float]) -> None:
    assert 0.1 < rates[2] < 0.35
    assert rates[2] > rates[3] > rates[4] > 0
    assert rates[4] < 0.06


def test_it_was_made_by_the_shipped_settings() -> None:
    recorded = json.loads((Path(tiny.shipped("I")) / "pretrain.json").read_text())["config"]
    shipped = SHIPPED["I"]
    assert {name: getattr(shipped, name) for name in recorded} == recorded
    assert tiny.BASES["I"].attention == shipped.attention
