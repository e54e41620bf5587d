"""Tier A inside verl 0.9.1: our registered functions, called by verl's own code, against our own minibatch loss."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from engine_samples import FULL, WITH_EMPTY, Sample, sample
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from rlvr_lab.errors import UserError
from rlvr_lab.integrations import verl as tier_a
from rlvr_lab.integrations.verl_support import obstacles, pipeline_of, reduction_mode, supported, unsupported
from rlvr_lab.methods import REGISTRY, build, trainable
from rlvr_lab.testing.minibatch import minibatch_loss

TOLERANCE = 1e-6
ACTOR, DOTTED = "actor_rollout_ref__actor", "actor_rollout_ref.actor.policy_loss"
POLICY = f"{ACTOR}__policy_loss"
SLUGS = supported("a")


def cases() -> list[tuple[str, str]]:
    """Every preset of every registered method that tier A carries."""
    found = []
    for slug in SLUGS:
        for preset in build(slug, {"preset": "released"}).presets:  # type: ignore[attr-defined]
            if not obstacles([build(slug, {"preset": preset})], "a"):
                found.append((slug, preset))
    return found


@lru_cache
def verl_defaults() -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return hydra_compose("ppo_trainer")


def verl_config(**values: Any) -> Any:
    """verl's own configuration with settings changed; composed once, since Hydra takes a second each time. Names have
    two underscores for a dot. That Hydra itself takes these settings is shown by test_verl_hydra."""
    config = deepcopy(verl_defaults())
    for name, value in values.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return config


def actor_config(slug: str, preset: str) -> ActorConfig:
    """verl's actor settings for one method, made by verl's own code from its own YAML."""
    mode, constant = reduction_mode(pipeline_of({slug: {"preset": preset}}))
    settings = {
        f"{POLICY}___target_": "rlvr_lab.integrations.verl.RlvrPolicyLossConfig",
        f"{POLICY}__loss_mode": f"rlvr_{slug}",
        f"{POLICY}__methods": {slug: {"preset": preset}},
        f"{ACTOR}__loss_agg_mode": mode,
        f"{ACTOR}__ppo_micro_batch_size_per_gpu": 2,
    }
    if mode == "seq-mean-token-sum-norm":
        settings[f"{ACTOR}__loss_scale_factor"] = int(constant or 0)
    return omega_conf_to_dataclass(verl_config(**settings).actor_rollout_ref.actor)


def float32(data: Sample) -> tuple[Any, Tensor, Tensor]:
    """verl's engines hand over float32."""
    rollout = data.rollout.with_(
        old_logprob=data.old_logprob.float(),
        statistics={k: v.float() for k, v in data.rollout.statistics.items()},
    )
    return rollout, data.logprob.detach().float().requires_grad_(), data.advantage.float()


