"""Small statistics that charts and model cards share: intervals over problems and over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal one is close enough
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], rng: np.random.Generator, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over units that are independent (problems, not samples).

    Raises ValueError for no value. One value gives a point, which says that the spread is unknown, not that it is 0.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        raise ValueError("an interval needs at least one value")
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % Student-t interval over seeds; the half-width of fewer than two is nan."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else float("nan"), float("nan")
    t = _T95[len(x) - 2] if len(x) - 2 < len(_T95) else 1.96
    return float(x.mean()), float(t * x.std(ddof=1) / np.sqrt(len(x)))
