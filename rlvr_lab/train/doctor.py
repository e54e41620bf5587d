"""`rlvr-lab doctor RUN`: read a run's log and name what is likely wrong, with evidence and the setting to change.

Reads `metrics.jsonl`, `evaluations.jsonl`, `config.yaml` and `summary.json` of a run folder; only the first is needed.
Works on finished, unfinished, resumed and damaged logs: a line that cannot be read is left out and counted, a step
logged twice counts as it was logged last, and a column that is missing is "not measured", never 0. The rules, their
thresholds and the criterion of a collapse are in `doctor_rules`.

Findings are ordered by likelihood. One that another finding would bring about is kept as a note which names its cause,
so that a single fault is not reported five times.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import UserError
from .doctor_record import Finding, History, show
from .doctor_rules import RULES

__all__ = [
    "Finding", "History", "Report", "change", "diagnose", "examine", "extent", "page", "read_history", "render",
    "verdict",
]  # fmt: skip

FEWEST = 6


@dataclass(frozen=True)
class Report:
    """What the doctor found in one run."""

    run: str
    steps: tuple[int, int] | None
    """First and last logged step; None where no step was logged."""
    planned: int | None
    findings: tuple[Finding, ...]
    not_measured: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is above a note."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "clean": self.clean}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_history(run: Path) -> tuple[History, tuple[str, ...]]:
    """The log of a run folder, and remarks on what could not be read.

    Raises UserError for a folder that does not exist or is no run's. A run that has only begun has an empty log.
    """
    log = run / "metrics.jsonl"
    if not log.is_file() and not (run / "config.yaml").is_file():
        hint = "no such folder" if not run.is_dir() else "the folder holds neither metrics.jsonl nor config.yaml"
        raise UserError(f"{run} is no run to examine: {hint}; name the folder given to `rlvr-lab train --out`")
    rows, bad = _lines(log)
    evaluations, bad_evaluations = _lines(run / "evaluations.jsonl")
    settings, unreadable = _settings(run / "config.yaml")
    remarks = [f"metrics.jsonl: {bad} unreadable line{'s' * (bad > 1)} left out"] if bad else []
    remarks += [f"evaluations.jsonl: {bad_evaluations} unreadable lines left out"] if bad_evaluations else []
    remarks += [f"config.yaml: {unreadable}; settings count as unknown"] if unreadable else []
    by_step = {int(row["step"]): row for row in rows}
    steps = sorted(by_step)
    if len(by_step) < len(rows):
        remarks.append(f"{len(rows) - len(by_step)} steps are logged twice; the later line counts")
    if steps and steps != list(range(steps[0], steps[-1] + 1)):
        remarks.append(f"{steps[-1] - steps[0] + 1 - len(steps)} steps are missing between {steps[0]} and {steps[-1]}")
    if not (run / "summary.json").exists():
        remarks.append("no summary.json: the run is not finished, or broke off")
    names = sorted({name for row in rows for name in row} - {"step"})
    columns = {name: np.array([_number(by_step[s].get(name)) for s in steps], dtype=float) for name in names}
    ordered = sorted(evaluations, key=lambda row: row["step"])
    return History(np.array(steps, dtype=np.int64), columns, ordered, settings), tuple(remarks)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows with a step number, and how many lines were something else."""
    rows: list[dict[str, Any]] = []
    bad = 0
    if not path.is_file():
        return rows, bad
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int | float) and math.isfinite(step) and isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def _number(value: Any) -> float:
    """A logged value; null, text and whatever else is not a finite number was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _settings(path: Path) -> tuple[Mapping[str, Any], str]:
    if not path.is_file():
        return {}, "missing"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}, "unreadable"
    return (tree, "") if isinstance(tree, Mapping) else ({}, "holds no settings")


# -- judging ----------------------------------------------------------------------------------------------------------


def diagnose(run: Path) -> Report:
    """Read a run folder and examine it."""
    history, remarks = read_history(run)
    return examine(history, str(run), remarks)


def examine(history: History, run: str = "", remarks: Iterable[str] = ()) -> Report:
    """All rules on one log. Logs of fewer than six steps get no findings: neither level nor trend is known."""
    count = len(history)
    planned = history.setting("steps")
    told = list(remarks)
    if count < FEWEST:
        told.append(f"{count} logged steps are too few to judge; the doctor needs {FEWEST}")
        span = history.span() if count else None
        return Report(run, span, planned, (), (), tuple(told))
    found = [finding for rule in RULES if (finding := rule.judge(history)) is not None]
    missing = []
    for rule in RULES:
        lacking = [name for name in rule.needs if not history.has(name)]
        if lacking:
            missing.append(f"{rule.title}: needs {', '.join(lacking)}; {rule.remedy}")
    findings = sorted(_explained(found), key=lambda f: (f.severity == "note", -f.likelihood))
    return Report(run, history.span(), planned, tuple(findings), tuple(missing), tuple(told))


def _explained(found: list[Finding]) -> list[Finding]:
    """Turn into notes the findings that follow from another one above "note"."""
    serious = {f.fault: f for f in found if f.severity != "note"}
    roots: dict[str, Finding] = {}
    result = [f for f in found if f.severity == "note"]
    for finding in sorted(serious.values(), key=lambda f: -f.likelihood):
        causes = [c for c in finding.explained_by if c in serious]
        # of two that would explain each other the likelier one is the cause
        causes = [c for c in causes if c in roots or finding.fault not in serious[c].explained_by]
        if causes:
            cause = max(causes, key=lambda name: serious[name].likelihood)
            result.append(replace(finding, severity="note", likelihood=finding.likelihood / 2, follows_from=cause))
        else:
            roots[finding.fault] = finding
            result.append(finding)
    return result


# -- telling ----------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report for a terminal."""
    lines = [f"{report.run}: {extent(report)}", *(f"  {remark}" for remark in report.remarks), "", verdict(report)]
    for i, finding in enumerate(report.findings, 1):
        lines += ["", f"{i}. {finding.severity.upper()}: {finding.title}  (likelihood {finding.likelihood:.2f})"]
        if finding.follows_from:
            lines.append(f"   follows from: {finding.follows_from}; mend that first")
        lines += _wrapped("cause", finding.cause)
        lines += [f"   evidence (steps {finding.steps[0]} to {finding.steps[1]}):"]
        for item in finding.evidence:
            lines += textwrap.wrap(item, 108, initial_indent="     - ", subsequent_indent="       ")
        if finding.severity != "note":
            lines += _wrapped("change", change(finding))
    if report.not_measured:
        lines += ["", "not measured:"]
        for item in report.not_measured:
            lines += textwrap.wrap(item, 108, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def change(finding: Finding) -> str:
    """The setting to change, its value, and what to do beside it."""
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{finding.setting}={finding.suggestion}{advice}"


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}", 108, initial_indent="   ", subsequent_indent="     ")


