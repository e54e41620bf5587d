"""Replays ettrl.json: fork positions, vote, reshaped advantages, size and cost of a tree."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.advantages import group_advantage
from ...core.entropy import cluster, softmax_entropy
from ...core.paths import Path, Piece, to_rollout
from ...core.trees import Fork, expected_ratio, token_counts
from ...methods import ettrl
from ..golden import Case, Replay, Rule


def _vote(case: Case) -> Replay:
    p, mask, answers = case.params, case.mask("mask"), case.inputs["answers"]
    entropy = softmax_entropy(case.tensor("logits")).masked_fill(~mask, 0.0)
    ids = torch.tensor([-1 if number is None else number for number in cluster(answers)])
    group = torch.zeros_like(ids)
    won = ettrl.majority(ids, group)
    reward = won.to(entropy)
    h = ettrl.response_entropy(entropy, mask)
    y = ettrl.confidence_weight(h, group, p.get("y_min"))
    std: Any = "sample" if p.get("std_ddof", 1) else "population"
    advantage = group_advantage(reward, group, std, p["eps"])
    method = ettrl.ETTRL(ettrl.ETTRLConfig(forks=p["N_forks"]))
    lengths = mask.sum(1).tolist()
    beta = p["beta_clip"]

    def spread(value: torch.Tensor) -> torch.Tensor:
        return (value[:, None] * mask).to(value)

    return Replay(
        {
            "token_entropy": entropy,
            "fork_positions_desc_entropy": [
                method.positions(row[:n]) for row, n in zip(entropy.tolist(), lengths, strict=True)
            ],
            "pseudo_label": next((a for a, w in zip(answers, won.tolist(), strict=True) if w), None),
            "majority_ratio": float(ettrl.majority_ratio(ids, group)[0]),
            "rewards": reward,
            "H_resp": h,
            "mean_H_resp": float(h.mean()),
            "Y": y,
            "A_grpo": advantage,
            "A_res": spread(y * advantage),
            "A_clip": spread(advantage.clamp(-beta, beta)),
        }
    )


def _size(case: Case) -> Replay:
    p = case.params
    config = ettrl.ETTRLConfig(trees=p["M"], forks=p["N"], branches=p["B"])
    return Replay({"total_rollouts": config.leaves, "expected_token_ratio": expected_ratio(p["N"], p["B"])})


def _sampled(length: int) -> Piece:
    return Piece([1] * length, [0.0] * length, [1.0] * length)


def _cost(case: Case) -> Replay:
    paths: list[Path] = []
    rows = (case.inputs[name] for name in ("root_lengths", "fork_positions", "new_tokens_per_branch"))
    for length, positions, new in zip(*rows, strict=True):
        root = Path(0, 0, 0, len(paths), [1])
        root.add(_sampled(length))
        paths.append(root)
        each = math.ceil(len(new) / max(len(positions), 1))
        for i, tokens in enumerate(new):
            branch = Fork(root, positions[i // each], tokens).begin(len(paths))
            branch.add(_sampled(tokens))
            paths.append(branch)
    counts = token_counts(to_rollout(paths, pad_id=0, version=0))
    return Replay(
        {
            "generated_tokens": counts.generated,
            "tokens_if_sampled_independently": counts.independent,
            "ratio": counts.ratio,
            "n_leaves": len(paths),
        }
    )


RULES = [
    Rule("ettrl", {"logits", "mask", "answers"}, {"Y", "A_res", "A_clip"}, _vote, params={"N_forks", "beta_clip"}),
    Rule("ettrl", set(), {"total_rollouts", "expected_token_ratio"}, _size, params={"M", "N", "B"}),
    Rule("ettrl", {"root_lengths", "fork_positions", "new_tokens_per_branch"}, {"generated_tokens"}, _cost),
]  # fmt: skip
