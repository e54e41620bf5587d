"""Sampling temperature that follows the entropy of the distribution it is applied to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TemperatureRule:
    """Temperature of every token, relative to the sampler's, as a function of log H: linear between knots, constant
    outside them.

    H is the entropy in nats of the token's own distribution at the sampler's temperature, before the rule acts. Two
    knots at one place are a step: below and at it the first factor, above it the second. Plain numbers, so that an
    engine in another process can be told.
    Raises ValueError for no knot, for lists of different length, knots out of order, or a factor that is not positive.
    """

    log_entropy: tuple[float, ...]
    factor: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.log_entropy or len(self.log_entropy) != len(self.factor):
            raise ValueError(f"{len(self.log_entropy)} knots with {len(self.factor)} factors")
        if not all(math.isfinite(x) for x in self.log_entropy) or list(self.log_entropy) != sorted(self.log_entropy):
            raise ValueError(f"knots must be finite and in order, not {self.log_entropy}")
        if not all(0 < x < math.inf for x in self.factor):
            raise ValueError(f"factors of a temperature must be positive and finite, not {self.factor}")

    def factors(self, entropy: Tensor) -> Tensor:
        """Factors of the temperature for entropies of any shape."""
        # rounding may leave a little less than 0; the log as whoever set the knots took it, so that a step stays a step
        place = entropy.clamp_min(0.0).log().double()
        lists = (self.log_entropy, self.factor)
        knots, values = (torch.tensor(x, dtype=torch.float64, device=place.device) for x in lists)
        if len(knots) == 1:
            return torch.full_like(entropy, self.factor[0])
        above = torch.searchsorted(knots, place.contiguous()).clamp(1, len(knots) - 1)
        left, right = knots[above - 1], knots[above]
        width = right - left
        share = torch.where(width > 0, (place - left) / width.clamp_min(1e-300), (place > left).double()).clamp(0, 1)
        return torch.lerp(values[above - 1], values[above], share).to(entropy.dtype)
