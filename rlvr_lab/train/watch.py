"""`rlvr-lab watch RUN`: the live view of a run in another process, read from its folder, with the doctor's findings.

Only reads. The log may grow while it is read, end in half a line, or be replaced when the run resumes.
"""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .doctor import change, diagnose, verdict
from .view import RunState, clock_text, lines, number, plain

PATIENCE = 20.0
"""A diagnosis waits at least this many times as long as the last one took."""


class Tail:
    """New whole lines of a JSONL file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad = 0
        """Whole lines that are no JSON object."""
        self._offset = self._inode = 0

    def look(self) -> tuple[list[dict[str, Any]], bool]:
        """Rows that are new, and whether the file began anew: then the rows are all there are."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return [], False
        anew = self._offset > 0 and (status.st_ino != self._inode or status.st_size < self._offset)
        if anew:
            self._offset, self.bad = 0, 0
        self._inode = status.st_ino
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half-written
        self._offset += len(whole)
        return [row for line in whole.split(b"\n")[:-1] if (row := self._row(line)) is not None], anew

    def _row(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            return row
        self.bad += 1
        return None


class Watcher:
    """What is known of a run folder; `refresh` looks again."""

    def __init__(self, run: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises UserError for a folder that is no run's."""
        if not (run / "config.yaml").is_file() and not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run} is no run to watch; name the folder given to `rlvr-lab train --out`")
        self.run, self._clock = run, clock
        self.state = RunState(name=str(run), total=_planned(run / "config.yaml"))
        self.told: list[str] = []
        """The doctor's lines."""
        self._tail = Tail(run / "metrics.jsonl")
        self._next_diagnosis = 0.0

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary and all its steps."""
        return (self.run / "summary.json").exists() and self.state.done >= self.state.total

    def refresh(self) -> list[Mapping[str, Any]]:
        """Take up what is new; returns the new steps."""
        rows, anew = self._tail.look()
        if anew:
            self.state.rows.clear()
            # a run that resumes may have been given other settings, such as more steps
            self.state.total = _planned(self.run / "config.yaml")
        for row in rows:
            self.state.add(row)
            step = number(row.get("step"))
            self.state.done = int(step) + 1 if math.isfinite(step) else self.state.done
        self.state.total = max(self.state.total, self.state.done)
        self.state.note = self._note()
        if (rows or anew) and time.monotonic() >= self._next_diagnosis:
            self._diagnose()
        return list(rows)

    def _note(self) -> str:
        if self.finished:
            return "the run is finished"
        if not self.state.rows:
            return "no step is logged yet"
        ago = self._clock() - (self.run / "metrics.jsonl").stat().st_mtime
        seconds = self.state.recent("seconds")
        slow = " (longer than usual: evaluating, saving, or stopped)" if ago > max(5 * seconds, 10.0) else ""
        damaged = f"; {self._tail.bad} unreadable lines" if self._tail.bad else ""
        return f"last step {clock_text(ago)} ago{slow}{damaged}"

    def _diagnose(self) -> None:
        started = time.monotonic()
        report = diagnose(self.run)
        self.told = [f"doctor: {verdict(report)}"]
        for finding in report.findings:
            if finding.severity != "note":
                self.told.append(f"- {finding.severity}: {finding.title}; try {change(finding)}")
        now = time.monotonic()
        self._next_diagnosis = now + PATIENCE * (now - started)

    def text(self, width: int, *, unicode: bool = True) -> list[str]:
        """View and findings, no line longer than `width`."""
        told = [part for line in self.told for part in textwrap.wrap(line, width, subsequent_indent="  ")]
        return [*lines(self.state, width, unicode=unicode), "", *(told if unicode else map(plain, told))]


def _planned(path: Path) -> int:
    """Steps that the settings ask for; 0 where they cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(tree["steps"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def follow(watcher: Watcher, console: Any, every: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Redraw until the run is finished, on a terminal that can; elsewhere one line per step."""
    from .console import one_line

    if not console.is_terminal or console.is_dumb_terminal:
        while True:
            for row in watcher.refresh():
                step = int(number(row.get("step"))) + 1 if "step" in row else watcher.state.done
                print(one_line("step", step, watcher.state.total, row), flush=True)
            if watcher.finished:
                break
            sleep(every)
        print("\n".join(["", *watcher.told]), flush=True)
        return
    from rich.live import Live
    from rich.text import Text

    unicode = "utf" in str(console.encoding).lower()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            watcher.refresh()
            shown = watcher.text(console.width, unicode=unicode)
            live.update(Text("\n".join(shown), no_wrap=True, overflow="crop"), refresh=True)
            if watcher.finished:
                return
            sleep(every)
