"""Every exported recipe is a configuration that verl 0.9.1 composes, converts and validates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.import_utils import load_extern_object

from rlvr_lab.integrations import verl_export
from rlvr_lab.integrations.verl import RlvrPolicyLossConfig
from rlvr_lab.integrations.verl_support import obstacles, pipeline_of
from rlvr_lab.train.config import load_config, packaged_recipes

MATH = [name for name in packaged_recipes() if load_config(name).data.task == "math"]
# what verl cannot carry is refused; tests/integrations has that
RECIPES = [name for name in MATH if not obstacles(pipeline_of(load_config(name).methods).methods, "b")]


def composed(recipe: str, out: Path, *overrides: str) -> Any:
    verl_export.export(load_config(recipe), out)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(out), version_base=None):
        return compose("verl", overrides=list(overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_verl_validates_the_exported_configuration(recipe: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("GPUS_PER_NODE", "4")
    given = load_config(recipe)
    config = composed(recipe, tmp_path / "run")
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 4)
    tier = verl_export.tier_of(given)
    reference = need_reference_policy(config)
    assert reference == (tier == "b" and pipeline_of(given.methods).needs("ref_logprob"))
    assert not need_critic(config)
    validate_config(config, reference, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, RlvrPolicyLossConfig)
    assert OmegaConf.to_container(config.algorithm.rlvr_methods, resolve=True) == given.methods
    assert actor.optim.lr == given.optimizer.lr
    assert tuple(actor.optim.betas) == given.optimizer.betas
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)


def test_environment_reaches_the_workers_and_overrides_work(tmp_path: Path) -> None:
    config = composed("entropy_mechanism/clip_cov", tmp_path / "run", "actor_rollout_ref.actor.optim.lr=3e-6")
    env = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert env.VERL_USE_EXTERNAL_MODULES == "rlvr_lab.integrations.verl_tier_b"
    assert config.actor_rollout_ref.actor.optim.lr == 3e-6
    assert os.environ.get("NNODES") is None
    assert config.trainer.nnodes == 1


def test_verl_loads_our_reward_function(tmp_path: Path) -> None:
    config = composed("grpo/math", tmp_path / "run")
    reward = config.reward.custom_reward_function
    run = load_extern_object(reward.path, reward.name)
    assert run.__module__ == "rlvr_lab.integrations.verl_reward"
