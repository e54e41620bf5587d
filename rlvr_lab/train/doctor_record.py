"""What the doctor works with: the log of a run as arrays, trends in it, and a finding.

A *window* is a fifth of the steps, at least three: "early" and "late" are means over the first and the last one. A
difference counts only beyond twice its standard error, so that step noise is no trend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Severity = Literal["note", "warning", "critical"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """One thing the log shows. `likelihood` (0 to 1) orders findings; it is a score, not a calibrated probability."""

    fault: str
    severity: Severity
    likelihood: float
    title: str
    cause: str
    evidence: tuple[str, ...]
    steps: tuple[int, int]
    setting: str
    """Dotted key as `rlvr-lab train` takes it."""
    suggestion: str
    """Value to give it, written as on the command line."""
    advice: str = ""
    """What to do beside, or instead of, that setting."""
    plots: tuple[tuple[str, ...], ...] = ()
    """Groups of columns to draw together."""
    explained_by: tuple[str, ...] = ()
    """Faults that would bring this one about: where one of them is found, this is a consequence."""
    follows_from: str | None = None


@dataclass(frozen=True)
class History:
    """The log of one run as arrays over steps; what was not logged is nan, never 0."""

    steps: NDArray[np.int64]
    columns: Mapping[str, Array]
    evaluations: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, name: str) -> Array:
        """One value per step, all nan where the column is missing."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def has(self, *names: str) -> bool:
        """Whether each of these was measured at least three times."""
        return all(int(np.isfinite(self.column(name)).sum()) >= 3 for name in names)

    @property
    def accuracy(self) -> str:
        """The column that says how often the policy is right; older logs have the reward only."""
        return "accuracy" if self.has("accuracy") else "reward"

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A setting of the run, `default` where it is not written down."""
        tree: Any = self.settings
        for part in dotted.split("."):
            if not isinstance(tree, Mapping) or part not in tree:
                return default
            tree = tree[part]
        return default if tree is None else tree

    def number(self, dotted: str, default: float) -> float:
        """A setting as a number."""
        value = self.setting(dotted, default)
        return float(value) if isinstance(value, int | float) else default

    def has_method(self, *slugs: str) -> bool:
        """Whether one of these methods is part of the composition."""
        methods = self.setting("methods", {})
        return any(slug in methods for slug in slugs) if isinstance(methods, Mapping) else False

    def span(self, half: bool = False) -> tuple[int, int]:
        """First and last step of the log, or of its second half, over which levels are taken."""
        return int(self.steps[len(self) // 2 if half else 0]), int(self.steps[-1])


@dataclass(frozen=True)
class Trend:
    """Early and late mean of a series, and the standard error of their difference."""

    early: float
    late: float
    error: float

    @property
    def change(self) -> float:
        """Late minus early."""
        return self.late - self.early

    @property
    def clear(self) -> bool:
        """Whether the change is more than step noise."""
        return abs(self.change) > 2 * self.error

    def rose(self, least: float = 0.0) -> bool:
        """Clearly, and by more than `least`."""
        return self.clear and self.change > least

    def fell(self, least: float = 0.0) -> bool:
        """Clearly, and by more than `least`."""
        return self.clear and -self.change > least


def window(count: int) -> int:
    """Steps in the early and in the late window: a fifth, at least three, at most half."""
    return max(1, min(max(3, count // 5), count // 2))


def trend(values: Array) -> Trend:
    """Early and late window of the steps at which the series was measured; all nan where fewer than six were."""
    known = values[np.isfinite(values)]
    if len(known) < 6:
        return Trend(math.nan, math.nan, math.nan)
    n = window(len(known))
    first, last = known[:n], known[-n:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / n)
    return Trend(float(first.mean()), float(last.mean()), error)


def latest(change: Trend, values: Array, steps: int = 3) -> Trend:
    """The trend with the mean of the last few measured steps as its end, where that is higher; the error is kept."""
    known = values[np.isfinite(values)]
    return replace(change, late=max(change.late, float(known[-steps:].mean()))) if len(known) >= steps else change


def smooth(values: Array, width: int = 3) -> Array:
    """Running mean over the measured steps; the series itself where it is shorter than the width."""
    known = values[np.isfinite(values)]
    return np.convolve(known, np.ones(width) / width, "valid") if len(known) >= width else known


def late_half(values: Array) -> float:
    """Median over the second half of the measured steps; nan where none was measured."""
    known = values[np.isfinite(values)]
    return float(np.median(known[len(known) // 2 :])) if len(known) else math.nan


def mean_of(values: Array) -> float:
    """Mean over what was measured; nan where nothing was."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def score(value: float, low: float, high: float) -> float:
    """0.5 where a value reaches its threshold `low`, 0.9 at `high`, logarithmic between, at most 0.97."""
    if not (value > 0 and math.isfinite(value)):
        return 0.5
    return float(np.clip(0.5 + 0.4 * math.log(value / low) / math.log(high / low), 0.3, 0.97))


def graded(value: float, high: float) -> Severity:
    """A warning, or critical from `high` on."""
    return "critical" if value >= high else "warning"


def show(value: float) -> str:
    """A number for people: three significant digits; what was not measured says so."""
    return "not measured" if math.isnan(value) else f"{value:.3g}"


def arrow(name: str, change: Trend) -> str:
    """`name 0.18 -> 0.02`."""
    return f"{name} {show(change.early)} -> {show(change.late)}"


def one_digit(value: float) -> str:
    """A setting's value with one significant digit, as YAML reads it."""
    text = f"{value:.0e}"
    return text if "e-" in text and value < 1e-3 else f"{float(text):g}"
