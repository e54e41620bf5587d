"""Export to verl and to launch files, and the list of what verl can carry. No engine is needed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from rlvr_lab.cli.export import export as command
from rlvr_lab.core.reduce import REDUCTIONS
from rlvr_lab.errors import UserError
from rlvr_lab.integrations import launch_export, verl_export
from rlvr_lab.integrations.verl_reward import compute_score
from rlvr_lab.integrations.verl_support import MODES, obstacles, pipeline_of, require_tier, supported, unsupported
from rlvr_lab.methods import build, compose, trainable
from rlvr_lab.methods.base import Method
from rlvr_lab.train.config import TrainConfig, load_config, packaged_recipes

MATH = [name for name in packaged_recipes() if load_config(name).data.task == "math"]
REFUSED = [name for name in MATH if obstacles(pipeline_of(load_config(name).methods).methods, "b")]

OURS_ALONE = {"arbitrary_entropy", "copo", "empo", "hapo", "lp_reg", "one_shot", "siren", "tp_grpo", "ucas"} | {
    "agentic_aepo", "bupo", "cure", "ettrl", "kappatune", "spear",
}  # fmt: skip


def config(*overrides: str) -> TrainConfig:
    return load_config("grpo/math", overrides)


def exported(out: Path, *overrides: str) -> dict[str, Any]:
    verl_export.export(config(*overrides), out)
    return yaml.safe_load((out / "verl.yaml").read_text())


@pytest.mark.parametrize("recipe", REFUSED)
def test_a_recipe_that_verl_cannot_carry_is_refused_by_the_name_of_the_method(recipe: str, tmp_path: Path) -> None:
    slug = recipe.partition("/")[0]
    with pytest.raises(UserError, match=f"cannot carry '{slug}'"):
        verl_export.export(load_config(recipe), tmp_path / "run")
    assert slug in OURS_ALONE


@pytest.mark.parametrize("recipe", sorted(set(MATH) - set(REFUSED)))
def test_every_other_recipe_for_mathematics_is_exported(recipe: str, tmp_path: Path) -> None:
    given = load_config(recipe)
    paths = verl_export.export(given, tmp_path / "run")
    tree = yaml.safe_load((tmp_path / "run" / "verl.yaml").read_text())
    policy = tree["actor_rollout_ref"]["actor"]["policy_loss"]
    assert policy["methods"] == given.methods
    tier = verl_export.tier_of(given)
    assert tree["trainer"]["v1"]["trainer_mode"] == {"a": "sync", "b": "rlvr"}[tier]
    assert policy["loss_mode"] == {"a": "rlvr", "b": "rlvr_tier_b"}[tier]
    assert pipeline_of(given.methods).reduction[0] in REDUCTIONS
    for path in paths:
        text = path.read_text()
        assert not re.search("@[A-Z]+@", text)
        if path.suffix in (".sh", ".sbatch"):
            shell = text.splitlines()[0].removeprefix("#!/bin/")
            subprocess.run([shutil.which(shell) or shell, "-n", str(path)], check=True)
        if path.suffix == ".py":
            ast.parse(text)


def test_settings_arrive_under_verls_names(tmp_path: Path) -> None:
    tree = exported(
        tmp_path / "run", "rollout.prompts=64", "rollout.group_size=4", "update.minibatches=8", "update.epochs=2",
        "update.micro_batch_rows=3", "rollout.max_tokens=1000", "optimizer.warmup=5", "optimizer.schedule=cosine",
        "optimizer.lr=2e-6", "optimizer.eps=1e-6", "seed=7", "checkpoint.every=11", "evaluation.every=13",
        "model.lora.rank=8", "methods.grpo.reduction=sequence_mean_of_token_mean",
    )  # fmt: skip
    actor, rollout = tree["actor_rollout_ref"]["actor"], tree["actor_rollout_ref"]["rollout"]
    assert (tree["data"]["train_batch_size"], rollout["n"], actor["ppo_mini_batch_size"]) == (64, 4, 8)
    assert actor["ppo_epochs"] == 2
    assert actor["ppo_max_token_len_per_gpu"] == 3 * (2048 + 1000)
    assert actor["optim"]["lr"] == 2e-6
    assert actor["optim"]["override_optimizer_config"] == {"eps": 1e-6}
    assert actor["optim"]["lr_warmup_steps"] == 5  # tier A: the schedule advances per rollout
    assert actor["loss_agg_mode"] == "seq-mean-token-mean"
    assert tree["actor_rollout_ref"]["model"]["lora_rank"] == 8
    assert (tree["trainer"]["save_freq"], tree["trainer"]["test_freq"]) == (11, 13)
    assert (tree["data"]["seed"], actor["data_loader_seed"]) == (7, 7)
    later = exported(tmp_path / "b", "methods.kl_cov={}", "methods.kl_reference={}", "optimizer.warmup=5",
                     "update.minibatches=8", "rollout.prompts=16")  # fmt: skip
    assert later["actor_rollout_ref"]["actor"]["optim"]["lr_warmup_steps"] == 5 * 8  # tier B: per optimizer step
    assert later["actor_rollout_ref"]["actor"]["use_kl_loss"] is True  # it makes verl keep the reference


def test_a_constant_reduction_takes_its_constant_along(tmp_path: Path) -> None:
    tree = exported(tmp_path / "run", "methods={dr_grpo: {preset: paper, max_length: 777}}")
    actor = tree["actor_rollout_ref"]["actor"]
    assert (actor["loss_agg_mode"], actor["loss_scale_factor"]) == ("seq-mean-token-sum-norm", 777)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.task=countdown", "data.file=null"), "set data.task=math"),
        (("rollout.prompts=10", "update.minibatches=4"), "no multiple of update.minibatches=4"),
        (("optimizer.schedule=linear",), "constant or cosine"),
        (("optimizer={name: classp}",), "verl brings AdamW"),
    ],
)
def test_what_verl_cannot_do_is_refused(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        verl_export.export(config(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        verl_export.export(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_writes_both_kinds(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    for engine, name in (("verl", "verl.yaml"), ("rlvr_lab", "slurm.sbatch")):
        out = tmp_path / engine
        result = CliRunner().invoke(app, ["grpo/math", "--engine", engine, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert (out / name).is_file()
    result = CliRunner().invoke(app, ["grpo/tiny", "--engine", "verl", "--out", str(tmp_path / "no")])
    assert result.exit_code == 2
    assert "data.task=math" in result.output


def test_the_recipe_beside_the_files_is_the_same_recipe(tmp_path: Path) -> None:
    given = config("rollout.prompts=32", "data.file=problems.jsonl")
    for name, run in (("verl", verl_export.export), ("own", launch_export.export)):
        run(given, tmp_path / name)
        again = load_config(str(tmp_path / name / "recipe.yaml"))
        assert again.data.file == Path("problems.jsonl").absolute()
        assert again.model_copy(update={"data": given.data}) == given


@pytest.mark.slow
def test_our_launch_file_trains_on_two_processes(tmp_path: Path) -> None:
    given = load_config("grpo/tiny", ["steps=1", "evaluation.problems=0", "rollout.prompts=4", "ledger.rows=0"])
    launch_export.export(given, tmp_path / "run")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        ["sh", "launch.sh"], cwd=tmp_path / "run", env=env, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "run" / "model" / "model.safetensors").is_file()


# -- what verl can carry ----------------------------------------------------------------------------------------------


def test_every_reduction_has_a_mode_of_verls() -> None:
    assert set(MODES) == set(REDUCTIONS)
    assert len(set(MODES.values())) == len(MODES)


def test_methods_are_carried_or_listed_with_a_reason() -> None:
    for tier in ("a", "b"):
        refused = unsupported(tier)
        assert set(supported(tier)) | set(refused) == set(trainable())
        assert not set(supported(tier)) & set(refused)
        assert all(reason and not reason.startswith("'") for reason in refused.values())
    assert set(unsupported("b")) <= set(unsupported("a"))
    assert {"clip_cov", "kl_cov"} <= set(unsupported("a"))
    assert "optimizer minibatch" in unsupported("a")["kl_cov"]


def test_the_reason_names_the_method_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"'entropy_bonus' adds a term .* tier B"):
        require_tier(pipeline_of({"grpo": {}, "entropy_bonus": {}}), "a")
    assert obstacles([build("entropy_bonus", {})], "b") == []


def test_a_setting_that_needs_more_changes_the_tier() -> None:
    """REINFORCE++ with its KL penalty reads reference log-probs, which a registered function is not given."""
    plain, penalised = (build("reinforce_plus_plus", {"preset": "released", "kl_penalty": k}) for k in (0.0, 0.1))
    assert obstacles([plain], "a") == []
    assert "needs 'ref_logprob'" in obstacles([penalised], "a")[0]


def test_an_environment_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.task 'maze' is an environment .* rlvr-lab train"):
        verl_export.export(load_config("grpo/tiny", ["data.task=maze"]), tmp_path / "out")


def test_a_method_that_replays_is_carried_nowhere() -> None:
    class Buffer(Method):
        slug = "buffer"

        def replay(self) -> None: ...

    for tier in ("a", "b"):
        assert "responses of earlier steps" in obstacles([Buffer()], tier)[0]


def test_a_method_that_samples_is_carried_nowhere() -> None:
    class Sampler(Method):
        slug = "sampler"

        def sample(self) -> None: ...

    for tier in ("a", "b"):
        assert "agent loop" in obstacles([Sampler()], tier)[0]
    with pytest.raises(UserError, match="rlvr-lab train"):
        require_tier(compose([Sampler()]), "b")


def test_verls_reward_is_our_verdict() -> None:
    right = compute_score("x", r"so the answer is \boxed{\frac{1}{2}}", "0.5", None)
    wrong = compute_score("x", r"\boxed{3}", "4", {}, more="ignored")
    assert (right["score"], right["acc"]) == (1.0, 1.0)
    assert (wrong["score"], wrong["acc"]) == (0.0, 0.0)
    assert wrong["pred"]
    assert compute_score("x", "", "4")["pred"] == ""
