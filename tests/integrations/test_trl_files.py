"""`rlvr-lab export --engine trl`: every recipe becomes a script that parses and has the recipe's settings."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.integrations.exchange import pipeline_of, unsupported
from rlvr_lab.integrations.trl_data import TaskReward, split_rows, training_data
from rlvr_lab.integrations.trl_export import export
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.grading import grade as rollout_graded
from rlvr_lab.tasks.registry import TASKS
from rlvr_lab.train.config import load_config, packaged_recipes

CARRIED, REFUSED = [], []
for _recipe in sorted(packaged_recipes()):
    _config = load_config(_recipe)
    if unsupported(pipeline_of(_config.methods)):
        REFUSED.append(_recipe)
    elif not hasattr(TASKS[_config.data.task].load_class(), "step") and _config.optimizer.name == "adamw":
        CARRIED.append(_recipe)


@pytest.mark.parametrize("recipe", CARRIED)
def test_every_recipe_that_trl_carries_becomes_a_script(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    script, settings, launcher = export(config, tmp_path / "out")
    tree = ast.parse(script.read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "GRPOConfig")
    given: dict[str, Any] = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant) and k.arg}
    assert given["learning_rate"] == config.optimizer.lr
    assert given["max_steps"] == config.steps * config.update.minibatches * config.update.epochs
    assert given["num_generations"] == config.rollout.group_size
    assert load_config(str(settings)).methods == config.methods
    subprocess.run(["sh", "-n", str(launcher)], check=True)


@pytest.mark.parametrize("recipe", REFUSED)
def test_the_others_are_refused_by_the_name_of_the_method(recipe: str, tmp_path: Path) -> None:
    slug = recipe.partition("/")[0]
    with pytest.raises(UserError, match=f"TRL cannot carry '{slug}'"):
        export(load_config(recipe), tmp_path / "out")
    assert slug in {"arbitrary_entropy", "empo", "hapo", "lp_reg", "one_shot", "siren", "tp_grpo", "ucas"} | {
        "agentic_aepo", "bupo", "cure", "ettrl", "kappatune", "spear",
    }  # fmt: skip


def test_an_optimizer_of_our_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.name classp is of our own loop, and TRL brings AdamW"):
        export(load_config("classp/tiny"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_environment_is_refused_by_its_name(tmp_path: Path) -> None:
    """The methods could be carried, the turns cannot."""
    for task in ("triples", "maze", "feedback"):
        config = load_config("grpo/tiny", [f"data.task={task}"])
        with pytest.raises(UserError, match=f"data.task '{task}' is an environment .* rlvr-lab train"):
            export(config, tmp_path / "out")
        with pytest.raises(UserError, match=f"data.task '{task}' is an environment"):
            training_data(config, load_policy("tiny/S", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_lora_and_shards_are_carried_over(tmp_path: Path) -> None:
    config = load_config("grpo/tiny", ["model.lora.rank=8", "model.lora.targets=[q_proj]", "parallel.shard=fsdp2"])
    script, _, launcher = export(config, tmp_path / "out")
    ast.parse(script.read_text())
    assert (
        "peft_config=LoraConfig(r=8, lora_alpha=32.0, target_modules=['q_proj'], lora_dropout=0.0)"
        in script.read_text()
    )
    assert "--use_fsdp --fsdp_version 2" in launcher.read_text()
    assert "peft" not in export(load_config("grpo/tiny"), tmp_path / "plain")[0].read_text()


def test_what_trl_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"update\.minibatches=5"):
        export(load_config("grpo/tiny", ["update.minibatches=5"]), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        export(load_config("grpo/tiny"), tmp_path / "b")
    with pytest.raises(UserError, match="3 processes"):
        split_rows(32, 8, 3)
    assert split_rows(30, 4, 2) == (3, 5)


def test_command_writes_and_names_the_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "grpo/tiny", "steps=3", "--engine", "trl", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(out / name) for name in ("train_trl.py", "recipe.yaml", "launch.sh")]
    assert "max_steps=18," in (out / "train_trl.py").read_text()
    wrong = CliRunner().invoke(app, ["export", "grpo/tiny", "--engine", "trll", "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "did you mean 'trl'?" in wrong.output


def test_reward_grades_by_token_ids() -> None:
    """A solved problem, the same without its end token, and nothing."""
    config = load_config("grpo/tiny", ["data.pool=5"])
    policy = load_policy("tiny/S", device="cpu")
    data, (reward,) = training_data(config, policy)
    assert isinstance(reward, TaskReward)
    assert data[0]["prompt"] == list(reward.problems[0].prompt_ids)
    solved = next(ids for ids in _candidates(policy, reward) if reward([ids], [0]) == [1.0])
    assert reward([solved, solved[:-1], [policy.eos_ids[0]]], [0, 0, 0]) == [1.0, 0.0, 0.0]
    assert reward.answers is not None
    assert reward.answers[0] is not None
    assert reward.answers[2] is None
    assert reward.__name__ == "correct"


def test_partial_credits_are_a_reward_of_their_own() -> None:
    config = load_config("light_if/tiny", ["data.pool=20"])
    policy = load_policy("tiny/I", device="cpu")
    data, (correct, points) = training_data(config, policy)
    rollout = TransformersEngine(policy).sample(
        data["prompt"][:8], 4, Sampling(max_tokens=32), torch.Generator().manual_seed(0)
    )
    ids = [row[:n] for row, n in zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)]
    numbers = rollout.prompt_id.tolist()
    with pytest.raises(ValueError, match="must stand after 'correct'"):
        points(ids)
    right, earned = correct(ids, numbers), points(ids)
    task, problems = config.data.make_task(), correct.problems
    graded = rollout_graded(rollout, task, problems, policy)
    both = [a + b for a, b in zip(right, earned, strict=True)]
    total = torch.stack(list(graded.reward_components.values())).sum(0)
    assert both == pytest.approx(total.tolist())
    assert any(0 < value < 1 for value in both)


def _candidates(policy: Any, reward: TaskReward) -> Any:
    """Responses of the shipped policy to the first problem, one sample after another."""
    generator = torch.Generator().manual_seed(0)
    engine = TransformersEngine(policy)
    for _ in range(20):
        rollout = engine.sample([list(reward.problems[0].prompt_ids)], 32, Sampling(1.0, 32), generator)
        for ids, length in zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True):
            yield ids[:length]
