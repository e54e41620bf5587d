"""Semantic clusters of sampled answers, made where a rollout meets its task, and without the task's labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.rollout import Rollout
from ..policy.load import Policy
from ..tasks.base import Task
from ..tasks.clusters import Clusterer, cluster_ids
from .grading import response_texts


def with_clusters(
    rollout: Rollout,
    task: Task[Any],
    problems: Sequence[Any],
    policy: Policy,
    clusterer: Clusterer,
    refuse_copies: bool = False,
) -> Rollout:
    """Fill `cluster_id` from what `task.read` finds in the responses. Of a problem only `question` is read, if it has
    one; rows are taken in the order of their texts, so that clusters do not depend on how the rows arrived."""
    texts = response_texts(rollout, policy)
    answers = [task.read(text, ended) for text, ended in zip(texts, rollout.finished.tolist(), strict=True)]
    rows: dict[int, list[int]] = {}
    for i, group in enumerate(rollout.group_id.tolist()):
        rows.setdefault(group, []).append(i)
    found = [0] * len(rollout)
    for places in rows.values():
        places = sorted(places, key=lambda i: texts[i])
        question = str(getattr(problems[int(rollout.prompt_id[places[0]])], "question", ""))
        ids = cluster_ids([answers[i] for i in places], clusterer, question, refuse_copies)
        for place, number in zip(places, ids, strict=True):
            found[place] = number
    return rollout.with_(cluster_id=torch.tensor(found, device=rollout.response_ids.device))