def extent(report: Report) -> str:
    """First and last logged step, and how many are planned."""
    if report.steps is None:
        return "no step is logged"
    planned = f" of {report.planned} planned" if report.planned else ""
    return f"steps {report.steps[0]} to {report.steps[1]}{planned}"


def verdict(report: Report) -> str:
    """The report in one line."""
    serious = [f for f in report.findings if f.severity != "note"]
    notes = len(report.findings) - len(serious)
    extra = f", {notes} note{'s' * (notes > 1)}" if notes else ""
    if serious:
        return f"{len(serious)} finding{'s' * (len(serious) > 1)}{extra}; likelihood orders them and is no probability"
    if report.steps is None or any("too few" in remark for remark in report.remarks):
        return "no verdict"
    return f"clean: nothing above a note{extra}"


def page(report: Report, history: History) -> str:
    """The report as one self-contained HTML page with a small plot per finding; plotly is inlined once."""
    import plotly.io as pio
    from plotly.offline import get_plotlyjs

    parts = []
    for finding in report.findings:
        plots = []
        for names in finding.plots:
            chart = _plot(history, names)
            if chart is not None:
                body = pio.to_html(chart, include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
                alt = escape(str(chart.layout.meta["alt"]))
                plots.append(f'<figure role="img" aria-label="{alt}">{body}<figcaption>{alt}</figcaption></figure>')
        parts.append(_section(finding, plots))
    script = f"<script>{get_plotlyjs()}</script>" if any("<figure" in part for part in parts) else ""
    told = "".join(f"<li>{escape(item)}</li>" for item in (*report.remarks, *report.not_measured))
    return _PAGE.format(
        title=escape(f"Doctor: {report.run}"),
        extent=escape(extent(report)),
        verdict=escape(verdict(report)),
        findings="\n".join(parts),
        remarks=f"<h2>Not measured, and remarks</h2><ul>{told}</ul>" if told else "",
        script=script,
    )


def _plot(history: History, names: tuple[str, ...]) -> Any:
    """A small figure of some columns; None where none of them was measured."""
    from ..show import theme

    traces, told = [], []
    for i, name in enumerate(name for name in names if history.has(name)):
        values = history.column(name)
        known = np.isfinite(values)
        steps, values = history.steps[known], values[known]
        traces.append(theme.line(steps.tolist(), values.tolist(), name=name, series=i))
        told.append(
            f"{name} is {show(float(values[0]))} at step {steps[0]} and {show(float(values[-1]))} at step {steps[-1]}, "
            f"between {show(float(values.min()))} and {show(float(values.max()))}"
        )
    if not traces:
        return None
    unit = _UNITS.get(names[0], "value")
    return theme.figure(*traces, alt=f"By step: {'; '.join(told)}.", x="step", y=unit, height=260, showlegend=True)


_UNITS = {
    "token_entropy": "nats per token", "accuracy": "share", "reward": "reward", "clip_low": "share of tokens",
    "kl_old_new": "nats per token", "mismatch": "nats", "mismatch_mean": "nats", "staleness": "steps",
    "dead_groups": "share", "mean_tokens": "tokens", "ratio_mean": "ratio",
}  # fmt: skip


def _section(finding: Finding, plots: list[str]) -> str:
    evidence = "".join(f"<li>{escape(item)}</li>" for item in finding.evidence)
    cause = finding.follows_from
    follows = f"<p>Follows from <b>{escape(cause)}</b>; mend that first.</p>" if cause else ""
    change = f"<code>{escape(f'{finding.setting}={finding.suggestion}')}</code>"
    advice = f"<p>Change: {change} {escape(finding.advice)}</p>" if finding.severity != "note" else ""
    return (
        f'<section class="{finding.severity}"><h2>{escape(finding.title)}</h2>'
        f"<p><b>{finding.severity}</b>, likelihood {finding.likelihood:.2f}, steps {finding.steps[0]} to "
        f"{finding.steps[1]}</p>{follows}<p>{escape(finding.cause)}</p><ul>{evidence}</ul>{advice}{''.join(plots)}</section>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222832; background: #fff; max-width: 52rem; margin: 2rem auto;
  padding: 0 1rem; }}
section {{ border-left: 6px solid #767d87; padding-left: 1rem; margin: 2rem 0; }}
section.warning {{ border-color: #B57B16; }} section.critical {{ border-color: #B00277; }}
figure {{ margin: 1rem 0; }} figcaption {{ font-size: .85rem; }} code {{ background: #f1f3f5; padding: .1em .3em; }}
</style>{script}</head>
<body><h1>{title}</h1><p>{extent}</p><p><b>{verdict}</b></p>
{findings}
{remarks}
</body></html>
"""
