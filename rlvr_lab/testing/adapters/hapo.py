"""Replays hapo.json: every part with the released sign (`_code`) and with the text's (`_signed`)."""

from __future__ import annotations

from typing import Any

from ...core.advantages import group_advantage
from ...core.entropy import softmax_entropy
from ...core.losses import clipped_surrogate, importance_ratio
from ...core.reduce import masked_mean
from ...methods import hapo
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl


def _hapo(case: Case) -> Replay:
    mask, p = case.mask("response_mask"), case.params
    reward, group, entropy = case.tensor("seq_reward"), case.ids("group_id"), case.tensor("entropy_used")
    scale = hapo.entropy_scale(entropy, mask, p["entropy_pivot"])
    assert scale is not None
    outputs: dict[str, Any] = {
        "token_level_group_advantage": hapo.token_group_advantage(reward, group, mask, p["eps_std"]),
        "grpo_advantage": group_advantage(reward, group, "sample", p["eps_std"], "raw")[:, None] * mask,
        "pivot": scale.pivot,
        "std": scale.spread,
        "scale_pos": 1 / scale.highest,
        "scale_neg": 1 / scale.lowest,
    }
    grads = {}
    for name in ("code", "signed"):
        found, grads[name] = _part(case, scale, name, outputs["token_level_group_advantage"])
        outputs |= {f"{key}_{name}": value for key, value in found.items()}
    return Replay(outputs, grads)


def _part(case: Case, scale: hapo.EntropyScale, name: str, advantage: Any) -> tuple[dict[str, Any], Any]:
    logprob, old, mask, p = case.leaf("log_prob"), case.tensor("old_log_prob"), case.mask("response_mask"), case.params
    sign: hapo.Sign = "released" if name == "code" else "signed"
    scaled = scale.apply(case.tensor("entropy_used"), sign)
    if sign == "signed":
        scaled = scaled.masked_fill(~mask, 0.0)
    below, above = hapo.adaptive_ranges(scaled, p["clip_low"], p["clip_high"], p["clip_alpha"])
    ratio = importance_ratio(logprob.detach(), old)
    zone: Any = (below, above) if sign == "released" else (p["clip_low"], p["clip_high"])
    factor = hapo.redistribution(scaled, ratio, zone[0], zone[1], p["adv_beta"], sign == "signed")
    surrogate = clipped_surrogate(logprob, old, advantage * factor, 1 - below, 1 + above, dual_clip=p["clip_c"])
    loss = reduce_as_verl(case, surrogate.loss, mask)
    changed = advantage * factor
    beyond = -changed * ratio.clamp(1 - below, 1 + above) > -changed * ratio
    now = scale.apply(softmax_entropy(case.tensor("logits")), sign)
    found = {
        "h_hat": scaled,
        "eps_low": below,
        "eps_high": above,
        "redistributed_advantage": changed,
        "pg_loss": loss,
        "clipfrac": masked_mean(beyond.to(ratio), mask),
        "dynamic_temperature": hapo.adaptive_temperature(now, 1.0, p["temperature_tau"]),
    }
    return found, gradient(loss, logprob)


RULES = [
    Rule("hapo", {"logits", "entropy_used", "old_log_prob", "log_prob", "seq_reward", "group_id"},
         {"pivot", "h_hat_code", "h_hat_signed"}, _hapo, params={"entropy_pivot"}),
]  # fmt: skip
