"""What a contest says: every arm against its controls, at matched steps and at matched accuracy.

Most interventions slow down the trade of diversity against accuracy, and at their last step they stand where GRPO
stood earlier. So an arm is compared with *early-stopped GRPO*: GRPO of the same seed, read off its own evaluations at
the arm's pass@1. Only what lies above that curve is a gain of diversity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..core.statistics import seed_interval
from .arms import REFERENCE
from .results import Results, Row, Vector, numbers

ACCURACY = "pass@1"


@dataclass(frozen=True)
class Match:
    """An arm minus early-stopped GRPO at equal pass@1, over seeds: mean and 95 % half-width.

    `per_seed` has None where GRPO of that seed never reaches the arm's pass@1; `beyond` counts them.
    """

    mean: float
    half: float
    per_seed: tuple[float | None, ...]

    @property
    def beyond(self) -> int:
        """Seeds without a match."""
        return sum(value is None for value in self.per_seed)

    @property
    def leaves_curve(self) -> bool | None:
        """Whether the interval lies above 0; None where it is undefined."""
        return None if math.isnan(self.half) else bool(self.mean - self.half > 0)


def matched(results: Results, arm: str, metric: str, reference: str = REFERENCE) -> Match:
    """The arm's last evaluation minus the reference's own curve at the same pass@1, seed by seed."""
    found: list[float | None] = []
    for seed in results.seeds(arm):
        end = results.rows(arm, seed, "evaluations")[-1]
        curve = results.rows(reference, seed, "evaluations") if seed in results.seeds(reference) else []
        there = at_accuracy(curve, end[ACCURACY], metric)
        found.append(None if there is None else numbers([end], metric)[0] - there)
    return Match(*seed_interval([value for value in found if value is not None]), tuple(found))


def at_accuracy(curve: Sequence[Row], accuracy: float, metric: str) -> float | None:
    """A run's figure where its pass@1 first reaches `accuracy`, linear between evaluations; None where it never does.

    Below the first evaluation's pass@1 the first figure stands: no less trained policy is known. nan where it reaches
    `accuracy` and the figure is undefined there.
    """
    if not curve:
        return None
    figures = numbers(curve, metric)
    if accuracy <= curve[0][ACCURACY]:
        return figures[0]
    for (before, after), (first, second) in zip(pairwise(curve), pairwise(figures), strict=True):
        low, high = before[ACCURACY], after[ACCURACY]
        if low < accuracy <= high:
            return first + (accuracy - low) / (high - low) * (second - first)
    return None


def all_at_accuracy(results: Results, accuracy: float, metric: str) -> dict[str, tuple[float, float, int]]:
    """Every arm at one pass@1: mean and half-width over the seeds that reach it, and how many do."""
    table = {}
    for arm in results.arms:
        values = [
            value
            for seed in results.seeds(arm)
            if (value := at_accuracy(results.rows(arm, seed, "evaluations"), accuracy, metric)) is not None
        ]
        table[arm] = (*seed_interval(values), len(values))
    return table


def difference(results: Results, arm: str, other: str, metric: str) -> tuple[float, float]:
    """The arm minus another at the last evaluation, paired over their common seeds: mean and 95 % half-width.

    nan where a figure is undefined.
    """
    common = sorted(set(results.seeds(arm)) & set(results.seeds(other)))
    ends = [numbers([results.rows(n, seed, "evaluations")[-1] for n in (arm, other)], metric) for seed in common]
    return seed_interval([a - b for a, b in ends])


def step_cost(results: Results, arm: str, reference: str = REFERENCE) -> tuple[float, float]:
    """Median seconds of a step over the reference's of the same seed: mean and 95 % half-width over seeds.

    It holds for the machine that the contest ran on, and for as many runs beside each other as there were.
    """
    return _relative(results, arm, reference, lambda rows: float(np.median(numbers(rows, "seconds"))))


def token_cost(results: Results, arm: str, reference: str = REFERENCE) -> tuple[float, float]:
    """Generated tokens of a step over the reference's of the same seed: mean and 95 % half-width over seeds."""
    return _relative(results, arm, reference, lambda rows: rows[-1]["tokens"] / len(rows))


def _relative(results: Results, arm: str, reference: str, cost: Callable[[list[Row]], float]) -> tuple[float, float]:
    runs = [
        [results.rows(name, seed) for name in (arm, reference)]
        for seed in sorted(set(results.seeds(arm)) & set(results.seeds(reference)))
    ]
    return seed_interval([cost(own) / cost(other) for own, other in runs if own and other])


def blocks(results: Results, arm: str, metric: str, width: int) -> tuple[Vector, Vector, Vector]:
    """Training metric as means of `width` steps: first step of each block, mean and 95 % half-width over seeds.

    Means are formed within a seed first, so that the interval is that of the mean. Only blocks that every seed has.
    """
    runs = [numbers(results.rows(arm, seed), metric) for seed in results.seeds(arm)]
    whole = min((len(run) // width for run in runs), default=0)
    means = [[float(np.mean(run[i * width : (i + 1) * width])) for run in runs] for i in range(whole)]
    spread = [seed_interval(values) for values in means]
    return np.arange(whole) * float(width), np.array([m for m, _ in spread]), np.array([h for _, h in spread])


def early_stopped(
    results: Results, metric: str, points: int = 40, reference: str = REFERENCE
) -> tuple[Vector, Vector, Vector]:
    """The reference's curve over pass@1: accuracies that all its seeds reach, mean and 95 % half-width over seeds."""
    curves = [results.rows(reference, seed, "evaluations") for seed in results.seeds(reference)]
    low = max((curve[0][ACCURACY] for curve in curves), default=0.0)
    high = min((max(row[ACCURACY] for row in curve) for curve in curves), default=0.0)
    if low >= high:
        empty: Vector = np.array([])
        return empty, empty, empty
    grid = np.linspace(low, high, points)
    spread = [seed_interval([at for c in curves if (at := at_accuracy(c, x, metric)) is not None]) for x in grid]
    return grid, np.array([m for m, _ in spread]), np.array([h for _, h in spread])


def held(results: Results, arm: str, target: float, last: int = 20) -> tuple[float, float]:
    """Relative deviation from a target of the training entropy over the last steps: mean and half-width over seeds."""
    deviations = []
    for seed in results.seeds(arm):
        tail = results.rows(arm, seed)[-last:]
        deviations.append(float(np.mean([row["token_entropy"] for row in tail])) / target - 1)
    return seed_interval(deviations)
