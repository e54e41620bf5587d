"""Random choices over a whole rollout that do not depend on how its rows arrived, and that a checkpoint carries on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.rollout import Rollout
from ..core.rows import canonical_order
from .base import Method

APART = 1_000_003


class StepDraws:
    """Numbers that depend on a seed and on how many steps were made. Asked twice within a step it answers the same."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0

    def generator(self) -> torch.Generator:
        """A new CPU generator for the present step."""
        return torch.Generator().manual_seed(self.seed * APART + self.step)

    def per_response(self, rollout: Rollout) -> Tensor:
        """One uniform number [B] per response, dealt in the order of the rows' content."""
        numbers = torch.rand(len(rollout), generator=self.generator()).to(rollout.response_ids.device)
        dealt = torch.empty_like(numbers)
        dealt[canonical_order(rollout)] = numbers
        return dealt

    def permutation(self, n: int) -> Tensor:
        """A random permutation [n] on the CPU."""
        return torch.randperm(n, generator=self.generator())

    def state_dict(self) -> dict[str, Any]:
        """The number of steps made."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.step = int(state["step"])


class DrawingMethod(Method):
    """A method with random choices of its own: its constructor sets `draws`, and steps made stand in the checkpoint."""

    draws: StepDraws

    def observe(self, metrics: Mapping[str, float]) -> None:
        """The next step draws anew."""
        self.draws.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, which the draws depend on."""
        return self.draws.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.draws.load_state_dict(state)
