"""Methods that exist only for tests: one for every hook, simple enough to know the result by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlvr_lab.core.losses import Surrogate, clipped_surrogate
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods.base import LossInputs, Method


class Reinforce(Method):
    """Takes over all that GRPO owns: the advantage is the raw reward, nothing is clipped."""

    slug = "reinforce"
    requires = ("reward",)
    reduction = "sequence_mean_of_token_sum"

    def advantage(self, rollout: Rollout) -> Tensor:
        reward = rollout.require("reward", by=self.slug)
        return reward[:, None].expand(rollout.response_ids.shape)

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(0.0), torch.tensor(1e9)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        return clipped_surrogate(inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper)


class PlainBonus(Method):
    """Subtracts `coefficient` times the token entropy."""

    slug = "plain_bonus"
    needs_entropy = True

    def __init__(self, coefficient: float = 0.5) -> None:
        self.coefficient = coefficient

    def regularise(self, inputs: LossInputs) -> Tensor:
        assert inputs.entropy is not None
        return -self.coefficient * inputs.entropy


class TopEntropyOnly(Method):
    """Keeps the half of a minibatch's tokens with the highest entropy: a choice that spans the minibatch."""

    slug = "top_entropy_only"
    requires = ("token_entropy",)

    def weight(self, rollout: Rollout, advantage_BT: Tensor) -> Tensor:
        entropy = rollout.require("token_entropy", by=self.slug)
        return (entropy >= entropy[rollout.mask].median()).float()


class LengthBonus(Method):
    """Adds a reward for every token."""

    slug = "length_bonus"

    def __init__(self, per_token: float = 0.1) -> None:
        self.per_token = per_token

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"length": self.per_token * rollout.lengths.float()}


class WordBonus(Method):
    """A reward that depends on the words alone, so that hardly any two responses get the same."""

    slug = "word_bonus"

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"words": ((rollout.response_ids % 7) * rollout.mask).sum(1) / rollout.lengths.clamp_min(1)}


class Watcher(Method):
    """Keeps a number and a tensor that a checkpoint must restore."""

    slug = "watcher"

    def __init__(self) -> None:
        self.seen = 0
        self.mean_tokens = torch.zeros(1)

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.seen += 1
        self.mean_tokens = 0.5 * self.mean_tokens + 0.5 * metrics["mean_tokens"]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean_tokens": self.mean_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.mean_tokens = int(state["seen"]), state["mean_tokens"]


class NeedsBundles(Method):
    """Requires a field that no engine provides."""

    slug = "needs_bundles"
    requires = ("bundle_id",)
