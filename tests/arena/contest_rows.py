"""Results of a contest written by hand: three arms, figures that can be checked on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlvr_lab.arena import CATALOGUE, Arm, Results

Curve = Sequence[tuple[int, float, float]]
"""Step, pass@1 and distinct correct answers."""

CURVES: dict[str, dict[int, Curve]] = {
    "grpo": {
        0: [(0, 0.2, 2.0), (5, 0.3, 1.8), (10, 0.5, 1.0)],
        1: [(0, 0.2, 2.2), (5, 0.4, 1.6), (10, 0.6, 1.2)],
        2: [(0, 0.2, 2.1), (5, 0.3, 1.9), (10, 0.4, 1.4)],
    },
    # seed 2 ends above what grpo of that seed reaches
    "kl_cov": {
        0: [(0, 0.2, 2.0), (10, 0.4, 1.9)],
        1: [(0, 0.2, 2.2), (10, 0.5, 1.7)],
        2: [(0, 0.2, 2.1), (10, 0.5, 1.8)],
    },
    "kl_cov_random": {
        0: [(0, 0.2, 2.0), (10, 0.3, 1.7)],
        1: [(0, 0.2, 2.2), (10, 0.4, 1.6)],
        2: [(0, 0.2, 2.1), (10, 0.3, 1.8)],
    },
}
SECONDS = {"grpo": 2.0, "kl_cov": 3.0, "kl_cov_random": 2.0}


def contest(**changes: Any) -> dict[str, Any]:
    """Conditions of a results file."""
    machine = {"system": "Linux", "processor": "p", "threads": 1, "gpu": None, "torch": "2.13.0", "date": "2026-11-26"}
    return {
        "recipe": "arena/tiny",
        "settings": ["steps=10"],
        "budget_tokens": None,
        "steps": 10,
        "evaluation": {"problems": 8, "samples": 4, "temperature": 1.0},
        "seeds": [0, 1, 2],
        "digests": {"grpo": "aa", "kl_cov": "bb"},
        "machines": {f"{arm} seed {seed}": machine for arm in SECONDS for seed in range(3)},
    } | changes


def results(curves: Mapping[str, Mapping[int, Curve]] = CURVES, **changes: Any) -> Results:
    """A contest with these held-out curves and ten steps of training per run."""
    arms = {name: CATALOGUE[name] if name in CATALOGUE else Arm(name) for name in curves}
    seeds = sorted({seed for by_seed in curves.values() for seed in by_seed})
    steps = [
        {"arm": arm, "seed": seed, "step": step, "tokens": 100 * (step + 1), "reward": 0.1 * seed + 0.01 * step,
         "token_entropy": 0.2 - 0.01 * step, "mean_tokens": 20.0, "seconds": SECONDS.get(arm, 2.0) + 0.1 * seed}
        for arm, by_seed in curves.items() for seed in by_seed for step in range(10)
    ]  # fmt: skip
    evaluations = [
        {"arm": arm, "seed": seed, "step": step, "tokens": 100 * step, "pass@1": accuracy, "pass@4": accuracy + 0.2,
         "distinct_correct": distinct, "token_entropy": 0.2 - 0.01 * step, "mean_tokens": 20.0}
        for arm, by_seed in curves.items() for seed, curve in by_seed.items() for step, accuracy, distinct in curve
    ]  # fmt: skip
    stopped = changes.pop("stopped", {})
    return Results(contest(seeds=seeds) | changes, arms, steps, evaluations, stopped)
