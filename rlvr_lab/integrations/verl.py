"""Tier A for verl 0.9.1: our methods as policy losses and advantage estimators of verl's own registries.

Importing this module registers `rlvr_<slug>` in both registries for every method of `REGISTRY` that needs log-probs and
advantages only (`verl_support.supported("a")`), and `rlvr` for a composition. verl imports it in every one of its
processes by `VERL_USE_EXTERNAL_MODULES=rlvr_lab.integrations.verl`. In verl's configuration:

    algorithm.adv_estimator: rlvr_dr_grpo                                 # or rlvr, for a composition
    algorithm.rlvr_methods: ${actor_rollout_ref.actor.policy_loss.methods}
    actor_rollout_ref.actor.policy_loss:
      _target_: rlvr_lab.integrations.verl.RlvrPolicyLossConfig
      loss_mode: rlvr_dr_grpo
      methods: {dr_grpo: {preset: paper, max_length: 3072}}               # our presets and settings
    actor_rollout_ref.actor.loss_agg_mode: seq-mean-token-sum-norm        # the reduction of that composition
    actor_rollout_ref.actor.loss_scale_factor: 3072

A registered loss is called once per micro-batch of one rank, with old and current log-probs, advantages and mask. It is
reduced by verl's `agg_loss` with the counts of the global minibatch (`config.global_batch_info`), so that micro-batches
and ranks add up to the same loss. One difference to our loop remains: where a mode divides by a number of sequences,
verl counts every row of the minibatch, we count the rows with at least one token. What cannot be written this way is
listed by `verl_support.unsupported("a")`; tier B (`verl_tier_b`) carries it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    agg_loss,
    register_adv_est,
    register_policy_loss,
)
from verl.workers.config import PolicyLossConfig

from ..core.losses import Surrogate
from ..core.rollout import Rollout
from ..errors import UserError
from ..methods.base import LossInputs, Pipeline
from .verl_support import pipeline_of, reduction_mode, require_tier, supported

PREFIX = "rlvr_"
COMPOSITION = "rlvr"
TIER_B = "rlvr_tier_b"
SETTING = "actor_rollout_ref.actor.policy_loss"


@dataclass
class RlvrPolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's settings of the policy loss with `methods: {slug: {preset: NAME, setting: value}}` added.

    verl's own class refuses unknown keys; point `actor.policy_loss._target_` here. Checked when verl builds its
    configuration, so that a wrong method, preset or setting stops the run before a model is loaded (UserError).
    """

    methods: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss_mode == TIER_B:
            require_tier(pipeline_of(plain(self.methods)), "b")
        elif self.loss_mode.startswith(COMPOSITION):
            pipeline_from(self.loss_mode, self.methods)


def plain(settings: Any) -> dict[str, Any]:
    """Settings as nested dictionaries, whether verl hands them over as a dictionary or as omegaconf's type."""
    return {str(key): dict(value.items()) if value else {} for key, value in (settings or {}).items()}


def pipeline_from(name: str, methods: Any) -> Pipeline:
    """The composition behind a registered name: `rlvr` joins `methods`, `rlvr_<slug>` is that method with its settings,
    and with those of a base given beside it. Raises UserError where tier A cannot carry it."""
    return _pipeline(name, json.dumps(plain(methods), sort_keys=True))


@lru_cache(maxsize=64)
def _pipeline(name: str, text: str) -> Pipeline:
    methods: dict[str, dict[str, Any]] = json.loads(text)
    if name == COMPOSITION:
        if not methods:
            raise UserError(f"{SETTING}.methods is empty; name the methods of loss_mode '{COMPOSITION}' there")
    else:
        slug = name.removeprefix(PREFIX)
        pipeline_of({slug: {}})  # an unknown slug is refused with the nearest one
        methods = methods | {slug: methods.get(slug, {"preset": "released"})}
    pipeline = pipeline_of(methods)
    require_tier(pipeline, "a")
    return pipeline


def record(mask_BT: Tensor, **fields: Any) -> Rollout:
    """The little that a registered function knows as a `Rollout`. verl's mask marks actions, with holes where a tool
    answered. Prompts, tokens and the sampler's log-probs are unknown here: their places hold zeros, and no method that
    reads them is registered."""
    b, t = mask_BT.shape
    whole = mask_BT.flip(1).cumsum(1).flip(1) > 0
    ids = torch.zeros(b, t, dtype=torch.long, device=mask_BT.device)
    zeros = torch.zeros(b, t, device=mask_BT.device)
    rows = torch.arange(b, device=mask_BT.device)
    return Rollout(
        **{
            "prompt_id": rows,
            "group_id": rows,
            "finished": whole.any(1),
            "policy_version": torch.zeros_like(rows),
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1], dtype=torch.bool),
            "response_ids": ids,
            "response_mask": whole,
            "action_mask": mask_BT,
            "behaviour_logprob": zeros,
            "behaviour_temperature": torch.ones_like(zeros),
        }
        | fields
    )


