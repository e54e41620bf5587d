"""A store of past responses, and a record of how well recent groups did: tensors, numbers and strings only.

Nothing is recomputed when a response is replayed: log-probs, masks, reward and advantage are those of the step that
stored it, so that the importance ratio to the present policy stays what it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .rollout import Rollout
from .rows import concatenate

COMPONENTS = "reward_components"
STATISTICS = "statistics"


class ReplayBuffer:
    """Responses in the order in which they were stored, on the CPU, padded to the longest of them.

    `capacity`: most responses held, the oldest go first; None for no limit.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget every response."""
        self.rollout: Rollout | None = None
        self.advantage = torch.zeros(0, 1)
        """As stored [N, T]."""
        self.step = torch.zeros(0, dtype=torch.long)
        """Step that stored each response [N], never falling."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def reward(self) -> Tensor:
        """Rewards as stored [N]."""
        return torch.zeros(0) if self.rollout is None else self.rollout.require("reward", by="a replay buffer")

    def ages(self, step: int) -> Tensor:
        """Steps since each response was stored [N]."""
        return step - self.step

    def add(self, rollout: Rollout, advantage_BT: Tensor, step: int) -> None:
        """Store all rows, behind those that are there; what exceeds the capacity is dropped from the front, so that of
        a batch larger than the capacity the last rows stay.

        Raises ValueError for an advantage of another shape, and for a step before the newest one.
        """
        if advantage_BT.shape != rollout.response_ids.shape:
            expected = tuple(rollout.response_ids.shape)
            raise ValueError(f"advantage has shape {tuple(advantage_BT.shape)}, expected {expected}")
        if len(self) and step < int(self.step[-1]):
            raise ValueError(f"step {step} lies before step {int(self.step[-1])}, which is stored already")
        if not len(rollout):
            return
        new = _trimmed(rollout.to("cpu"), torch.arange(len(rollout)))
        width = new.response_ids.shape[1]
        advantage = advantage_BT.detach().cpu()[:, :width].clone()
        if self.rollout is not None:
            new = concatenate([self.rollout, new])
            width = new.response_ids.shape[1]
            advantage = torch.cat([_widened(self.advantage, width), _widened(advantage, width)])
        self.rollout, self.advantage = new, advantage
        self.step = torch.cat([self.step, torch.full((len(rollout),), step)])
        if self.capacity is not None and len(self) > self.capacity:
            self._keep(torch.arange(len(self) - self.capacity, len(self)))

    def evict(self, tolerance: int) -> int:
        """Drop what was stored more than `tolerance` steps before the newest stored response; returns how many."""
        if not len(self):
            return 0
        young = (self.step[-1] - self.step <= tolerance).nonzero().squeeze(1)
        dropped = len(self) - len(young)
        if dropped:
            self._keep(young)
        return dropped

    def sample(self, number: int, generator: torch.Generator, among: Tensor | None = None) -> Tensor:
        """Indices [n] of `number` responses drawn without replacement from `among` (indices, by default all).

        Where there are fewer, all of them: a buffer smaller than a batch gives what it has. Draws one `randperm`.
        """
        pool = torch.arange(len(self)) if among is None else among.cpu()
        return pool[torch.randperm(len(pool), generator=generator)[:number]]

    def take(self, index: Tensor) -> tuple[Rollout, Tensor, Tensor]:
        """The responses `index` with their stored advantage [n, t] and step [n]. Raises ValueError for no index."""
        if self.rollout is None or not len(index):
            raise ValueError("no response to take from the replay buffer")
        rows = _trimmed(self.rollout, index)
        return rows, self.advantage[index, : rows.response_ids.shape[1]], self.step[index]

    def _keep(self, index: Tensor) -> None:
        if not len(index):
            self.clear()
        else:
            self.rollout, self.advantage, self.step = self.take(index)

    def state_dict(self) -> dict[str, Any]:
        """Flat: tensors, numbers, and lists of strings. Nothing for an empty buffer."""
        if self.rollout is None:
            return {}
        own = {"advantage": self.advantage.clone(), "step": self.step.clone()}
        return own | {f"rollout.{name}": value for name, value in rollout_state(self.rollout).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises UserError where it is none or its parts do not fit together."""
        self.clear()
        if not state:
            return
        inner = {key.removeprefix("rollout."): value for key, value in state.items() if key.startswith("rollout.")}
        try:
            rollout, advantage, step = rollout_from_state(inner), state["advantage"], state["step"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's replay buffer cannot be read: {error}") from error
        if advantage.shape != rollout.response_ids.shape or step.shape != rollout.prompt_id.shape:
            raise UserError(
                "the checkpoint's replay buffer cannot be read: advantage, step and responses differ in shape"
            )
        self.rollout, self.advantage, self.step = rollout, advantage, step
        if self.capacity is not None and len(self) > self.capacity:
            self._keep(torch.arange(len(self) - self.capacity, len(self)))


def _trimmed(rollout: Rollout, index: Tensor) -> Rollout:
    """Rows without the columns that are padding in all of them, on either side."""
    rows = rollout.rows(index)
    used = rows.prompt_mask.any(0).nonzero()
    first = int(used[0]) if len(used) else 0
    return rows.with_(prompt_ids=rows.prompt_ids[:, first:], prompt_mask=rows.prompt_mask[:, first:])


def _widened(values_BT: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values_BT, (0, width - values_BT.shape[1]))


def rollout_state(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a flat mapping for a checkpoint; absent fields are left out, an unread answer is an empty list."""
    state: dict[str, Any] = {}
    for f in fields(Rollout):
        value = getattr(rollout, f.name)
        if isinstance(value, Mapping):
            state |= {f"{f.name}.{key}": tensor.clone() for key, tensor in value.items()}
        elif isinstance(value, Tensor):
            state[f.name] = value.clone()
        elif isinstance(value, tuple):
            state[f.name] = [[] if text is None else [text] for text in value]
        elif value is not None:
            state[f.name] = value
    return state


def rollout_from_state(state: Mapping[str, Any]) -> Rollout:
    """The other way round. Raises TypeError or ValueError where fields are missing, unknown or do not fit."""
    found: dict[str, Any] = {COMPONENTS: {}, STATISTICS: {}}
    for key, value in state.items():
        group, _, name = key.partition(".")
        if name and group in (COMPONENTS, STATISTICS):
            found[group][name] = value
        elif key == "answer":
            found[key] = tuple(entry[0] if entry else None for entry in value)
        else:
            found[key] = value
    return Rollout(**found)


class StepHistory:
    """Numbers of recent steps, such as the mean reward of each group, first in, first out by whole steps.

    Before a step is added, whole oldest steps go while more than `capacity` numbers are held; so it may hold up to one
    step more than that.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.steps: list[list[float]] = []

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def add(self, values: Sequence[float]) -> None:
        """Append the numbers of one step; undefined ones are left out."""
        while self.steps and len(self) > self.capacity:
            self.steps.pop(0)
        self.steps.append([float(value) for value in values if math.isfinite(value)])

    def median(self) -> float:
        """Median of all numbers, between two of them half-way (linear interpolation); nan where there is none."""
        held = [value for step in self.steps for value in step]
        return statistics.median(held) if held else math.nan

    def state(self) -> list[list[float]]:
        """The numbers by step, for a checkpoint."""
        return [list(step) for step in self.steps]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Take up a checkpoint's numbers."""
        self.steps = [[float(value) for value in step] for step in state]
