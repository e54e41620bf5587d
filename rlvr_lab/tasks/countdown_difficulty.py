"""How hard a Countdown problem is, without asking any model."""

from __future__ import annotations

import numpy as np

from .countdown import SLOTS, Problem, random_chains


def chance(problem: Problem, rng: np.random.Generator, draws: int = 4000) -> float:
    """Share of `draws` random chains of legal steps that end at the target; the rarer, the harder.

    Its standard error is sqrt(p (1 - p) / draws): 0.004 at p = 0.06, the median problem. Raises ValueError for no draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    row = np.zeros(SLOTS, dtype=np.int64)
    row[SLOTS - len(problem.numbers) :] = problem.numbers
    chains = random_chains(np.tile(row, (draws, 1)), np.full(draws, len(problem.numbers)), rng)
    return float((chains.result == problem.target).mean())
