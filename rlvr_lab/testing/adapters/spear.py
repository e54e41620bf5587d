"""Replays spear.json: covariance clip and Dr.BoT loss with gradients, life cycle of the buffer, schedules, rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.groups import group_moments, varied_groups
from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean
from ...core.rollout import Rollout
from ...methods import spear
from ...methods._self_imitation import recalibrated
from ...methods.entropy_mechanism import place_mask
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl


def _clip_cov(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask, p = case.mask("mask"), case.params
    bounds, interval = (p["clip_low"], p["clip_high"]), (p["clip_cov_lb"], p["clip_cov_ub"])
    seeded = torch.Generator().manual_seed(p.get("torch_seed", 0))
    found = spear.covariance_clip(logprob, old, advantage, mask, bounds, interval, p["clip_cov_ratio"], seeded)
    kept = ~place_mask(found.places, mask)
    surrogate = clipped_surrogate(logprob, old, advantage, 1 - bounds[0], 1 + bounds[1])
    loss = reduce_as_verl(case, surrogate.loss * kept, mask, port=True)
    outputs = {
        "loss": loss,
        "clipfrac": masked_mean((~kept).to(old), mask).nan_to_num(0.0),
        "ppo_kl": masked_mean(old - logprob, mask).nan_to_num(0.0),
        "covariance": _as_recorded(found.covariance, logprob, advantage, mask),
        "eligible_positions": found.eligible.nonzero(),
        "n_to_drop": len(found.places),
        "dropped_positions": found.places,
    }
    return Replay(outputs, gradient(loss, logprob))


def _as_recorded(covariance: Tensor, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """The record holds the product outside the mask too."""
    logprob = logprob.detach()
    outside = (advantage - masked_mean(advantage, mask)) * (logprob - masked_mean(logprob, mask))
    return torch.where(mask, covariance, outside)


def _vanilla(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask, p = case.mask("mask"), case.params
    dual = p["dual_clip_c"]
    done = clipped_surrogate(logprob, old, advantage, 1 - p["clip_low"], 1 + p["clip_high"], dual)
    loss = reduce_as_verl(case, done.loss, mask, port=True)
    outputs = {
        "loss": loss,
        "clipfrac": masked_mean((done.clipped_low | done.clipped_high).to(old), mask),
        "ppo_kl": masked_mean(old - logprob, mask),
        "clipfrac_lower": masked_mean(((advantage < 0) & (done.ratio > dual)).to(old), mask),
    }
    return Replay(outputs, gradient(loss, logprob))


def _rollout(rewards: Tensor, called: Tensor, step: int) -> Rollout:
    """One step's trajectories of three tokens; the middle one is told where a tool was called. The first token is the
    trajectory's number."""
    prompts, size = rewards.shape
    rows = torch.arange(prompts * size)
    action = torch.ones(len(rows), 3, dtype=torch.bool)
    action[:, 1] = ~called.flatten()
    every = torch.ones_like(action)
    nothing = torch.zeros(action.shape, dtype=rewards.dtype)
    return Rollout(
        prompt_id=rows // size,
        group_id=rows // size,
        finished=torch.ones_like(every[:, 0]),
        policy_version=torch.full_like(rows, step),
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.long),
        prompt_mask=every[:, :1].clone(),
        response_ids=(1000 * step + rows)[:, None].expand(-1, 3).clone(),
        response_mask=every,
        action_mask=action,
        behaviour_logprob=nothing,
        behaviour_temperature=nothing + 1,
        old_logprob=nothing.clone(),
        reward=rewards.flatten(),
    )


def _buffer(case: Case) -> Replay:
    p = case.params
    decay = p.get("weight_decay_trajectory_replay", -1)
    method = spear.Spear(
        spear.SpearConfig(
            buffer=p["buffer_size"], history=p["baseline_buffer_size"], tolerance=p["tolerate_steps"],
            weight_decay=decay if decay > 0 else None, std=bool(p.get("norm_by_std", False)), needs_call=True,
            singleton="raw",
        )
    )  # fmt: skip
    steps = []
    for given, recorded in zip(case.inputs["steps"], case.outputs["steps"], strict=True):
        rewards = torch.tensor(given["rewards"], dtype=case.dtype)
        rollout = _rollout(rewards, torch.tensor(given["has_tool_call"]).bool(), given["step"])
        steps.append(_one_step(method, rollout, given["step"], recorded))
    return Replay({"steps": steps})


