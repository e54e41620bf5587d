"""The shipped base A: what it can do in each environment, and that a short run learns there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import load_policy
from rlvr_lab.policy.pretrain import SHIPPED
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.episodes import EpisodeEngine, actions_of
from rlvr_lab.rollout.grading import grade
from rlvr_lab.tasks.agents.base import replay
from rlvr_lab.tasks.registry import task
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

WANTED = {"triples": (0.15, 0.4), "maze": (0.01, 0.2), "feedback": (0.12, 0.4)}
GROUP = 8


@pytest.fixture(scope="module", params=list(WANTED))
def played(request: pytest.FixtureRequest) -> tuple[Any, list[Any], Any, Any]:
    """An environment, 40 held-out problems, the policy, and graded episodes."""
    policy, made = load_policy("tiny/A", device="cpu"), task(request.param)
    problems = made.problems(40, 0, evaluation=True)  # type: ignore[attr-defined]
    engine = EpisodeEngine(TransformersEngine(policy), made, problems)  # type: ignore[arg-type]
    prompts = [made.prompt_ids(problem, policy.tokenizer) for problem in problems]
    rollout = engine.sample(prompts, GROUP, Sampling(max_tokens=200, rows=320), torch.Generator().manual_seed(0))
    return made, problems, policy, grade(rollout, made, problems, policy)


def test_it_succeeds_sometimes_and_groups_have_both_outcomes(played: tuple[Any, list[Any], Any, Any]) -> None:
    made, _, _, rollout = played
    rates = rollout.correct.float().view(-1, GROUP).mean(1)
    low, high = WANTED[made.name]
    assert low < float(rates.mean()) < high
    assert float(((rates > 0) & (rates < 1)).float().mean()) > 0.2
    assert bool(rollout.finished.all())  # no episode needs more tokens than it has


def test_its_actions_can_nearly_always_be_read(played: tuple[Any, list[Any], Any, Any]) -> None:
    made, problems, policy, rollout = played
    episodes = [
        replay(made, problems[i], actions_of(rollout, row, policy)) for row, i in enumerate(rollout.prompt_id.tolist())
    ]
    share = sum(e.invalid for e in episodes) / sum(len(e.turns) for e in episodes)
    assert 0 < share < 0.1  # entropy can flow into actions that cannot be read, and seldom does


def test_what_the_environment_says_is_no_action(played: tuple[Any, list[Any], Any, Any]) -> None:
    _, _, policy, rollout = played
    told = rollout.response_mask & ~rollout.action_mask
    for row in range(0, len(rollout), 7):
        text = policy.decode(rollout.response_ids[row][told[row]].tolist())
        assert text.count("<result>") == text.count("</result>") == len(text.split("<result>")) - 1
        assert set(text.split()).isdisjoint({"<act>", "</act>", "<answer>", "<search>", "<unk>"})


def test_it_was_made_by_the_shipped_settings() -> None:
    recorded = json.loads((Path(tiny.shipped("A")) / "pretrain.json").read_text())["config"]
    assert {name: getattr(SHIPPED["A"], name) for name in recorded} == recorded


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "end"), [("triples", 12, 0.5), ("maze", 40, 0.3), ("feedback", 30, 0.3)])
def test_its_recipe_learns(name: str, steps: int, end: float, tmp_path: Path) -> None:
    settings = [f"steps={steps}", "evaluation.problems=0", "ledger.rows=0", "logging.samples=0",
                "logging.tensorboard=false", "logging.view=quiet"]  # fmt: skip
    trainer = Trainer(load_config(f"grpo/{name}_tiny", settings), tmp_path / "run")
    success = [trainer.step(step)["accuracy"] for step in range(steps)]
    trainer.log.close()
    assert sum(success[-4:]) / 4 > max(end, success[0] + 0.1), success
