"""A contest as plain data for the widget that swaps arms (`show.widgets.ArmSwap`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .analysis import ACCURACY, blocks, early_stopped, matched
from .arms import REFERENCE
from .results import Results, Vector, short

DISTINCT, DIGITS = "distinct_correct", 4
BLOCK = 5
"""Steps of training that are one point of a curve."""
Curve = dict[str, list[float | None]]


def arm_curves(results: Results, passes: str = "pass@32") -> list[dict[str, Any]]:
    """Every arm with its curves by step, its path over pass@1, and its evaluations beside early-stopped GRPO.

    The reference's path is the curve that it would be stopped on. Undefined figures are None.
    """
    return [_arm(results, name, passes) for name in results.arms]


def _arm(results: Results, name: str, passes: str) -> dict[str, Any]:
    arm = results.arms[name]
    curves = {
        "reward": _curve(*blocks(results, name, "reward", BLOCK)),
        "token entropy": _curve(*blocks(results, name, "token_entropy", BLOCK)),
        passes: _curve(*results.series(name, passes, "evaluations")),
        "distinct correct": _curve(*results.series(name, DISTINCT, "evaluations")),
    }
    steps, accuracy, _ = results.series(name, ACCURACY, "evaluations")
    _, distinct, _ = results.series(name, DISTINCT, "evaluations")
    path = early_stopped(results, DISTINCT) if name == REFERENCE else (accuracy, distinct, np.full(len(steps), np.nan))
    rows = zip(steps, accuracy, distinct, strict=True)
    return {
        "name": name,
        "role": arm.role,
        "of": arm.control_of,
        "note": arm.note or " ".join(arm.settings),
        "curves": curves,
        "frontier": _curve(*path),
        "evaluations": [_evaluation(results, name, int(step), a, d) | _at(curves, step) for step, a, d in rows],
    }


def _evaluation(results: Results, name: str, step: int, accuracy: float, distinct: float) -> dict[str, Any]:
    match = matched(results, name, DISTINCT, step=step)
    return {
        "step": step,
        "accuracy": short(float(accuracy), DIGITS),
        "distinct": short(float(distinct), DIGITS),
        "gap": short(float(match.mean), DIGITS),
        "half": short(float(match.half), DIGITS),
        "beyond": match.beyond,
        "seeds": len(match.per_seed),
    }


def _at(curves: dict[str, Curve], step: float) -> dict[str, float | None]:
    """Each curve's value at a step, for the mark on it."""
    return {title: short(float(np.interp(step, *_known(curve))), DIGITS) for title, curve in curves.items()}


def _known(curve: Curve) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if x is not None and y is not None]
    return [x for x, _ in pairs] or [0.0], [y for _, y in pairs] or [math.nan]


def _curve(x: Vector, y: Vector, half: Vector) -> Curve:
    return {name: [short(float(v), DIGITS) for v in values] for name, values in (("x", x), ("y", y), ("half", half))}
