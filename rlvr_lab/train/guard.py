"""Which minibatches are left out: those that are not finite, and those whose gradient is far larger than usual."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 64
ENOUGH = 8  # applied minibatches before a norm can be called unusual


@dataclass
class Guard:
    """Settings of `optimizer.guard`, and the gradient norms of the last minibatches applied."""

    skip_nonfinite: bool = False
    spike_factor: float | None = None
    stop_after: int = 5
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    in_a_row: int = 0

    @property
    def active(self) -> bool:
        """Whether any minibatch could be left out."""
        return self.skip_nonfinite or self.spike_factor is not None

    @property
    def exhausted(self) -> bool:
        """Whether too many minibatches in a row were left out."""
        return self.in_a_row >= self.stop_after

    def spike(self, norm: float) -> str | None:
        """Why a finite gradient norm is too large, None where it is not."""
        if self.spike_factor is None or len(self.norms) < ENOUGH:
            return None
        usual = statistics.median(self.norms)
        if not norm > self.spike_factor * usual:
            return None
        return f"gradient norm {norm:.4g} is above {self.spike_factor:g} times the median {usual:.4g} of the last ones"

    def applied(self, norm: float) -> None:
        """Remember a minibatch that was applied."""
        self.in_a_row = 0
        if self.spike_factor is not None and math.isfinite(norm):
            self.norms.append(norm)

    def skipped(self) -> None:
        """Count one that was left out."""
        self.in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty where nothing is guarded."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row} if self.active else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self.norms, self.in_a_row = deque(state["norms"], maxlen=WINDOW), int(state["in_a_row"])
