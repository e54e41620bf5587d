"""Verdicts on sampled responses: the only place where a rollout meets a task's verifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.rollout import Rollout
from ..policy.load import Policy
from ..tasks.base import Task


def response_texts(rollout: Rollout, policy: Policy) -> list[str]:
    """Each response as text, special tokens kept."""
    rows = zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)
    return [policy.decode(ids[:length]) for ids, length in rows]


def grade(rollout: Rollout, task: Task[Any], problems: Sequence[Any], policy: Policy) -> Rollout:
    """Fill `correct`, `answer` and the reward component `correct` (0 or 1). `prompt_id` indexes `problems`."""
    texts = response_texts(rollout, policy)
    verdicts = [
        task.grade(problems[i], text, finished)
        for i, text, finished in zip(rollout.prompt_id.tolist(), texts, rollout.finished.tolist(), strict=True)
    ]
    correct = torch.tensor([v.correct for v in verdicts], device=rollout.response_ids.device)
    components = {**rollout.reward_components, "correct": correct.float()}
    answers = tuple(v.answer for v in verdicts)
    return rollout.with_(correct=correct, answer=answers, reward_components=components)
