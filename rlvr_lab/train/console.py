"""What a person sees while a run goes on: the live view (`view`), a bar for other work, or plain lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from .view import RunState, styled

TRAINING = "training"
"""The stretch of work that has steps with metrics; every other one is a bar."""
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

    def warn(self, text: str) -> None:
        """Something went wrong that does not stop the run."""


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

    def warn(self, text: str) -> None:
        """Nothing to show."""


class Quiet(Silent):
    """Warnings only, on standard error."""

    def warn(self, text: str) -> None:
        """Print it as one line."""
        _to_stderr(text)


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
            print(one_line(self._what, self._done, self._total, metrics or {}), flush=True)

    def end(self) -> None:
        """Nothing to close."""

    def say(self, text: str) -> None:
        """Print the line."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print it on standard error."""
        _to_stderr(text)


class Bar:
    """A rich progress bar on a terminal, for work without steps: evaluating, pre-training."""

    def __init__(self, console: Any = None) -> None:
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
            console=console,
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

    def warn(self, text: str) -> None:
        """Print above the bar."""
        self.say(f"warning: {text}")


class Live:
    """The live view of a training run on a terminal, and a `Bar` for everything else.

    When a stretch of training ends the view makes way for a single line, so that the scroll-back stays readable.
    """

    def __init__(self, name: str = "", console: Any = None) -> None:
        from rich.console import Console as RichConsole

        self.console: Any = console or RichConsole()
        self.state = RunState(name=name)
        self._bar = Bar(self.console)
        self._live: Any = None

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start the view, or a bar."""
        if what != TRAINING:
            self._bar.begin(what, total, done)
            return
        from rich.live import Live as RichLive

        self.state.total, self.state.done = total, done
        # drawn when a step is done, not by a thread: nothing changes in between
        self._live = RichLive(console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self._draw()

    def advance(self, units: int, metrics: Mapping[str, float] | None = None) -> None:
        """Take up a step's metrics, or move the bar."""
        if self._live is None:
            self._bar.advance(units, metrics)
            return
        self.state.done += units
        if metrics:
            self.state.add(metrics)
        self._draw()

    def end(self) -> None:
        """Leave one line where the view was."""
        if self._live is None:
            self._bar.end()
            return
        self._live.stop()
        self._live = None
        newest = self.state.rows[-1] if self.state.rows else {}
        self.say(one_line(TRAINING, self.state.done, self.state.total, newest))

    def say(self, text: str) -> None:
        """Print above the view."""
        self.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Print it, and keep the newest one in the view."""
        self.state.warning = text
        self.say(f"warning: {text}")

    def _draw(self) -> None:
        unicode = "utf" in str(self.console.encoding).lower()
        self._live.update(styled(self.state, self.console.width, unicode=unicode), refresh=True)


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def one_line(what: str, done: int, total: int, metrics: Mapping[str, float]) -> str:
    """One line: how far the work is, and the newest figures."""
    tail = "  ".join(f"{k} {v}" for k, v in _figures(metrics).items())
    return f"{what} {done}/{total}  {tail}".rstrip()


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


def for_terminal(view: str = "auto", name: str = "") -> Console:
    """The console for `logging.view`. `auto`: the live view on a terminal that can redraw, plain lines elsewhere."""
    if view == "quiet":
        return Quiet()
    if view == "plain":
        return Lines()
    from rich.console import Console as RichConsole

    console = RichConsole(force_terminal=True if view == "live" else None)
    able = console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()
    return Live(name, console) if able or view == "live" else Lines()
