"""Replays light_if.json: Entropy-SFT, the TEA entropy term, the cosine length reward."""

from __future__ import annotations

import torch

from ...core.entropy import token_statistics
from ...core.reduce import masked_mean, reduce
from ...methods import light_if
from ..golden import Case, Replay, Rule, gradient

IGNORED = -100


def _sft(case: Case) -> Replay:
    logits, labels, p = case.leaf("logits"), case.ids("labels"), case.params
    target = labels[:, 1:]
    supervised = target != IGNORED
    logprob, entropy = token_statistics(logits[:, :-1], target.masked_fill(~supervised, 0))
    nll, entropy = -logprob[supervised], entropy[supervised]
    weight, ratio = p["entropy_coef"], p["token_ratio"]
    loss = light_if.entropy_sft_loss(nll, entropy, weight, ratio, p.get("num_items_in_batch"))
    found = {
        "nll": nll,
        "entropy": entropy,
        "delta": nll - weight * entropy,
        "selected_indices": light_if.entropy_sft_tokens(nll, entropy, weight, ratio),
        "loss": loss,
    }
    return Replay(found, {"logits": gradient(loss, logits)})


def _tea(case: Case) -> Replay:
    logprob, entropy, p = case.leaf("log_prob"), case.leaf("entropy"), case.params
    mask = torch.arange(logprob.shape[1])[None] < case.ids("lengths")[:, None]
    weight = light_if.tea_weights(logprob, case.tensor("advantage"), mask, p["cov_alpha"], p["clip_cov_ub"])
    agg = {"token-mean": "token_mean", "seq-mean-token-sum": "sequence_mean_of_token_sum",
           "seq-mean-token-mean": "sequence_mean_of_token_mean"}  # fmt: skip
    term = reduce(entropy * weight, mask, agg[p.get("agg", "token-mean")])  # type: ignore[arg-type]
    grads = {"log_prob": gradient(-term, logprob), "entropy": gradient(-term, entropy)}
    return Replay({"weights": weight, "entropy_term": term, "mean_weight": masked_mean(weight, mask)}, grads)


def _length(case: Case) -> Replay:
    p = case.params
    reward = light_if.length_reward(
        case.tensor("length"),
        case.tensor("correct_score"),
        limit=p["max_length"],
        threshold=p["threshold"],
        right=p["rc_0"],
        wrong=(p["rw_0"], p["rw_L"]),
        exceeded=p["r_exceed"],
    )
    return Replay({"reward": reward})


RULES = [
    Rule("light_if", {"logits", "labels"}, {"nll", "delta", "loss"}, _sft, params={"entropy_coef", "token_ratio"}),
    Rule("light_if", {"log_prob", "entropy", "advantage", "lengths"}, {"weights", "entropy_term"}, _tea,
         params={"cov_alpha", "clip_cov_ub"}),
    Rule("light_if", {"length", "correct_score"}, {"reward"}, _length, params={"max_length", "threshold"}),
]  # fmt: skip
