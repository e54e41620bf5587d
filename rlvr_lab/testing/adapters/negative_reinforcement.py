"""Replays negative_reinforcement.json: advantages, dropped rows, loss; pass@k; the logit gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ...core.dynamics import exact_change
from ...core.entropy import softmax_entropy
from ...core.losses import clipped_surrogate
from ...core.reduce import masked_mean, reduce
from ...evaluate.passk import pass_at_k
from ...methods import negative_reinforcement as nr
from ..golden import Case, Replay, Rule, gradient

MODES: dict[str, nr.Mode] = {"positive": "psr", "negative": "nsr", "weighted": "weighted"}


def _loss(case: Case) -> Replay:
    logprob, old, mask, p = case.leaf("log_prob"), case.tensor("old_log_prob"), case.mask("response_mask"), case.params
    mode, correct = MODES[p["mode"]], case.mask("sequence_reward")
    # the return of token t is gamma^(distance to the last token) times the reward
    gamma = p.get("gamma", 1.0)
    distance = (mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1])).clamp_min(0)
    value = nr.sign_advantage(correct, mode, p["positive_advantage_weight"], logprob.dtype)[:, None]
    returns = (correct[:, None] * gamma**distance).to(logprob)
    positive = p["positive_advantage_weight"] if mode == "weighted" else 1.0
    advantage = {
        "psr": returns,
        "nsr": returns - 1,
        "weighted": torch.where(correct[:, None], positive * returns, returns - 1),
    }[mode]
    advantage = (value.expand_as(logprob) if gamma == 1 else advantage) * mask
    rows = nr.kept_rows(correct, mode)
    surrogate = clipped_surrogate(logprob, old, advantage, 1 - p["cliprange"], 1 + p["cliprange"])
    scale = p.get("positive_learning_weight")
    per_token = surrogate.loss if scale is None else torch.where(advantage > 0, scale * surrogate.loss, surrogate.loss)
    outputs: dict[str, Any] = {"advantages": advantage, "kept_rows": rows}
    if not len(rows) or not bool(mask[rows].any()):
        return Replay(outputs)
    loss = reduce(per_token[rows], mask[rows], "token_mean")
    now, a = surrogate.ratio.detach(), advantage
    beyond = -a * now.clamp(1 - p["cliprange"], 1 + p["cliprange"]) > -a * now
    outputs |= {
        "loss": loss,
        "pg_clipfrac": masked_mean(beyond[rows].to(now), mask[rows]),
        "ppo_kl": masked_mean((old - logprob.detach())[rows], mask[rows]),
        "loss_without_subsetting": reduce(per_token, mask, "token_mean"),
    }
    return Replay(outputs, gradient(loss, logprob))


def _passk(case: Case) -> Replay:
    correct = [sum(row) for row in case.inputs["correct"]]
    n = case.params["n"]
    ks = case.outputs["pass_at_k"]
    return Replay({"pass_at_k": {k: float(pass_at_k(n, correct, int(k)).mean()) for k in ks}})


def _logits(case: Case) -> Replay:
    logits, p = case.tensor("logits"), case.params
    right = p["reward"] > 0
    weights = {"reinforce": p["reward"], "psr": float(right), "nsr": float(right) - 1, "weighted": -1.0}
    if right:
        weights["weighted"] = p["lam"]
    grads: dict[str, Any] = {}
    changes = {}
    forms: tuple[Literal["logprob", "probability"], ...] = ("logprob", "probability")
    for name, weight in weights.items():
        by_logprob, by_probability = (nr.logit_gradient(logits, p["sampled"], weight, form) for form in forms)
        grads[name] = {
            "loss_grad_logprob_surrogate": by_logprob,
            "descent_direction": -by_logprob,
            "loss_grad_probability_form": by_probability,
        }
        changes[name] = exact_change(logits, -p["eta_for_dH"] * by_logprob)
    return Replay(
        {
            "probs": torch.softmax(logits, -1),
            "entropy": softmax_entropy(logits),
            "grads": grads,
            "entropy_change_one_step": changes,
        }
    )


RULES = [
    Rule("negative_reinforcement", {"sequence_reward", "old_log_prob", "log_prob", "response_mask"},
         {"advantages", "kept_rows"}, _loss, params={"mode", "cliprange"}),
    Rule("negative_reinforcement", {"correct"}, {"pass_at_k"}, _passk, params={"n"}),
    Rule("negative_reinforcement", {"logits"}, {"grads"}, _logits, params={"sampled", "reward"}),
]  # fmt: skip
