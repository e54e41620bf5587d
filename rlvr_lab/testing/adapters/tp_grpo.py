"""Replays tp_grpo.json: thoughts, their process rewards, and the advantage of every token, as a return and closed."""

from __future__ import annotations

from typing import Any

import torch

from ...core.rollout import pad
from ...methods import tp_grpo as tp
from ..golden import Case, Replay, Rule


def _advantage(case: Case) -> Replay:
    p, lengths = case.params, case.inputs["step_token_lengths"]
    correct = case.tensor("outcome_reward") > 0
    group = torch.zeros(len(correct), dtype=torch.long)
    std: Any = "sample" if p.get("std_ddof", 1) else "population"
    outcome = tp.outcome_advantage(correct, group, p["eps"], std, case.dtype)
    scale = tp.ability_scale(correct, group, p["alpha"], case.dtype)
    rows = [
        [*labels, int(right)] for labels, right in zip(case.inputs["think_step_labels"], correct.tolist(), strict=True)
    ]
    spread = [[x for x, n in zip(row, steps, strict=True) for _ in range(n)] for row, steps in _pairs(rows, lengths)]
    label = pad(spread, 0.0, case.dtype)
    mask = torch.arange(label.shape[1])[None] < torch.tensor([len(row) for row in spread])[:, None]
    returns = tp.returns_to_go(label, label, mask, correct, outcome, scale)
    closed = tp.thought_advantage(label, correct, outcome, scale)
    torch.testing.assert_close(returns, closed.masked_fill(~mask, 0.0), rtol=0, atol=1e-12)
    rewards = tp.process_rewards(label, tp.run_ends(label, mask), correct, outcome, scale)
    ends = tp.run_ends(label, mask)
    return Replay(
        {
            "normalised_outcome": outcome,
            "acc": correct.to(case.dtype).mean(),
            "r_c": scale[0],
            "thoughts": [_thoughts(row) for row in rows],
            "thought_process_reward": [reward[end] for reward, end in zip(rewards, ends, strict=True)],
            "token_advantage": [row[keep] for row, keep in zip(returns, mask, strict=True)],
        }
    )


def _pairs(rows: list[list[int]], lengths: list[list[int]]) -> Any:
    return zip(rows, lengths, strict=True)


def _thoughts(labels: list[int]) -> list[list[int]]:
    """Runs of equal step labels as [first, behind last, label]."""
    row = torch.tensor([labels])
    ends = (tp.run_ends(row, torch.ones_like(row).bool())[0].nonzero().squeeze(1) + 1).tolist()
    return [[start, end, labels[start]] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


RULES = [
    Rule("tp_grpo", {"outcome_reward", "step_token_lengths", "think_step_labels"}, {"token_advantage"}, _advantage,
         params={"alpha"}),
]  # fmt: skip
