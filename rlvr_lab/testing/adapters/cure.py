"""Replays cure.json: candidate positions, the position chosen under a seed, and where the branch then starts."""

from __future__ import annotations

from typing import Any

import torch

from ...core.rollout import pad
from ...core.trees import pick
from ...methods.cure import CURE, CUREConfig, window_cut
from ..golden import Case, Replay, Rule


class _Permutations:
    """The code's random order: every row's permutation is drawn before any position is."""

    def __init__(self, rows: int, width: int, generator: torch.Generator) -> None:
        self.rows = [torch.randperm(width, generator=generator).tolist() for _ in range(rows)]

    def entropy(self, row: int) -> list[float]:
        """Numbers that fall along the permutation of a row."""
        place = {position: i for i, position in enumerate(self.rows[row])}
        return [-float(place[position]) for position in range(len(place))]


def _branches(case: Case) -> Replay:
    p, responses, prompts = case.params, case.inputs["responses"], case.inputs["prompts"]
    special, text, fill = set(p["special_ids"]), p["vocab_text"], p["pad_token_id"]
    least = int(p.get("min_chars", 2))
    generator = torch.Generator().manual_seed(p["seed"])
    entropy = case.inputs.get("entropy")
    if p.get("mode", "entropy") == "random":
        drawn = _Permutations(len(responses), len(responses[0]), generator)
        entropy = [drawn.entropy(row) for row in range(len(responses))]

    def accept(token: int) -> bool:
        return token not in special and len(text[token].strip()) >= least

    method = CURE(CUREConfig(top_k=p["top_k"], window=len(prompts[0])))
    found = [method.candidates(ids, h, accept, generator) for ids, h in zip(responses, entropy or (), strict=True)]
    chosen = [pick(row, generator) for row in found]
    starts = []
    for prompt, response, position in zip(prompts, responses, chosen, strict=True):
        own = [token for token in prompt if token != fill]
        cut, kept = window_cut(own, response[:position], method.config.window)
        starts.append(cut + response[:kept])
    width = len(prompts[0])
    ids, mask = _padded(starts, fill, width), _padded([[1] * len(s) for s in starts], 0, width)
    return Replay(
        {
            "candidates_by_descending_entropy": found,
            "candidates": found,
            "selected_index": chosen,
            "key_token_mask": [
                [int(i == position and bool(row)) for i in range(len(response))]
                for response, position, row in zip(responses, chosen, found, strict=True)
            ],
            "branch_prompts": ids,
            "branch_attention_mask": mask,
            "branch_position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        }
    )


def _padded(rows: list[Any], value: int, width: int) -> torch.Tensor:
    full = pad(rows, value, torch.long, left=True)
    return torch.nn.functional.pad(full, (width - full.shape[1], 0), value=value)


RULES = [
    Rule("cure", {"responses", "prompts"}, {"selected_index", "branch_prompts"}, _branches,
         params={"top_k", "vocab_text", "special_ids", "pad_token_id", "seed"}),
]  # fmt: skip
