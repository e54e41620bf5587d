"""The results file of a contest: what ran, and two tidy tables, one row per arm, seed and step.

JSON with each table by columns, which is a quarter of the size; numbers carry five significant digits. `steps` has the
training metrics, `evaluations` the held-out figures; step 0 of the latter is the policy before training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.statistics import seed_interval
from ..errors import UserError, nearest
from .arms import REFERENCE, Arm

FORMAT = 1
DIGITS = 5
Row = dict[str, Any]
Table = Literal["steps", "evaluations"]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """A contest that was run. `contest`: recipe, settings, seeds, date, machine, digests of the method modules.

    `stopped`: what ended a run early, by `ARM seed N`.
    """

    contest: dict[str, Any]
    arms: dict[str, Arm]
    steps: list[Row]
    evaluations: list[Row]
    stopped: dict[str, str]

    def seeds(self, arm: str) -> list[int]:
        """Seeds of an arm that were run to the end."""
        return sorted({row["seed"] for row in self._of(arm, "evaluations")})

    def rows(self, arm: str, seed: int, table: Table = "steps") -> list[Row]:
        """Rows of one run in order of steps."""
        return sorted((r for r in self._of(arm, table) if r["seed"] == seed), key=lambda row: row["step"])

    def series(self, arm: str, metric: str, table: Table = "steps", x: str = "step") -> tuple[Vector, Vector, Vector]:
        """`x`, mean and 95 % half-width over seeds, at the steps that every seed has. `x` may be `tokens`.

        Where seeds differ in `x`, its mean is given. Raises UserError for a metric that the table lacks.
        """
        by_step: dict[int, list[Row]] = {}
        for row in self._of(arm, table):
            by_step.setdefault(row["step"], []).append(row)
        full = max((len(rows) for rows in by_step.values()), default=0)
        kept = {step: rows for step, rows in sorted(by_step.items()) if len(rows) == full}
        at = np.array([np.mean([r[x] for r in rows]) for rows in kept.values()])
        spread = [seed_interval(numbers(rows, metric)) for rows in kept.values()]
        return at, np.array([m for m, _ in spread]), np.array([h for _, h in spread])

    def final(self, arm: str, metric: str) -> list[float]:
        """The last evaluation's figure of every seed, in order of seeds."""
        return numbers([self.rows(arm, seed, "evaluations")[-1] for seed in self.seeds(arm)], metric)

    def interval(self, arm: str, metric: str) -> tuple[float, float]:
        """Mean and 95 % half-width over seeds of `final`."""
        return seed_interval(self.final(arm, metric))

    def base(self, metric: str) -> float:
        """The policy before training, mean over the reference's seeds."""
        first = [self.rows(REFERENCE, seed, "evaluations")[0] for seed in self.seeds(REFERENCE)]
        return float(np.mean(numbers(first, metric)))

    def controls(self, arm: str) -> list[str]:
        """Names of an arm's own controls."""
        return [name for name, other in self.arms.items() if other.control_of == arm]

    def _of(self, arm: str, table: Table) -> list[Row]:
        if arm not in self.arms:
            raise UserError(f"these results have no arm '{arm}'; {nearest(arm, self.arms)}")
        return self._by_arm[table, arm]

    @cached_property
    def _by_arm(self) -> dict[tuple[Table, str], list[Row]]:
        """Rows of each arm: a page reads them some thousand times."""
        found: dict[tuple[Table, str], list[Row]] = {}
        tables: dict[Table, list[Row]] = {"steps": self.steps, "evaluations": self.evaluations}
        for table, rows in tables.items():
            found |= {(table, arm): [] for arm in self.arms}
            for row in rows:
                found.setdefault((table, row["arm"]), []).append(row)
        return found


def numbers(rows: Sequence[Row], metric: str) -> list[float]:
    """One column; nan where the figure is undefined. Raises UserError for a metric that a row lacks."""
    for row in rows:
        if metric not in row:
            raise UserError(f"these results have no '{metric}'; {nearest(metric, row)}")
    return [float("nan") if row[metric] is None else float(row[metric]) for row in rows]


def save_results(path: Path, results: Results) -> None:
    """Write the file atomically."""
    record = {
        "format": FORMAT,
        "contest": results.contest,
        "arms": [arm.as_dict() for arm in results.arms.values()],
        "steps": _columns(results.steps),
        "evaluations": _columns(results.evaluations),
        "stopped": results.stopped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def load_results(path: Path | str) -> Results:
    """Read a file of `save_results`. Raises UserError where it is missing, cut off or of another format."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; `rlvr-lab arena --out FOLDER` writes one") from None
    except ValueError:
        raise UserError(f"{path} is not a results file of the arena, or was cut off") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not a results file of this arena (format {FORMAT})")
    try:
        arms = {arm["name"]: Arm.from_dict(arm) for arm in record["arms"]}
        steps, evaluations = (_rows(record[table]) for table in ("steps", "evaluations"))
        return Results(record["contest"], arms, steps, evaluations, record["stopped"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: it lacks parts of a results file of the arena") from None


def merge(parts: Iterable[Results]) -> Results:
    """Contests of the same settings as one, such as those that were run on two machines; a later run replaces an
    earlier one of the same arm and seed.

    Raises UserError where recipe, settings, evaluation or budget differ, where two arms of one name do, and where runs
    of one method would stand together that were made by different code.
    """
    first, *others = parts
    for other in others:
        first = _joined(first, other)
    return first


def _joined(first: Results, other: Results) -> Results:
    for key in MATCHED:
        if other.contest.get(key) != first.contest.get(key):
            raise UserError(f"these contests differ in {key}: {first.contest.get(key)} and {other.contest.get(key)}")
    for name in set(first.arms) & set(other.arms):
        if first.arms[name].settings != other.arms[name].settings:
            raise UserError(f"these contests differ in the settings of arm '{name}'; rename one of them")
    new = {_run(row) for row in other.evaluations}
    steps, evaluations = ([r for r in rows if _run(r) not in new] for rows in (first.steps, first.evaluations))
    old, digests = {row["arm"] for row in evaluations}, other.contest["digests"]
    for slug, digest in first.contest["digests"].items():
        stale = sorted(name for name in old if first.arms[name].uses(slug))
        if digests.get(slug, digest) != digest and stale:
            raise UserError(f"the code of '{slug}' changed between these contests; run again: {', '.join(stale)}")
    stopped = {run: why for run, why in first.stopped.items() if run not in {f"{arm} seed {seed}" for arm, seed in new}}
    contest = first.contest | {
        "seeds": sorted({*first.contest["seeds"], *other.contest["seeds"]}),
        "digests": first.contest["digests"] | digests,
        "machines": first.contest["machines"] | other.contest["machines"],
    }
    arms = first.arms | other.arms
    return Results(contest, arms, steps + other.steps, evaluations + other.evaluations, stopped | other.stopped)


def _run(row: Row) -> tuple[str, int]:
    return row["arm"], row["seed"]


MATCHED = ("recipe", "settings", "budget_tokens", "steps", "evaluation")
"""What two contests must share for their runs to be compared."""


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [short(row.get(name)) for row in rows] for name in names}


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def short(value: Any, digits: int = DIGITS) -> Any:
    """A number with so many significant digits; None where it is not finite, because JSON has no nan."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
