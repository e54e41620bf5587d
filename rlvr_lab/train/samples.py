"""Transcripts of a run: what `samples.jsonl` holds, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.rollout import Rollout
from ..policy.load import Policy


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds; joined, they are the text of the whole.

    Tokens are not decoded alone, because a tokenizer may drop a leading blank or cut a character into several tokens.
    A token that ends inside a character adds nothing, and the one that completes it adds the character.
    """
    texts: list[str] = []
    start = done = 0  # decode from `start`; tokens before `done` are told
    for i in range(len(ids)):
        before, now = decode(list(ids[start:done])), decode(list(ids[start : i + 1]))
        if now.endswith("\ufffd") and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, i + 1
    return texts


def sample_rows(rollout: Rollout, problems: Sequence[Any], policy: Policy, count: int) -> list[dict[str, Any]]:
    """Responses of a graded rollout as rows for `samples.jsonl`: `count` of them, evenly spread over the prompts.

    Per token: its text, its id, its log-prob when it was sampled (nats, at the sampling temperature), and the entropy
    (nats) of the distribution it was drawn from; both None for a token that an environment said, which `token_told`
    marks where there is one.
    """
    assert rollout.correct is not None
    assert rollout.answer is not None
    entropy = rollout.statistics["token_entropy"]
    chosen = torch.linspace(0, len(rollout) - 1, min(count, len(rollout))).long().tolist()
    rows = []
    for i in chosen:
        length = int(rollout.lengths[i])
        ids = rollout.response_ids[i, :length].tolist()
        told = (~rollout.action_mask[i, :length]).tolist()
        rows.append(
            {
                "problem": str(problems[int(rollout.prompt_id[i])]),
                "response": policy.decode(ids),
                "correct": bool(rollout.correct[i]),
                "answer": rollout.answer[i],
                "reward": None if rollout.reward is None else float(rollout.reward[i]),
                "finished": bool(rollout.finished[i]),
                "tokens": token_texts(ids, policy.decode),
                "token_ids": ids,
                "token_logprob": _short(rollout.behaviour_logprob[i, :length], told),
                "token_entropy": _short(entropy[i, :length], told),
                **({"token_told": told} if any(told) else {}),
            }
        )
    return rows


def _short(values: torch.Tensor, told: Sequence[bool]) -> list[float | None]:
    """Six significant digits: what float32 holds."""
    return [None if t else float(f"{value:.6g}") for value, t in zip(values.float().tolist(), told, strict=True)]
