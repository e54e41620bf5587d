"""Replays bupo.json: the surrogate on a layer's policy, entropies of streams and writes, schedule, choice of layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.advantages import group_advantage
from ...core.losses import LOG_RATIO_LIMIT, clipped_surrogate
from ...core.reduce import Reduction, masked_mean, reduce
from ...methods import bupo
from ..golden import Case, Replay, Rule, gradient

REDUCTIONS: dict[str, Reduction] = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_of_token_mean",
    "seq-mean-token-sum": "sequence_mean_of_token_sum",
    "seq-mean-token-sum-norm": "token_sum_over_constant",
}
"""verl's names; the constant of the last one is the padded length."""


def _loss(case: Case) -> Replay:
    p, mask, ids = case.params, case.mask("response_mask"), case.ids("response_tokens")
    tau = p.get("temperature", 1.0)
    hidden, unembedding = case.leaf("hidden_layer_l_new"), case.leaf("unembedding_new")
    old, _ = bupo.internal_policy(case.tensor("hidden_layer_l_old"), case.tensor("unembedding_old"), ids, tau)
    new, entropy = bupo.internal_policy(hidden, unembedding, ids, tau)
    # a response without a token has nothing that its reward could sit on: it enters the statistics as 0
    reward = case.tensor("rewards").masked_fill(~mask.any(1), 0.0)
    value = group_advantage(reward, case.ids("group_id"), "sample", p.get("adv_eps", 1e-6), "raw")
    advantage = value[:, None] * mask
    low, high = 1 - p["clip_ratio_low"], 1 + p["clip_ratio_high"]
    cap = p.get("clip_ratio_c")
    found = clipped_surrogate(new, old, advantage, low, high, dual_clip=cap)
    mode = p.get("loss_agg_mode", "token-mean")
    loss = reduce(found.loss, mask, REDUCTIONS[mode], float(mask.shape[1]))
    outputs = {
        "advantages": advantage,
        "old_log_prob_layer": old,
        "log_prob_layer": new,
        "entropy_layer": entropy,
        "ratio": found.ratio,
        "loss": loss,
        **_figures(found.ratio, new - old, advantage, mask, low, high, cap),
    }
    leaves = {"log_prob_layer": new, "hidden_layer_l_new": hidden, "unembedding_new": unembedding}
    return Replay(outputs, {name: gradient(loss, leaf) for name, leaf in leaves.items()})


def _figures(
    ratio: Tensor, log_ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float, cap: float | None
) -> dict[str, Tensor]:
    """What verl logs: shares of tokens whose loss is the clipped one, and -E[log r]."""
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(low, high)
    outer = torch.maximum(plain, clipped)
    lower = (-advantage * cap < outer) & (advantage < 0) if cap else torch.zeros_like(mask)
    return {
        "clipfrac": masked_mean((clipped > plain).to(ratio), mask),
        "ppo_kl": masked_mean(-log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), mask),
        "clipfrac_lower": masked_mean(lower.to(ratio), mask),
    }


def _entropies(case: Case) -> Replay:
    stream, unembedding = case.tensor("embedding_stream"), case.tensor("unembedding")
    final = case.tensor("final_norm_weight")
    layers = []
    for number, raw in enumerate(case.inputs["layers"], 1):
        found, stream = _layer({k: torch.tensor(v, dtype=case.dtype) for k, v in raw.items()}, stream, unembedding)
        normed = bupo.layer_entropy(bupo.rms_norm(stream, final), unembedding)
        layers.append({"layer": number, **found, "H_layer_out_with_final_norm": normed})
    return Replay({"layers": layers})


def _layer(raw: dict[str, Tensor], stream: Tensor, unembedding: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Entropies and cosines of one layer, and the stream behind it."""
    attention, ffn = raw["attn_write"], raw["ffn_write"]
    states = bupo.LayerStates(
        stream,
        bupo.rms_norm(stream, raw["input_norm_weight"]),
        attention,
        bupo.rms_norm(stream + attention, raw["post_attn_norm_weight"]),
        ffn,
    )
    change, (cos_attention, cos_ffn) = bupo.entropy_changes(states, unembedding), bupo.write_cosines(states)
    parts = {
        "H_attn_in": states.attention_input,
        "H_attn_out": attention,
        "H_ffn_in": states.ffn_input,
        "H_ffn_out": ffn,
        "H_layer_in": stream,
        "H_layer_out": states.stream_out,
    }
    means = {
        "dH_attn_mean": change.attention,
        "dH_ffn_mean": change.ffn,
        "dH_layer_mean": change.layer,
        "cos_attn_resid_mean": cos_attention,
        "cos_ffn_resid_mean": cos_ffn,
    }
    entropies = {name: bupo.layer_entropy(value, unembedding) for name, value in parts.items()}
    return entropies | {name: value.mean() for name, value in means.items()}, states.stream_out


def _schedule(case: Case) -> Replay:
    shift = 1 - case.params.get("first_step", 1)
    internal = [bupo.is_internal(s + shift, case.params["s_inter"]) for s in case.inputs["global_steps"]]
    return Replay({"phase": ["internal" if yes else "full" for yes in internal], "n_internal": sum(internal)})


def _target(case: Case) -> Replay:
    changes = [float(x) for x in case.tensor("mean_dH_ffn")]
    return Replay({"target_layer": bupo.target_layer(changes, case.params["tau"])})


RULES = [
    Rule("bupo", {"hidden_layer_l_old", "hidden_layer_l_new", "response_tokens", "group_id"},
         {"loss", "log_prob_layer"}, _loss, params={"clip_ratio_low", "clip_ratio_high"}),
    Rule("bupo", {"embedding_stream", "unembedding", "final_norm_weight", "layers"}, {"layers"}, _entropies),
    Rule("bupo", {"global_steps"}, {"phase"}, _schedule, params={"s_inter"}),
    Rule("bupo", {"mean_dH_ffn"}, {"target_layer"}, _target, params={"tau"}),
]  # fmt: skip
