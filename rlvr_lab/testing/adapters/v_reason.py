"""Replays v_reason.json: signs, EMA and phases of given entropies; steps of the controller on one layer."""

from __future__ import annotations

from typing import Any

import torch

from ...core.entropy import softmax_entropy
from ...inference.entropy_switch import OneLayer, Settings, schedule, steer
from ..golden import Case, Replay, Rule, gradient


def _schedule(case: Case) -> Replay:
    p, entropy = case.params, case.inputs["entropy"]

    def settings(rule: Any) -> Settings:
        return Settings(ema_decay=p["ema_decay"], patience=p["peak_patience"], rule=rule)

    any_rule = schedule(entropy, settings("exploit"))
    return Replay(
        {
            rule: {"alpha": schedule(entropy, settings(rule)).alpha}
            for rule in ("mean_revert", "trend")
            if rule in case.outputs
        }
        | {
            "ema": any_rule.ema,
            "macro_phase": ["exploit" if late else "explore" for late in any_rule.exploit],
            "peak_index": any_rule.peak_index,
            "first_exploit_index": any_rule.first_exploit_index,
        }
    )


def _step(case: Case) -> Replay:
    p = case.params
    layer = OneLayer(
        case.tensor("query"),
        case.tensor("key_cache"),
        case.tensor("value_cache"),
        case.tensor("output_proj"),
        case.tensor("residual_before_attention"),
        case.tensor("final_norm_weight"),
        case.tensor("unembedding"),
        p["norm_eps"],
    )
    places = p["controlled_positions"]
    delta = torch.zeros(len(layer.values), len(places), layer.values.shape[-1], dtype=case.dtype, requires_grad=True)
    alpha = torch.tensor([float(p["alpha"])], dtype=case.dtype)
    before = layer.logits(delta, places)[None]
    start = gradient(-(alpha * softmax_entropy(before)).sum(), delta)
    kind: Any = "adam" if "adam" in str(p.get("optimizer", "")).lower() else "gradient"
    optimizer = Settings(optimizer=kind, lr=p["lr"]).optimizer_of(delta)
    _, trace = steer(lambda: layer.logits(delta, places)[None], delta, alpha, optimizer, p["steps"])
    found = {
        "logits_without_controller": before[0],
        "attention_weights": layer.attention,
        "entropy_trace": trace[:, 0],
        "delta_value_after": delta.detach(),
    }
    return Replay(found, {"delta_value_at_zero": start})


RULES = [
    Rule("v_reason", {"entropy"}, {"ema", "macro_phase"}, _schedule, params={"ema_decay", "peak_patience"}),
    Rule("v_reason", {"query", "key_cache", "value_cache", "output_proj", "residual_before_attention"},
         {"entropy_trace", "delta_value_after"}, _step, params={"alpha", "lr", "steps", "controlled_positions"}),
]  # fmt: skip
