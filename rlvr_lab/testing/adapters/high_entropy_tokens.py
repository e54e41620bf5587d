"""Replays high_entropy_tokens.json: the official mask and loss, and TRL's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean, reduce
from ...methods import high_entropy_tokens as het
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import REDUCTION, reduce_as_verl


def _official(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask, p = case.mask("response_mask"), case.params
    selected = het.top_mask(case.tensor("entropy"), mask, p["top_ratio"])
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    surrogate = clipped_surrogate(logprob, old, advantage, *bounds, dual_clip=p["clip_ratio_c"])
    now = surrogate.ratio.detach()
    beyond = -advantage * now.clamp(*bounds) > -advantage * now
    reduction = REDUCTION[p["loss_agg_mode"]]

    def over(tokens: Tensor) -> Tensor:
        if reduction == "sequence_mean_of_token_mean" and not bool(tokens.any(1).all()):
            return logprob.sum() * float("nan")  # the official mean of such a row is 0 / 0; ours leaves it out
        factors = het.selected_weights(tokens, mask, reduction, logprob.dtype)
        return reduce_as_verl(case, factors * surrogate.loss, mask)

    loss = over(selected)
    outputs = {
        "top_mask": selected.long(),
        "num_selected": int(selected.sum()),
        "loss": loss,
        "loss_all_tokens": reduce_as_verl(case, surrogate.loss, mask),
        "loss_bottom_complement": over(mask & ~selected),
        "pg_clipfrac": masked_mean(beyond.to(now), mask),
    }
    return Replay(outputs, gradient(loss, logprob))


def _trl(case: Case) -> Replay:
    logprob, old, p = case.leaf("log_prob"), case.tensor("old_log_prob"), case.params
    mask = case.mask("completion_mask")
    advantage = case.tensor("advantages_per_sequence")[:, None].expand_as(logprob)
    selected, threshold = het.quantile_mask(case.tensor("entropy"), mask, p["top_entropy_quantile"])
    surrogate = clipped_surrogate(logprob, old, advantage, 1 - p["epsilon"], 1 + p["epsilon_high"])
    kind = "sequence_mean_of_token_mean" if p["loss_type"] == "grpo" else "token_mean"
    loss = reduce(surrogate.loss * selected, mask, kind)  # type: ignore[arg-type]
    outputs = {
        "entropy_mask": selected.long(),
        "threshold": threshold,
        "num_selected": int(torch.count_nonzero(selected)),
        "loss": loss,
    }
    return Replay(outputs, gradient(loss, logprob))


RULES = [
    Rule("high_entropy_tokens", {"entropy", "log_prob", "old_log_prob", "advantages", "response_mask"},
         {"top_mask", "loss"}, _official, params={"top_ratio"}),
    Rule("high_entropy_tokens", {"entropy", "log_prob", "advantages_per_sequence", "completion_mask"},
         {"entropy_mask", "threshold"}, _trl, params={"top_entropy_quantile"}),
]  # fmt: skip
