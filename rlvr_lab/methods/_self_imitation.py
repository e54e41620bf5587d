"""The life cycle of a policy's own successes: stored, judged again by what is usual now, replayed, dropped (SPEAR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.groups import group_moments
from ..core.replay import ReplayBuffer, StepHistory
from ..core.rollout import Rollout
from ..core.rows import tool_calls

Schedule = Literal["when_full", "continuous", "never"]
OLDEST = 10
"""No response is replayed that is more steps older than this, whatever `tolerance` says."""


def recalibrated(reward_B: Tensor, mean: float, std: float | None = None, eps: float = 1e-6) -> Tensor:
    """A~ [B]: reward minus the median of group means, divided by that of group stds where given (the code's option,
    which explodes where it is 0)."""
    return reward_B - mean if std is None else (reward_B - mean) / (std + eps)


def draw_size(candidates: int, most: int) -> int:
    """The largest power of two that is no more than the candidates, at most `most`; none for a single candidate."""
    return min(1 << (candidates.bit_length() - 1), most) if candidates > 1 else 0


@dataclass
class SelfImitation:
    """D (`buffer`) and D_R (`means`, and `stds` of the same groups). In one step: `draw`, then `store`.

    `size` and `fill` decide when to draw (`schedule: when_full`) and how much; `weight_decay` takes the stored
    advantages times that factor in place of recalibrated ones.
    """

    size: int
    history: int
    tolerance: int
    schedule: Schedule = "when_full"
    fill: float = 1.5
    weight_decay: float | None = None
    std: bool = False
    needs_call: bool = False
    store_zero: bool = False
    buffer: ReplayBuffer = field(init=False)
    means: StepHistory = field(init=False)
    stds: StepHistory = field(init=False)
    uncalled: bool = field(init=False, default=False)
    """Whether the last step's successes were all without a tool call and `needs_call` left them out."""

    def __post_init__(self) -> None:
        self.buffer = ReplayBuffer(self.size if self.schedule == "continuous" else None)
        self.means, self.stds = StepHistory(self.history), StepHistory(self.history)
        self._groups: list[tuple[list[float], list[float]]] = []

    def note(self, reward_B: Tensor, group_id_B: Tensor) -> None:
        """Groups of this step for D_R, before any filter drops one; `store` takes them up."""
        mean, std, _ = group_moments(reward_B, group_id_B)
        self._groups.append((mean.tolist(), std.tolist()))

    def baseline(self) -> float:
        """P50(D_R); without a history the mean of the stored rewards."""
        return self.means.median() if len(self.means) else float(self.buffer.reward.mean())

    def draw(self, generator: torch.Generator) -> tuple[Rollout, Tensor, Tensor] | None:
        """Responses to replay, their advantage [n, T] and the steps that stored them [n]; None where it is not time, or
        where fewer than two have a positive advantage. A full buffer is emptied either way."""
        if self.schedule == "never" or not len(self.buffer):
            return None
        countable = len(self.buffer) if self.weight_decay else int((self.buffer.reward > self.baseline()).sum())
        if self.schedule == "when_full" and countable <= self.fill * self.size:
            return None
        advantage = self._advantage()
        candidates = (advantage.sum(1) > 0).nonzero().squeeze(1)
        index = self.buffer.sample(draw_size(len(candidates), self.size), generator, candidates)
        drawn = None
        if len(index):
            rows, _, steps = self.buffer.take(index)
            drawn = rows, advantage[index, : rows.response_ids.shape[1]], steps
        if self.schedule == "when_full":
            self.buffer.clear()
        return drawn

    def _advantage(self) -> Tensor:
        """Of every stored response, the same on all of its actions [N, T]."""
        if self.weight_decay:
            return self.weight_decay * self.buffer.advantage
        value = recalibrated(self.buffer.reward, self.baseline(), self.stds.median() if self.std else None)
        assert self.buffer.rollout is not None
        return value[:, None] * self.buffer.rollout.mask

    def store(self, rollout: Rollout, advantage_BT: Tensor, step: int) -> None:
        """Drop old responses, then add the group means to D_R and the successes to D."""
        self.buffer.evict(min(self.tolerance, OLDEST))
        if not self._groups:
            self.note(rollout.require("reward", by="replay"), rollout.group_id)
        for history, kind in ((self.means, 0), (self.stds, 1)):
            history.add([value for groups in self._groups for value in groups[kind]])
        self._groups = []
        if self.schedule == "never":
            return
        advantage = advantage_BT.masked_fill(~rollout.mask, 0.0)
        value = advantage.sum(1)
        good = (value >= 0 if self.store_zero else value > 0) & rollout.mask.any(1)
        kept = good & (tool_calls(rollout) > 0) if self.needs_call else good
        self.uncalled = bool(good.any()) and not bool(kept.any())
        rows = kept.nonzero().squeeze(1)
        successes = rollout.rows(rows)
        self.buffer.add(successes, advantage[rows, : successes.response_ids.shape[1]], step)

    def state_dict(self) -> dict[str, Any]:
        """Both histories, and the buffer under names of its own."""
        stored = {f"buffer.{key}": value for key, value in self.buffer.state_dict().items()}
        return {"means": self.means.state(), "stds": self.stds.state(), **stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's state."""
        self.means.load(state["means"])
        self.stds.load(state["stds"])
        inner = {key.removeprefix("buffer."): value for key, value in state.items() if key.startswith("buffer.")}
        self.buffer.load_state_dict(inner)
