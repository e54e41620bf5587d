"""What a terminal shows of a training run, as text of a given width: a pure function of the metrics so far.

The same view serves the run itself (`console.Live`) and a run in another process (`rlvr-lab watch`). Nothing in it is
told by colour alone, so that it reads the same under NO_COLOR.
"""

from __future__ import annotations

import math
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

HISTORY = 512
"""Steps kept for the curves."""
RECENT = 10
"""Steps over which speed, time parts and the ledger are averaged."""
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"
LABEL = 13

PARTS = (
    ("rollout", ("rollout", "sync"), "█"),
    ("score", ("score", "reference", "reward"), "▓"),
    ("loss", ("loss",), "▒"),
    ("optimizer", ("optimizer",), "░"),
    ("other", ("ledger", "overhead"), "·"),
)
"""Parts of a step as shown: name, the `seconds_*` columns in it, and its mark in the bar."""


@dataclass(frozen=True)
class Curve:
    """One line of the view: a column with its recent course."""

    label: str
    column: str
    format: str


CURVES = (
    Curve("reward", "reward", "{:.3f}"),
    Curve("accuracy", "accuracy", "{:.1%}"),
    Curve("token entropy", "token_entropy", "{:.3f} nats"),
    Curve("dead groups", "dead_groups", "{:.0%}"),
    Curve("clipped low", "clip_low", "{:.2%}"),
    Curve("clipped high", "clip_high", "{:.2%}"),
    Curve("length", "mean_tokens", "{:.0f} tokens"),
    Curve("tokens/s", "tokens_per_second", "{:,.0f}"),
)


@dataclass
class RunState:
    """All that the view knows of a run."""

    name: str = ""
    total: int = 0
    done: int = 0
    rows: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    warning: str = ""
    note: str = ""
    """A line at the bottom, such as how long ago the last step was."""

    def add(self, row: Mapping[str, Any]) -> None:
        """One more step."""
        self.rows.append(row)

    def values(self, column: str, last: int | None = None) -> list[float]:
        """The column over the (last) steps; nan where it was not measured."""
        rows = list(self.rows)[-last:] if last else list(self.rows)
        return [number(row.get(column)) for row in rows]

    def recent(self, column: str) -> float:
        """Mean over the last measured steps; nan where there are none."""
        known = [v for v in self.values(column, RECENT) if math.isfinite(v)]
        return sum(known) / len(known) if known else math.nan

    def seconds_left(self) -> float:
        """Steps left times the recent time of a step; evaluations are not foreseen."""
        return (self.total - self.done) * self.recent("seconds")


def number(value: Any) -> float:
    """A logged value; what is no finite number was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """A curve in `width` characters at most, each the mean of its share of the values, from lowest to highest.

    A share with nothing measured is a blank; a constant curve is drawn at half height.
    """
    if width < 1 or not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    known = [m for m in means if math.isfinite(m)]
    if not known:
        return ""
    low, high = min(known), max(known)
    top = len(blocks) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(
        " " if not math.isfinite(m) else blocks[round((m - low) * scale) if scale else top // 2] for m in means
    )


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def clock_text(seconds: float) -> str:
    """`1:02:03`, `2:03`; a dash where it is unknown."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def lines(state: RunState, width: int, *, unicode: bool = True) -> list[str]:
    """The view as plain lines, none longer than `width`."""
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    shown = [_head(state, width), _progress(state, width, unicode)]
    shown += [line for curve in CURVES if (line := _curve(state, curve, width, blocks))]
    shown += _wrapped(_ledger(state), width)
    shown += _wrapped(_time(state), width)
    bar = _time_bar(state, width, unicode)
    shown += [bar] if bar else []
    shown += _wrapped(_memory(state), width)
    shown += _wrapped(f"warning: {state.warning}" if state.warning else "", width)[:3]
    shown += _wrapped(state.note, width)
    return [line if unicode else plain(line) for line in shown]


def plain(line: str) -> str:
    """The line in ASCII."""
    return line.replace("·", "-").encode("ascii", "replace").decode("ascii")


def _head(state: RunState, width: int) -> str:
    left = clock_text(state.seconds_left())
    tail = f"step {state.done}/{state.total}, left {left}"
    room = width - len(tail) - 2
    name = state.name if len(state.name) <= room else state.name[: max(room - 1, 0)]
    return f"{name}  {tail}"[:width] if room > 3 else tail[:width]


def _progress(state: RunState, width: int, unicode: bool) -> str:
    share = min(max(state.done / state.total, 0.0), 1.0) if state.total else 0.0
    room = width - 5
    full = int(share * room)
    done, rest = ("━", "─") if unicode else ("#", ".")
    return f"{done * full}{rest * (room - full)} {share:4.0%}"


def _curve(state: RunState, curve: Curve, width: int, blocks: str) -> str:
    values = state.values(curve.column)
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    # the last measured value: an undefined one is a gap in the curve, not a zero
    value = curve.format.format(known[-1])
    text = f"{curve.label:{LABEL}s} {value:>12s}"
    if len(text) > width:  # rather no columns than half a number
        text = f"{curve.label} {value}"
    room = width - len(text) - 2
    return f"{text}  {sparkline(values, room, blocks)}".rstrip()[:width]


def _ledger(state: RunState) -> str:
    forecast, measured = state.recent("ledger_forecast"), state.recent("ledger_measured")
    if not math.isfinite(measured):
        return ""
    told = f"predicted {forecast:+.4f}, " if math.isfinite(forecast) else "no forecast yet, "
    return f"entropy change per step: {told}measured {measured:+.4f} nats"


def _shares(state: RunState) -> list[tuple[str, float, str]]:
    """Name, seconds and mark of each part of a recent step that took any time."""
    found = [
        (name, sum(v for c in columns if math.isfinite(v := state.recent(f"seconds_{c}"))), mark)
        for name, columns, mark in PARTS
    ]
    return [part for part in found if part[1] > 0]


def _time(state: RunState) -> str:
    parts, seconds = _shares(state), state.recent("seconds")
    if not parts:
        return ""
    total = sum(took for _, took, _ in parts)
    told = ", ".join(f"{name} {took / total:.0%}" for name, took, _ in parts)
    return f"a step: {seconds:.2f} s = {told}" if math.isfinite(seconds) else f"a step: {told}"


def _time_bar(state: RunState, width: int, unicode: bool) -> str:
    parts = _shares(state)
    total = sum(took for _, took, _ in parts)
    bar = ""
    for name, took, mark in parts:
        bar += (mark if unicode else name[0]) * round(took / total * width)
    return bar[:width]


def _memory(state: RunState) -> str:
    told = [
        f"{where} {value:.2f} GiB"
        for where, column in (("process", "memory_process_gib"), ("GPU", "memory_device_gib"))
        if math.isfinite(value := _mean(state.values(column, 1)))
    ]
    return f"peak memory: {', '.join(told)}" if told else ""


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) if text else []


def styled(state: RunState, width: int, *, unicode: bool = True) -> Text:
    """The view for rich: bold head, and the warning in a colour (and in words)."""
    from rich.text import Text

    result = Text(no_wrap=True, overflow="crop")
    for i, line in enumerate(lines(state, width, unicode=unicode)):
        style = {0: "bold", 1: "cyan"}.get(i, "yellow" if line.startswith("warning: ") else "")
        result.append(line + "\n", style=style)
    result.rstrip()
    return result
