"""What a test-time method reports: tokens and accuracy beside the same model without it, with intervals.

All intervals are 95 % percentile bootstrap intervals over problems. Problems are drawn with both of their results, so
that what makes a problem hard for both cancels in a difference (paired).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.statistics import bootstrap_interval
from ..errors import UserError

DRAWS = 2000


class Interval(NamedTuple):
    """A figure with the ends of its interval; all nan where it is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "undefined" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool | None:
        """Whether all of the interval lies on one side of 0; None where it is undefined."""
        return None if math.isnan(self.value) else self.low > 0 or self.high < 0


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def mean_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Mean over problems; undefined without a problem."""
    x: NDArray[np.float64] = np.asarray(values, dtype=float)
    if not len(x):
        return UNDEFINED
    return Interval(float(x.mean()), *bootstrap_interval(x, np.random.default_rng(seed), draws=DRAWS))


def saving_interval(used: ArrayLike, baseline: ArrayLike, seed: int = 0) -> Interval:
    """Share saved, 1 - sum(used) / sum(baseline), over problems drawn with both figures; negative where more is used.

    It is the ratio of sums, so that long responses count for their length. Undefined where the baseline uses nothing.
    Raises ValueError where the two differ in length.
    """
    x, y = (np.asarray(values, dtype=float) for values in (used, baseline))
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} figures against {len(y)} of the baseline")
    if not y.sum() > 0:
        return UNDEFINED
    index = np.random.default_rng(seed).integers(0, len(x), (DRAWS, len(x)))
    sums, below = x[index].sum(1), y[index].sum(1)
    shares = 1 - sums[below > 0] / below[below > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return Interval(float(1 - x.sum() / y.sum()), float(low), float(high))


@dataclass(frozen=True)
class Report:
    """Results per problem, in the order of the problems; `str` of it is a small table.

    Tokens and correctness are numbers, so that means over several responses to a problem fit as well. `correct` and
    `baseline_correct` are None where nothing was verified. `extra_tokens` are those that the method read or wrote
    outside its response, and that the baseline did not need: a second prefill, answers tried on the way. `notes` are
    further columns by name, such as the strategy or the step at which the method stopped.
    Raises UserError for no problem, and for columns of unequal length.
    """

    method: str
    problem: Sequence[str]
    text: Sequence[str]
    tokens: Sequence[float]
    baseline_tokens: Sequence[float]
    correct: Sequence[float] | None = None
    baseline_correct: Sequence[float] | None = None
    extra_tokens: Sequence[float] | None = None
    notes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seed: int = 0
    """Of the bootstrap draws."""

    def __post_init__(self) -> None:
        if not len(self.problem):
            raise UserError("problems is empty: a report needs at least one problem")
        for name, column in self._columns().items():
            if len(column) != len(self.problem):
                raise UserError(f"column '{name}' has {len(column)} entries for {len(self.problem)} problems")

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def tokens_saved(self) -> Interval:
        """Share of the baseline's generated tokens that the method saves; see `saving_interval`."""
        return saving_interval(self.tokens, self.baseline_tokens, self.seed)

    @property
    def tokens_saved_net(self) -> Interval:
        """The same with `extra_tokens` counted as used."""
        extra = np.zeros(len(self)) if self.extra_tokens is None else np.asarray(self.extra_tokens, dtype=float)
        return saving_interval(np.asarray(self.tokens, dtype=float) + extra, self.baseline_tokens, self.seed)

    @property
    def accuracy(self) -> Interval:
        """Mean correctness with the method; undefined where nothing was verified."""
        return UNDEFINED if self.correct is None else mean_interval(self.correct, self.seed)

    @property
    def baseline_accuracy(self) -> Interval:
        """Mean correctness without the method."""
        return UNDEFINED if self.baseline_correct is None else mean_interval(self.baseline_correct, self.seed)

    @property
    def accuracy_change(self) -> Interval:
        """Accuracy with the method minus without, paired over problems."""
        if self.correct is None or self.baseline_correct is None:
            return UNDEFINED
        difference = np.asarray(self.correct, dtype=float) - np.asarray(self.baseline_correct, dtype=float)
        return mean_interval(difference, self.seed)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping of plain values per problem."""
        columns = self._columns()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Figures, intervals and rows as plain values for JSON; undefined figures are None."""
        names = ("tokens_saved", "tokens_saved_net", "accuracy", "baseline_accuracy", "accuracy_change")
        found = {name: getattr(self, name)._asdict() for name in names}
        figures = {name: {k: None if math.isnan(v) else v for k, v in each.items()} for name, each in found.items()}
        return {"method": self.method, "problems": len(self), **figures, "rows": self.rows()}

    def __str__(self) -> str:
        lines = [
            f"{self.method}, {len(self)} problems; 95 % intervals over problems, paired",
            f"{'':<16}{'method':>10}{'baseline':>10}   difference",
            f"{'accuracy':<16}{_number(self.accuracy.value, 3)}{_number(self.baseline_accuracy.value, 3)}"
            f"   {self.accuracy_change}",
            f"{'tokens a problem':<16}{_number(float(np.mean(self.tokens)), 1)}"
            f"{_number(float(np.mean(self.baseline_tokens)), 1)}   saved {self.tokens_saved}",
        ]
        if self.extra_tokens is not None and any(self.extra_tokens):
            lines.append(
                f"{'  and beside it':<16}{_number(float(np.mean(self.extra_tokens)), 1)}{'':>10}"
                f"   saved {self.tokens_saved_net} with these"
            )
        return "\n".join(lines)

    def _columns(self) -> dict[str, Sequence[Any]]:
        names = (
            "problem", "text", "tokens", "baseline_tokens", "correct", "baseline_correct", "extra_tokens",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return own | dict(self.notes)


def _number(value: float, digits: int) -> str:
    return f"{'-' if math.isnan(value) else format(value, f'.{digits}f'):>10}"