def nested(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(
        [row[: int(n)] for row, n in zip(values, lengths, strict=True)], layout=torch.jagged
    )


def verl_gradient(
    config: ActorConfig, data: Any, logprob: Tensor, advantage: Tensor, rows: int, ranks: int = 1
) -> tuple[float, Tensor]:
    """Loss and gradient through `ppo_loss`, summed over micro-batches of `rows` and averaged over ranks, as verl's
    engines do. Sequences are a prompt token and the response; the model's output is one log-prob per token."""
    mask, leaf = data.mask, logprob.detach().clone().requires_grad_()
    total = torch.zeros(())
    for i in range(0, len(mask), rows):
        part = slice(i, i + rows)
        lengths = mask[part].sum(1)
        shape = torch.ones(len(lengths), 1, dtype=torch.long)
        responses = nested(torch.ones_like(mask[part], dtype=torch.long), lengths)
        packed = [torch.cat([row[: int(n)], row.new_zeros(1)]) for row, n in zip(leaf[part], lengths, strict=True)]
        fields = {
            "prompts": nested(shape, shape[:, 0]),
            "responses": responses,
            "response_mask": nested(mask[part].long(), lengths),
            "old_log_probs": nested(data.old_logprob[part], lengths),
            "advantages": nested(advantage[part], lengths),
        }
        batch = TensorDict(fields, batch_size=len(lengths))
        batch.set_non_tensor("dp_size", ranks)
        batch.set_non_tensor("batch_num_tokens", int(mask.sum()))
        batch.set_non_tensor("global_batch_size", len(mask))
        output = {"log_probs": torch.nested.as_nested_tensor(packed, layout=torch.jagged)}
        loss, metrics = ppo_loss(config, output, batch)
        assert "actor/pg_clipfrac" in metrics
        total = total + loss / ranks
    return float(total.detach()), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize(("slug", "preset"), cases())
def test_registered_loss_has_our_loss_and_gradient_for_any_micro_batch(slug: str, preset: str) -> None:
    config = actor_config(slug, preset)
    rollout, logprob, advantage = float32(sample(FULL, spread=1.2))
    ours = minibatch_loss(pipeline_of({slug: {"preset": preset}}), rollout, logprob, advantage)
    gradient = torch.autograd.grad(ours, logprob)[0]
    value, scale = float(ours.detach()), float(gradient.abs().max())
    assert scale > 1e-6
    for rows, ranks in ((8, 1), (2, 1), (2, 4), (1, 1)):
        loss, theirs = verl_gradient(config, rollout, logprob, advantage, rows, ranks)
        assert loss == pytest.approx(value, rel=2e-6, abs=1e-8)
        torch.testing.assert_close(theirs / scale, gradient / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("slug", ["grpo", "gspo"])
def test_verl_counts_empty_rows_as_sequences(slug: str) -> None:
    """The difference the module's docstring names: 8 rows to verl, 7 with a token to us."""
    config = actor_config(slug, "paper")
    assert config.loss_agg_mode == "seq-mean-token-mean"
    rollout, logprob, advantage = float32(sample(WITH_EMPTY, spread=1.2))
    ours = float(minibatch_loss(pipeline_of({slug: {"preset": "paper"}}), rollout, logprob, advantage).detach())
    kept = rollout.lengths > 0
    short = rollout.rows(kept.nonzero().squeeze(1))
    loss, _ = verl_gradient(config, short, logprob.detach()[kept], advantage[kept], 7)
    assert loss == pytest.approx(ours, abs=TOLERANCE)
    mask = rollout.mask.float()
    value = core_algos.get_policy_loss_fn(f"rlvr_{slug}")(
        rollout.old_logprob, logprob, advantage, mask, "seq-mean-token-mean", with_info(config, len(mask), mask)
    )[0]
    assert float(value.detach()) == pytest.approx(ours * 7 / 8, abs=TOLERANCE)


def with_info(config: ActorConfig, rows: int, mask: Tensor) -> ActorConfig:
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=rows, loss_scale_factor=config.loss_scale_factor
    )
    return config


def test_verls_mismatch_weights_multiply_the_surrogate() -> None:
    rollout, logprob, advantage = float32(sample(FULL))
    weights = torch.rand(advantage.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    run, config = core_algos.get_policy_loss_fn("rlvr_gpg"), actor_config("gpg", "released")
    arguments = (rollout.old_logprob, logprob, advantage, rollout.mask.float(), config.loss_agg_mode, config)
    loss = run(*arguments, rollout_is_weights=weights)[0].detach()
    expected = (-advantage * logprob * weights * rollout.mask).sum().detach() / rollout.mask.sum()
    assert float(loss) == pytest.approx(float(expected), abs=TOLERANCE)


# -- advantages -------------------------------------------------------------------------------------------------------

UIDS = np.array(["b", "b", "b", "a", "a", "a", "lonely", "c", "c"], dtype=object)
LENGTHS = torch.tensor([4, 2, 3, 1, 4, 3, 3, 2, 4])


@pytest.mark.parametrize(("slug", "preset"), cases())
def test_registered_estimator_has_our_advantage(slug: str, preset: str) -> None:
    mask = torch.arange(4) < LENGTHS[:, None]
    reward = torch.randn(9, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros(9, 4)
    rewards[torch.arange(9), LENGTHS - 1] = reward
    batch = TensorDict({"token_level_rewards": rewards, "response_mask": mask.long()}, batch_size=9)
    data = DataProto(batch=batch, non_tensor_batch={"uid": UIDS})
    algorithm = verl_config(
        algorithm__adv_estimator=f"rlvr_{slug}", algorithm__rlvr_methods={slug: {"preset": preset}}
    ).algorithm
    theirs = compute_advantage(data, algorithm.adv_estimator, config=algorithm).batch["advantages"]
    groups = torch.tensor([1, 1, 1, 0, 0, 0, 2, 3, 3])
    rollout = tier_a.record(mask, reward=reward, group_id=groups)
    ours = pipeline_of({slug: {"preset": preset}}).advantage(rollout)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


def test_estimator_agrees_with_verls_grpo() -> None:
    """An estimator of verl's own on the same rows; a group of one keeps its reward in both."""
    mask = torch.arange(4) < LENGTHS[:, None]
    rewards = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)) * mask
    theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask.float(), UIDS)
    ours, returns = core_algos.get_adv_estimator_fn("rlvr_grpo")(
        token_level_rewards=rewards, response_mask=mask.float(), config=None, index=UIDS
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert returns is ours


# -- what is registered, and what is refused --------------------------------------------------------------------------


def test_every_trainable_method_is_registered_or_listed_with_a_reason() -> None:
    refused = unsupported("a")
    assert set(SLUGS) | set(refused) == set(trainable())
    assert not set(SLUGS) & set(refused)
    for slug in SLUGS:
        assert f"rlvr_{slug}" in core_algos.POLICY_LOSS_REGISTRY
        assert f"rlvr_{slug}" in core_algos.ADV_ESTIMATOR_REGISTRY
    assert {"clip_cov", "kl_cov"} <= set(refused)
    assert all(len(reason) > 20 for reason in refused.values())
    left_to_our_loop = {"arbitrary_entropy", "copo", "empo", "hapo", "lp_reg", "siren", "tp_grpo", "ucas"}
    left_to_our_loop |= {"agentic_aepo", "ares", "bupo", "cure", "ettrl", "kappatune", "spear"}
    assert set(unsupported("b")) == left_to_our_loop
    assert not obstacles([build("hapo", {"preset": "tiny"})], "b")  # with its tempered sampler off
    assert not obstacles([build("ares", {"preset": "paper"})], "b")  # the released one reads its trigger words
    assert not obstacles([build("cure", {"preset": "paper", "n2": 0})], "b")  # its second stage samples plainly
    assert "optimizer minibatch" in refused["bapo"]


def test_verls_own_class_refuses_our_setting_and_ours_takes_it() -> None:
    tree = {"_target_": "verl.workers.config.PolicyLossConfig", "loss_mode": "rlvr", "methods": {"gspo": {}}}
    with pytest.raises(Exception, match="methods"):
        omega_conf_to_dataclass(OmegaConf.create(tree))
    tree["_target_"] = "rlvr_lab.integrations.verl.RlvrPolicyLossConfig"
    made = omega_conf_to_dataclass(OmegaConf.create(tree))
    assert isinstance(made, PolicyLossConfig)
    assert made.methods == {"gspo": {}}


def test_a_composition_reads_its_settings_from_verls_configuration() -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [
            f"{DOTTED}._target_=rlvr_lab.integrations.verl.RlvrPolicyLossConfig",
            f"{DOTTED}.loss_mode=rlvr",
            f"+{DOTTED}.methods={{grpo:{{preset:released}},clip_higher:{{preset:paper,clip_high:0.5}}}}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        ]
        config = omega_conf_to_dataclass(hydra_compose("ppo_trainer", overrides).actor_rollout_ref.actor)
    rollout, logprob, advantage = float32(sample(FULL, spread=1.2))
    methods = {"grpo": {"preset": "released"}, "clip_higher": {"preset": "paper", "clip_high": 0.5}}
    ours = minibatch_loss(pipeline_of(methods), rollout, logprob, advantage)
    loss, _ = verl_gradient(config, rollout, logprob, advantage, 4)
    assert loss == pytest.approx(float(ours.detach()), abs=TOLERANCE)
    default = minibatch_loss(pipeline_of({"grpo": {"preset": "released"}}), rollout, logprob, advantage)
    assert abs(float(default.detach()) - loss) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_mode": "rlvr_clip_cov"}, "'clip_cov' takes a statistic .* tier B"),
        ({"loss_mode": "rlvr_gpso"}, "did you mean 'gspo'"),
        ({"loss_mode": "rlvr", "methods": {}}, "methods is empty"),
        ({"loss_mode": "rlvr", "methods": {"grpo": {"clip_hgh": 0.3}}}, "did you mean 'clip_high'"),
        ({"loss_mode": "rlvr", "methods": {"grpo": {}, "entropy_bonus": {}}}, "'entropy_bonus' adds a term"),
        ({"loss_mode": "rlvr_tier_b", "methods": {"clip_covv": {}}}, "did you mean 'clip_cov'"),
    ],
)
def test_a_wrong_setting_stops_before_a_model_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tier_a.RlvrPolicyLossConfig(**settings)


def test_another_aggregation_than_the_methods_is_refused() -> None:
    config = actor_config("gspo", "released")
    rollout, logprob, advantage = float32(sample(FULL))
    run = core_algos.get_policy_loss_fn("rlvr_gspo")
    with pytest.raises(UserError, match="set it to seq-mean-token-mean"):
        run(rollout.old_logprob, logprob, advantage, rollout.mask.float(), "token-mean", config)


def test_the_loss_of_tier_b_is_refused_by_verls_own_trainer() -> None:
    with pytest.raises(UserError, match="trainer_mode=rlvr"):
        core_algos.get_policy_loss_fn("rlvr_tier_b")()


def test_registry_names_have_no_collision_with_verls() -> None:
    own = [name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("rlvr")]
    assert len(own) >= 10
    assert "rlvr_grpo" not in own
    assert set(REGISTRY) >= set(SLUGS)
