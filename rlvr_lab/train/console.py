"""What a person sees while a run goes on: a live line with reward, entropy, speed and time left, or plain lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol

SHOWN = ("reward", "token_entropy", "mean_tokens", "clip", "tokens_per_second")


class Console(Protocol):
    """Receives the progress of a run."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A stretch of work of `total` units starts, `done` of them are already there."""

    def advance(self, units: int, metrics: Mapping[str, float] | None = None) -> None:
        """Some units are done."""

    def end(self) -> None:
        """The stretch of work is over."""

    def say(self, text: str) -> None:
        """A line of text."""


class Silent:
    """No output: for notebooks and tests."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Nothing to show."""

    def advance(self, units: int, metrics: Mapping[str, float] | None = None) -> None:
        """Nothing to show."""

    def end(self) -> None:
        """Nothing to show."""

    def say(self, text: str) -> None:
        """Nothing to show."""


class Lines:
    """Plain lines for log files: one every tenth of the work."""

    def __init__(self) -> None:
        self._what, self._total, self._done, self._last = "", 1, 0, 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember what is being done."""
        self._what, self._total, self._done = what, max(total, 1), done
        self._last = done * 10 // self._total

    def advance(self, units: int, metrics: Mapping[str, float] | None = None) -> None:
        """Print when another tenth is done."""
        self._done += units
        if self._done * 10 // self._total > self._last:
            self._last = self._done * 10 // self._total
            tail = "  ".join(f"{k} {v}" for k, v in _figures(metrics or {}).items())
            print(f"{self._what} {self._done}/{self._total}  {tail}".rstrip(), flush=True)

    def end(self) -> None:
        """Nothing to close."""

    def say(self, text: str) -> None:
        """Print the line."""
        print(text, flush=True)


class Live:
    """A rich progress bar on a terminal."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        self._task: Any = None

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a bar."""
        self._progress.start()
        self._task = self._progress.add_task(what, total=total, completed=done, figures="")

    def advance(self, units: int, metrics: Mapping[str, float] | None = None) -> None:
        """Move the bar and show the newest figures."""
        self._progress.advance(self._task, units)
        if metrics:
            figures = "  ".join(f"{k} {v}" for k, v in _figures(metrics).items())
            self._progress.update(self._task, figures=figures)

    def end(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()
        self._progress.remove_task(self._task)

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)


def _figures(metrics: Mapping[str, float]) -> dict[str, str]:
    values = dict(metrics)
    if "clip_low" in values:
        values["clip"] = values["clip_low"] + values["clip_high"]
    names = {
        "reward": ("reward", "{:.3f}"),
        "token_entropy": ("entropy", "{:.3f} nats"),
        "mean_tokens": ("length", "{:.0f}"),
        "clip": ("clipped", "{:.2%}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
    }
    found = {k: values[k] for k in SHOWN if k in values and not math.isnan(values[k])}
    return {names[k][0]: names[k][1].format(v) for k, v in found.items()}


def for_terminal() -> Console:
    """A live bar on a terminal, plain lines elsewhere."""
    return Live() if sys.stderr.isatty() and sys.stdout.isatty() else Lines()
