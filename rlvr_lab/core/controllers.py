"""Coefficients that react to a measured quantity between optimizer steps, with state for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class SignStepController:
    """A coefficient that moves by a fixed step towards holding a measured quantity above its target.

        c <- clip(c + step, minimum, maximum)   where the measured value is low, else clip(c - step, ...)
        applied coefficient = c while the last measured value was low, else 0

    "Low" means below the target (`strict`), or below or equal. Skywork-OR1 (arXiv 2505.22312, SkyworkAI/Skywork-OR1
    `EntController`): strict, and the gate is open before the first measurement. TRL (huggingface/trl grpo_trainer):
    not strict, and the gate is closed at first. In both, `update` comes after the policy update, so that coefficient
    and gate act on the next step. A caller that measures before the update calls `gate` first: then the gate acts on
    the step that was measured. Where nothing was measured (nan), nothing changes.
    """

    def __init__(
        self,
        target: float,
        step: float,
        minimum: float = 0.0,
        maximum: float = math.inf,
        initial: float = 0.0,
        strict: bool = True,
        open_at_start: bool = True,
    ) -> None:
        if step < 0 or minimum > maximum:
            raise ValueError(f"a controller needs step >= 0 and minimum <= maximum, not {step}, {minimum}, {maximum}")
        self.target, self.step, self.strict = target, step, strict
        self.minimum, self.maximum = minimum, maximum
        self.value = initial
        self.enabled = open_at_start

    @property
    def coefficient(self) -> float:
        """What applies now: the value behind the gate."""
        return self.value if self.enabled else 0.0

    def is_low(self, measured: float) -> bool:
        """Whether the measured value asks for more."""
        return measured < self.target if self.strict else measured <= self.target

    def gate(self, measured: float) -> None:
        """Open the gate where the measured value is low, close it elsewhere; the value stays."""
        if not math.isnan(measured):
            self.enabled = self.is_low(measured)

    def update(self, measured: float) -> None:
        """Move the value by one step, and set the gate."""
        if math.isnan(measured):
            return
        self.gate(measured)
        moved = self.value + self.step if self.enabled else self.value - self.step
        self.value = min(max(moved, self.minimum), self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """Value and gate."""
        return {"value": self.value, "enabled": self.enabled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved value and gate."""
        self.value, self.enabled = float(state["value"]), bool(state["enabled"])
