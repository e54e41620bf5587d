"""Replays lp_reg.json: the proxy, the selected tokens, the released loss and its gradient."""

from __future__ import annotations

import torch

from ...core.losses import clipped_surrogate, importance_ratio, kl_estimate
from ...core.reduce import masked_mean
from ...methods import lp_reg
from ..golden import Case, Replay, Rule, gradient
from .entropy_mechanism import reduce_as_verl

SAME = 1e-7  # a token whose proxy equals the policy contributes nothing and is not listed


def _lp_reg(case: Case) -> Replay:
    logprob, old, advantage = case.leaf("log_prob"), case.tensor("old_log_prob"), case.tensor("advantages")
    mask, p = case.mask("response_mask"), case.params
    proxy, support = lp_reg.proxy_log_p(case.tensor("logits_old"), p["kappa"], p["filter"])
    proxy = proxy.gather(-1, case.ids("actions")[..., None]).squeeze(-1)
    now = logprob.detach()
    ranked = lp_reg.protected_tokens(now, advantage, mask, p["rho_neg"])
    selected = ranked & (now < proxy)
    bounds = 1 - p["clip_low"], 1 + p["clip_high"]
    plain = clipped_surrogate(logprob, old, advantage, *bounds)
    divergence = lp_reg.k3_to_proxy(logprob, proxy.masked_fill(~selected, 0.0))
    ratio = importance_ratio(logprob, old)
    loss = reduce_as_verl(case, torch.where(selected, -advantage * ratio + p["beta"] * divergence, plain.loss), mask)
    beyond = -advantage * ratio.detach().clamp(*bounds) > -advantage * ratio.detach()
    outputs = {
        "proxy_support": support.long(),
        "proxy_log_prob_of_action": proxy,
        "n_selected_by_percentile": int(ranked.sum()),
        "regularised_flat_indices": (ranked & (now < proxy - SAME)).flatten().nonzero().squeeze(1),
        "loss": loss,
        "loss_without_regulariser": reduce_as_verl(case, plain.loss, mask),
        "clipfrac": masked_mean(beyond.to(now), mask),
        "ppo_kl_k3": masked_mean(kl_estimate(now, old), mask),
    }
    return Replay(outputs, gradient(loss, logprob))


RULES = [
    Rule("lp_reg", {"logits_old", "actions", "log_prob", "old_log_prob", "advantages", "response_mask"},
         {"proxy_support", "loss"}, _lp_reg, params={"kappa", "rho_neg", "beta"}),
]  # fmt: skip
