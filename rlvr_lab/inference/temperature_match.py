"""The control of whatever moves entropy at test time: plain sampling at the temperature with the same mean entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import UserError


def match_temperature(
    entropy_at: Callable[[float], float], target: float, tolerance: float = 0.01, rounds: int = 24
) -> float:
    """Temperature in [0.05, 5] at which `entropy_at` gives `target` up to the share `tolerance`, by bisection of its
    logarithm.

    `entropy_at` should rise with temperature; on samples it does so only roughly, and then one of its crossings is
    found. Raises UserError where the target lies outside.
    """
    low = high = 1.0
    while entropy_at(high) < target:
        low, high = high, high * 1.5
        if low > 5:
            raise UserError(f"no temperature up to 5 gives a mean entropy of {target:.3f}; steer with a smaller lr")
    while entropy_at(low) > target:
        high, low = low, low / 1.5
        if high < 0.05:
            raise UserError(f"no temperature down to 0.05 gives a mean entropy of {target:.4f}")
    middle = math.sqrt(low * high)
    for _ in range(rounds):
        gap = entropy_at(middle) - target
        if abs(gap) <= tolerance * max(target, 1e-9):
            break
        low, high = (low, middle) if gap > 0 else (middle, high)
        middle = math.sqrt(low * high)
    return middle


def final_entropy(entropy: Sequence[float]) -> float:
    """Mean over the last quarter of a response's tokens, at least one; nan without tokens."""
    return mean(entropy[-max(1, len(entropy) // 4) :])


def pooled_entropy(entropies: Sequence[Sequence[float]]) -> float:
    """Mean over all tokens of all responses; nan without tokens."""
    return mean([value for row in entropies for value in row])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if len(values) else math.nan