def _one_step(method: spear.Spear, rollout: Rollout, step: int, recorded: dict[str, Any]) -> dict[str, Any]:
    memory = method.memory
    seed = (recorded.get("replayed") or {}).get("torch_seed", 1000 + step)
    baseline, before = memory.baseline() if len(memory.buffer) else None, len(memory.buffer)
    drawn = memory.draw(torch.Generator().manual_seed(seed))
    full, replayed = before > 0 and not len(memory.buffer), None
    if drawn is not None:
        rows, advantage, _ = drawn
        numbers = rows.response_ids[:, 0]
        order = numbers.argsort()
        # the record gives one number per trajectory: any of its own tokens, and the first is one
        replayed = {"trajectory_ids": numbers[order], "advantage": advantage[order, 0], "p50_baseline": baseline}
        replayed["torch_seed"] = seed
    memory.store(rollout, method.advantage(rollout), step)
    kept = memory.buffer.rollout
    median = memory.means.median()
    countable = memory.buffer.reward > median if memory.weight_decay is None else torch.ones(len(memory.buffer))
    return {
        "step": step,
        "buffer_was_full_at_start": full,
        "replayed": replayed,
        "stored_ids_after": [] if kept is None else kept.response_ids[:, 0],
        "countable_buffer_size": int(countable.sum()),
        "history_len": len(memory.means),
    }


def _recalibration(case: Case) -> Replay:
    p = case.params
    std = p["baseline_std_p50"] if p.get("norm_by_std") else None
    value = recalibrated(case.tensor("reward"), p["baseline_mean_p50"], std, p.get("eps", 1e-6))
    return Replay({"advantage": value, "kept": (value > 0).long()})


def _schedules(case: Case) -> Replay:
    p, steps = case.params, case.inputs["global_step"]
    return Replay(
        {
            "gamma": [spear.replay_weight(s, p["T_warmup_replay"], p.get("replay_loss_coef", 1.0)) for s in steps],
            "mu": [spear.tool_weight(s, p["T_decay_toolcall"]) for s in steps],
        }
    )


def _tool_reward(case: Case) -> Replay:
    p, given = case.params, case.inputs
    bonus = spear.tool_reward(case.tensor("n_tool_calls"), p["per_call"], p["cap"])
    fixed, modes = {"constant": 1.0, "none": 0.0}, zip(given["mode"], given["step"], given["T_decay"], strict=True)
    weights = [fixed.get(mode, spear.tool_weight(step, decay)) for mode, step, decay in modes]
    weight = torch.tensor(weights, dtype=case.dtype)
    return Replay({"reward": case.tensor("outcome") + weight * bonus})


def _filter(case: Case) -> Replay:
    rewards = case.tensor("rewards")
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    _, spread, _ = group_moments(rewards.flatten(), groups)
    kept = varied_groups(rewards.flatten(), groups, case.params["rollout_filter_ratio"])
    return Replay({"group_std": spread, "kept_groups_sorted": sorted(set(groups[kept].tolist()))})


TOKENS = {"log_prob", "old_log_prob", "advantages", "mask"}
RULES = [
    Rule("spear", TOKENS, {"loss", "clipfrac"}, _clip_cov, params={"clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"}),
    Rule("spear", TOKENS, {"loss", "clipfrac"}, _vanilla, params={"dual_clip_c"}),
    Rule("spear", {"steps"}, {"steps"}, _buffer, params={"buffer_size", "baseline_buffer_size", "tolerate_steps"}),
    Rule("spear", {"reward"}, {"advantage", "kept"}, _recalibration, params={"baseline_mean_p50"}),
    Rule("spear", {"global_step"}, {"gamma", "mu"}, _schedules, params={"T_warmup_replay", "T_decay_toolcall"}),
    Rule("spear", {"outcome", "n_tool_calls", "step", "mode"}, {"reward"}, _tool_reward, params={"per_call", "cap"}),
    Rule("spear", {"rewards"}, {"group_std", "kept_groups_sorted"}, _filter, params={"rollout_filter_ratio"}),
]
