"""What a contest says: every arm against its controls, at matched steps and at matched accuracy.

Most interventions slow down the trade of diversity against accuracy, and at their last step they stand where GRPO
stood earlier. So an arm is compared with *early-stopped GRPO*: GRPO of the same seed, read off its own evaluations at
the arm's pass@1. Only what lies above that curve is a gain of diversity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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


def matched(results: Results, arm: str, metric: str, reference: str = REFERENCE, *, step: int | None = None) -> Match:
    """The arm's last evaluation minus the reference's own curve at the same pass@1, seed by seed.

    `step` takes the last evaluation up to that step instead.
    """
    found: list[float | None] = []
    for seed in results.seeds(arm):
        rows = results.rows(arm, seed, "evaluations")
        end = rows[-1] if step is None else [row for row in rows if row["step"] <= step][-1]
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
            return first + float((accuracy - low) / (high - low)) * (second - first)
    return None


def all_at_accuracy(results: Results, accuracy: float, metric: str) -> dict[str, tuple[float, float, int]]:
    """Every arm at one pass@1: mean and half-width over the seeds that reach it, and how many do.

    All are read at the steps at which all were evaluated: a curve with more points is found higher and sooner.
    """
    steps = _common_steps(results, results.arms)
    table = {}
    for arm in results.arms:
        curves = [_at_steps(results.rows(arm, seed, "evaluations"), steps) for seed in results.seeds(arm)]
        values = [value for curve in curves if (value := at_accuracy(curve, accuracy, metric)) is not None]
        table[arm] = (*seed_interval(values), len(values))
    return table


def between_curves(results: Results, arm: str, metric: str, reference: str = REFERENCE, levels: int = 20) -> Match:
    """The arm's whole curve over pass@1 minus the reference's, both read where they first reach a pass@1.

    Mean over the accuracies that both reach, seed by seed, at the steps at which both were evaluated: either may be
    stopped anywhere. None for a seed in which no accuracy above the start is reached by both.
    """
    steps = _common_steps(results, (arm, reference))
    found: list[float | None] = []
    for seed in results.seeds(arm):
        own = _at_steps(results.rows(arm, seed, "evaluations"), steps)
        other = results.rows(reference, seed, "evaluations") if seed in results.seeds(reference) else []
        found.append(_mean_gap(own, _at_steps(other, steps), metric, levels))
    return Match(*seed_interval([value for value in found if value is not None]), tuple(found))


def _mean_gap(curve: Sequence[Row], other: Sequence[Row], metric: str, levels: int) -> float | None:
    if not curve or not other:
        return None
    low = max(rows[0][ACCURACY] for rows in (curve, other))
    high = min(max(row[ACCURACY] for row in rows) for rows in (curve, other))
    if low >= high:
        return None
    read = [[at_accuracy(rows, float(x), metric) for rows in (curve, other)] for x in np.linspace(low, high, levels)]
    return float(np.mean([a - b for a, b in read if a is not None and b is not None]))


def _common_steps(results: Results, arms: Iterable[str]) -> set[int]:
    """Steps after which every run of these arms was evaluated, as far as it went."""
    runs = [{r["step"] for r in results.rows(arm, seed, "evaluations")} for arm in arms for seed in results.seeds(arm)]
    last = max((max(run) for run in runs), default=0)
    whole = [run for run in runs if max(run) == last]
    return set.intersection(*whole) if whole else set()


def _at_steps(rows: Sequence[Row], steps: set[int]) -> list[Row]:
    return [row for row in rows if row["step"] in steps]


def difference(results: Results, arm: str, other: str, metric: str) -> tuple[float, float]:
    """The arm minus another at the last evaluation, paired over their common seeds: mean and 95 % half-width.

    nan where a figure is undefined.
    """
    common = sorted(set(results.seeds(arm)) & set(results.seeds(other)))
    ends = [numbers([results.rows(n, seed, "evaluations")[-1] for n in (arm, other)], metric) for seed in common]
    return seed_interval([a - b for a, b in ends])


def step_cost(results: Results, arm: str, reference: str = REFERENCE) -> tuple[float, float]:
    """Median seconds of a step over the reference's of the same seed: mean and 95 % half-width over seeds.

    Seeds for which the two runs were on different machines are left out. It holds for that machine, and for as many
    runs beside each other as there were.
    """
    seeds = [seed for seed in results.seeds(arm) if _machine(results, arm, seed) == _machine(results, reference, seed)]
    return _relative(results, arm, reference, lambda rows: float(np.median(numbers(rows, "seconds"))), seeds)


def _machine(results: Results, arm: str, seed: int) -> list[Any]:
    found = results.contest["machines"].get(f"{arm} seed {seed}", {})
    return [found.get(key) for key in ("system", "processor", "threads", "gpu", "python", "torch")]


def token_cost(results: Results, arm: str, reference: str = REFERENCE) -> tuple[float, float]:
    """Generated tokens of a step over the reference's of the same seed: mean and 95 % half-width over seeds."""
    return _relative(results, arm, reference, lambda rows: rows[-1]["tokens"] / len(rows), results.seeds(arm))


def _relative(
    results: Results, arm: str, reference: str, cost: Callable[[list[Row]], float], seeds: Sequence[int]
) -> tuple[float, float]:
    common = [seed for seed in seeds if seed in results.seeds(reference)]
    runs = [[results.rows(name, seed) for name in (arm, reference)] for seed in common]
    return seed_interval([cost(own) / cost(other) for own, other in runs if own and other])


def blocks(results: Results, arm: str, metric: str, width: int) -> tuple[Vector, Vector, Vector]:
    """Training metric as means of `width` steps: middle of each block, mean and 95 % half-width over seeds.

    Means are formed within a seed first, so that the interval is that of the mean. Only blocks that every seed has.
    """
    runs = [numbers(results.rows(arm, seed), metric) for seed in results.seeds(arm)]
    whole = min((len(run) // width for run in runs), default=0)
    means = [[float(np.mean(run[i * width : (i + 1) * width])) for run in runs] for i in range(whole)]
    spread = [seed_interval(values) for values in means]
    middles = np.array([i * width + (width - 1) / 2 for i in range(whole)])
    return middles, np.array([m for m, _ in spread]), np.array([h for _, h in spread])


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
    grid = np.array([float(x) for x in np.linspace(low, high, points)])
    spread = [
        seed_interval([at for c in curves if (at := at_accuracy(c, x, metric)) is not None]) for x in grid.tolist()
    ]
    return grid, np.array([m for m, _ in spread]), np.array([h for _, h in spread])


def held(
    results: Results, arm: str, target: float, metric: str = "token_entropy", last: int = 20
) -> tuple[float, float]:
    """Relative deviation of a training metric's mean over the last steps from a target: mean and half-width over seeds.

    A method that draws extra responses at another temperature logs the entropy of its own, to be named here."""
    deviations = []
    for seed in results.seeds(arm):
        tail = results.rows(arm, seed)[-last:]
        deviations.append(float(np.mean([row[metric] for row in tail])) / target - 1)
    return seed_interval(deviations)
