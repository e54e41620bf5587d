"""One minibatch's loss without a model: the plain reference of what train/update.py sums over micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.reduce import reduce
from ..core.rollout import Rollout
from ..methods.base import LossInputs, Pipeline


def record(mask_BT: Tensor, old_logprob_BT: Tensor, **fields: Any) -> Rollout:
    """A rollout around recorded tensors. Rows are numbered as prompts, so that they have one canonical order; each is
    a group of its own unless `group_id` says otherwise.
    """
    b, t = mask_BT.shape
    given = {
        "prompt_id": torch.arange(b),
        "group_id": torch.arange(b),
        "finished": torch.ones(b, dtype=torch.bool),
        "policy_version": torch.zeros(b, dtype=torch.long),
        "prompt_ids": torch.ones(b, 1, dtype=torch.long),
        "prompt_mask": torch.ones(b, 1, dtype=torch.bool),
        "response_ids": torch.ones(b, t, dtype=torch.long),
        "response_mask": mask_BT,
        "action_mask": mask_BT.clone(),
        "behaviour_logprob": old_logprob_BT.clone(),
        "behaviour_temperature": torch.ones_like(old_logprob_BT),
        "old_logprob": old_logprob_BT,
    }
    return Rollout(**(given | fields))


def minibatch_loss(
    pipeline: Pipeline,
    batch: Rollout,
    logprob_BT: Tensor,
    advantage_BT: Tensor,
    entropy_BT: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weighted surrogate plus regularisers, reduced as the composition asks. `logprob_BT` and `entropy_BT` carry
    gradient; without a `generator` random choices use seed 0.
    """
    current = {"current_logprob": logprob_BT.detach()}
    if entropy_BT is not None:
        current["current_entropy"] = entropy_BT.detach()
    batch = batch.with_statistics(**current)
    batch = pipeline.prepare(batch, advantage_BT, generator or torch.Generator().manual_seed(0))
    lower, upper = pipeline.clip(batch, advantage_BT)
    old = batch.require("old_logprob", by="minibatch_loss")
    inputs = LossInputs(batch, logprob_BT, old, advantage_BT, lower, upper, entropy_BT)
    values = pipeline.surrogate(inputs).loss
    for weight in pipeline.weights(batch, advantage_BT).values():
        values = values * weight
    reduction, constant = pipeline.reduction
    loss = reduce(values, batch.mask, reduction, constant)
    for term in pipeline.regularise(inputs):
        loss = loss + reduce(term.loss, batch.mask, term.reduction or reduction, constant)
    return loss