def check_reduction(pipeline: Pipeline, mode: str, factor: float | None) -> None:
    """Raise UserError unless verl is set to the composition's reduction, by which it also reduces its own terms."""
    own, constant = reduction_mode(pipeline)
    actor = "actor_rollout_ref.actor"
    if mode != own:
        raise UserError(
            f"{actor}.loss_agg_mode is '{mode}', but this composition is reduced by '{pipeline.reduction[0]}': "
            f"set it to {own}"
        )
    if own == "seq-mean-token-sum-norm" and factor is not None and factor != constant:
        raise UserError(f"{actor}.loss_scale_factor is {factor}, but this composition divides by {constant:g}")


def policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Loss of one micro-batch and its metrics, with the signature of verl's registry. Tensors [b, T], nats.

    verl's weights for the mismatch between sampler and trainer multiply the surrogate, as in its own losses.
    """
    pipeline = pipeline_from(name, _methods(config.policy_loss if config is not None else None))
    info = dict(config.global_batch_info) if config is not None else {}
    check_reduction(pipeline, loss_agg_mode, info.get("loss_scale_factor"))
    mask = response_mask.bool()
    old = old_log_prob.masked_fill(~mask, 0.0)
    rollout = record(mask, old_logprob=old)
    lower, upper = pipeline.clip(rollout, advantages)
    surrogate = pipeline.surrogate(LossInputs(rollout, log_prob, old, advantages, lower, upper))
    loss_BT = surrogate.loss.masked_fill(~mask, 0.0)
    if rollout_is_weights is not None:
        loss_BT = loss_BT * rollout_is_weights
    _, constant = reduction_mode(pipeline)
    if loss_agg_mode == "token-sum":
        loss_BT = loss_BT / (constant or 1.0)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        info["loss_scale_factor"] = constant
    loss: Tensor = agg_loss(loss_mat=loss_BT, loss_mask=mask, loss_agg_mode=loss_agg_mode, **info)
    return loss, _metrics(surrogate, log_prob - old, mask)


def _methods(source: Any, key: str = "methods") -> Any:
    return (source.get(key) if source is not None else None) or {}


@torch.no_grad()
def _metrics(surrogate: Surrogate, log_ratio_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """Fractions of the micro-batch's tokens under verl's names; verl averages them over micro-batches and wants as many
    values from every rank. A micro-batch of padding alone counts as 0 there, as in verl's own losses."""
    tokens = mask_BT.sum().clamp_min(1)
    low, high = ((x & mask_BT).sum() / tokens for x in (surrogate.clipped_low, surrogate.clipped_high))
    return {
        "actor/pg_clipfrac": float(low + high),
        "actor/pg_clipfrac_lower": float(low),
        "actor/ppo_kl": float(-log_ratio_BT[mask_BT].sum() / tokens),
    }


def advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages [B, T] and, as verl's outcome estimators do, the same again as returns. `index` holds the prompt's uid
    of each row; the reward of a response is the sum of its token rewards."""
    pipeline = pipeline_from(name, _methods(config, "rlvr_methods"))
    if index is None:
        raise UserError(f"algorithm.adv_estimator={name} needs the prompts' uids, which verl did not pass")
    _, groups = np.unique(np.asarray(index).astype(str), return_inverse=True)
    reward = token_level_rewards.sum(-1)
    ids = torch.as_tensor(groups, device=reward.device)
    value = pipeline.advantage(record(response_mask.bool(), reward=reward, group_id=ids)).to(reward.dtype)
    return value, value


def _register(name: str, loss: Callable[..., Any], estimator: Callable[..., Any]) -> None:
    register_policy_loss(name)(loss)
    if name not in ADV_ESTIMATOR_REGISTRY:  # verl refuses a second function under one name, as after a reload
        register_adv_est(name)(estimator)


def _tier_b_only(*_: Any, **__: Any) -> Mapping[str, Any]:
    raise UserError(
        f"{SETTING}.loss_mode={TIER_B} belongs to our trainer; set trainer.v1.trainer_mode=rlvr, and "
        "VERL_USE_EXTERNAL_MODULES=rlvr_lab.integrations.verl_tier_b"
    )


def names() -> list[str]:
    """The names in verl's registries."""
    return [COMPOSITION, *(PREFIX + slug for slug in supported("a"))]


for _name in names():
    _register(_name, partial(policy_loss, _name), partial(advantage, _name))
_register(TIER_B, _tier_b_only, _tier_b_only)
