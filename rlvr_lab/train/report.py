"""`rlvr-lab report RUN`: from run folders to one page (`show.run_page_report`), with the doctor's findings on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..show.run_page_report import MOST_RUNS, RunView, report_page
from .doctor import change, examine, extent, read_history, verdict
from .doctor_record import Finding, History
from .logs import read_jsonl

CHOSEN = 3
"""Steps whose transcripts are shown unless others are asked for: first, middle, last."""
PER_STEP = 8
"""Transcripts of one step on the page."""


def write_report(runs: Sequence[Path], out: Path, steps: Sequence[int] | None = None) -> None:
    """Write the page of one run, or of several beside each other, with transcripts of the given steps.

    Raises UserError for folders that hold no run, too many runs, steps without transcripts, and a file that cannot be
    written.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"one page tells {MOST_RUNS} runs apart, not {len(runs)}; name fewer")
    views = [view(run, name, steps) for run, name in zip(runs, _names(runs), strict=True)]
    if steps and not any(v.samples for v in views):
        raise UserError(f"--steps: no transcripts of {', '.join(map(str, steps))}; recorded: {_recorded(runs)}")
    text = report_page(" beside ".join(v.name for v in views), views)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def view(run: Path, name: str, steps: Sequence[int] | None = None) -> RunView:
    """One run folder as plain data. Raises UserError where the folder holds no run."""
    history, remarks = read_history(run)
    found = examine(history, name, remarks)
    return RunView(
        name=name,
        steps=[int(step) for step in history.steps],
        columns={key: values.tolist() for key, values in history.columns.items()},
        evaluations=history.evaluations,
        settings=flat(history.settings),
        facts={"steps": extent(found), **_summary(run / "summary.json"), **_methods(history)},
        verdict=verdict(found),
        findings=[_finding(finding) for finding in found.findings],
        remarks=found.remarks,
        samples=_samples(run, steps),
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` to text."""
    rows: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: str(value)}
    return rows


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "title": finding.title,
        "severity": finding.severity,
        "likelihood": finding.likelihood,
        "cause": finding.cause,
        "evidence": finding.evidence,
        "steps": finding.steps,
        "follows_from": finding.follows_from,
        "change": change(finding),
    }


def _summary(path: Path) -> dict[str, str]:
    """Date, time and machine of a finished run; nothing where the file is missing or damaged."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        machine = summary["machine"]
        on = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
        versions = f"rlvr_lab {machine['rlvr_lab']}, torch {machine['torch']}"
        return {"time in steps": f"{summary['seconds_steps']:.0f} s", "date": summary["date"], "machine": on,
                "versions": versions}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _methods(history: History) -> dict[str, str]:
    methods = history.setting("methods", {})
    return {"methods": " + ".join(methods)} if isinstance(methods, Mapping) and methods else {}


def _samples(run: Path, steps: Sequence[int] | None) -> list[dict[str, Any]]:
    by_step = _by_step(run)
    if steps is None:
        known = sorted(by_step)
        chosen = sorted({known[i * (len(known) - 1) // (CHOSEN - 1)] for i in range(CHOSEN)}) if known else []
    else:
        chosen = [step for step in steps if step in by_step]
    return [row for step in chosen for row in by_step[step][:PER_STEP]]


def _by_step(run: Path) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in read_jsonl(run / "samples.jsonl"):
        rows.setdefault(int(row["step"]), []).append(row)
    return rows


def _recorded(runs: Sequence[Path]) -> str:
    steps = sorted({step for run in runs for step in _by_step(run)})
    return ", ".join(map(str, steps)) or "none"


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names; whole paths where two folders have the same name."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]
