"""The page of one whole run, or of several beside each other: settings, curves, evaluations, findings, transcripts.

It draws what it is given: reading a run folder and asking the doctor is the work of `rlvr_lab.train.report`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from . import theme
from .run_page import page, table, transcripts

__all__ = ["CHARTS", "Chart", "RunView", "figures_page", "plot", "report_page"]

MOST_STEPS = 1000
"""Points drawn of one curve; longer ones are thinned evenly, and the page says so."""
MOST_RUNS = len(theme.SERIES)


@dataclass(frozen=True)
class RunView:
    """One run as plain data. What was not measured is nan or missing."""

    name: str
    steps: Sequence[int]
    columns: Mapping[str, Sequence[float]]
    evaluations: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted name to value, as text."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Date, machine, extent: what stands at the top."""
    verdict: str = ""
    findings: Sequence[Mapping[str, Any]] = ()
    """The doctor's, with title, severity, likelihood, cause, evidence, steps, change and follows_from."""
    remarks: Sequence[str] = ()
    samples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Chart:
    """Columns that are read together, and what to look for."""

    title: str
    columns: tuple[str, ...]
    unit: str
    look: str


CHARTS = (
    Chart("Reward and accuracy", ("reward", "accuracy"), "mean over responses",
          "What is paid for, and what is right. Where they part, the reward pays for something else."),
    Chart("Token entropy", ("token_entropy", "sequence_mean_token_entropy", "top20_token_entropy"), "nats per token",
          "How undecided the policy is. A fall is good or bad by what accuracy gains meanwhile."),
    Chart("Answer entropy", ("answer_entropy",), "nats",
          "Spread of the final answers within a group; no answer is one class."),
    Chart("Entropy ledger", ("ledger_forecast", "ledger_measured", "ledger_probe"), "nats per step",
          "Change of token entropy: forecast, measured on the update's own rows, and on held-out ones."),
    Chart("Entropy ledger by token class",
          ("ledger_up_likely", "ledger_up_unlikely", "ledger_down_likely", "ledger_down_unlikely"), "unit logit steps",
          "Which tokens push entropy: sign of the advantage, and whether the token was likelier than typical."),
    Chart("Clipped tokens", ("clip_low", "clip_high"), "share of tokens", "Where the ratio left its bounds."),
    Chart("Size of the update", ("kl_old_new",), "nats per token", "KL from the sampling policy to the updated one."),
    Chart("Gradient norm", ("grad_norm",), "before clipping", "Spikes, and whether clipping is the rule."),
    Chart("Sampler against trainer", ("mismatch", "mismatch_mean"), "nats",
          "Log-probs of the sampler minus recomputed ones: largest, and mean. A mean on one side is a truncation."),
    Chart("Age of the data", ("staleness",), "steps", "Mean number of updates since the responses were sampled."),
    Chart("Groups without a signal", ("dead_groups",), "share of groups", "All rewards of the group are equal."),
    Chart("Distinct correct answers", ("distinct_correct",), "per problem", "What pass@k lives on."),
    Chart("Response length", ("mean_tokens",), "tokens", "Mean over all responses."),
    Chart("Cut off, or without an answer", ("truncated", "no_answer"), "share of responses",
          "A rise says that the length limit, or the format, decides the reward."),
    Chart("Where a step's time goes",
          ("seconds_rollout", "seconds_score", "seconds_loss", "seconds_optimizer"), "seconds",
          "Sampling, scoring, loss with gradient, optimizer."),
    Chart("Speed", ("tokens_per_second",), "tokens per second", "Response tokens of a step over its whole time."),
)  # fmt: skip


def report_page(title: str, runs: Sequence[RunView]) -> str:
    """The whole page. Raises ValueError for no run, or for more runs than one figure can tell apart."""
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"a report shows 1 to {MOST_RUNS} runs, not {len(runs)}")
    parts = [_extents(runs), _findings(runs), _evaluations(runs), _curves(runs), _settings(runs), _transcripts(runs)]
    return figures_page(title, parts)


def figures_page(title: str, parts: Sequence[str], *, scripts: Sequence[str] = ()) -> str:
    """A page with figures of `plot`: plotly, the palette of both themes, then `scripts`, then the page's own."""
    from plotly.offline import get_plotlyjs

    swap = {theme.PALETTE[name]: theme.DARK[name] for name in theme.PALETTE}
    palette = f'<script type="application/json" id="palette">{json.dumps(swap)}</script>'
    return page(title, "\n".join(parts) + palette, scripts=[get_plotlyjs(), *scripts])


# -- tables -----------------------------------------------------------------------------------------------------------


def _extents(runs: Sequence[RunView]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    rows = [[name, *(run.facts.get(name, "-") for run in runs)] for name in names]
    remarks = "".join(f"<li>{escape(f'{run.name}: {text}')}</li>" for run in runs for text in run.remarks)
    return table(["", *(run.name for run in runs)], rows, "What was run") + (f"<ul>{remarks}</ul>" if remarks else "")


def _settings(runs: Sequence[RunView]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [[name, *(run.settings.get(name, "-") for run in runs)] for name in names]
    head = ["setting", *(run.name for run in runs)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    apart = table(head, differing, "Settings that differ") if differing else ""
    if len(runs) > 1 and not differing:
        apart = "<p>All settings are equal.</p>"
    every = table(head, rows, "All settings") if rows else "<p>No config.yaml was found.</p>"
    return f"<h2>Settings</h2>{apart}<details><summary>All settings</summary>{every}</details>"


# -- curves -----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[RunView]) -> str:
    plots = []
    for chart in CHARTS:
        for title, columns in _split(chart, len(runs)):
            figure = _figure(runs, columns, chart.unit)
            if figure is not None:
                plots.append(f"<div><h3>{escape(title)}</h3><p>{escape(chart.look)}</p>{figure}</div>")
    if not plots:
        return "<h2>Curves</h2><p>No step is logged yet.</p>"
    thinned = max(len(run.steps) for run in runs) > MOST_STEPS
    note = f"<p>Long curves are thinned to about {MOST_STEPS} points.</p>" if thinned else ""
    return f'<h2>Curves</h2>{note}<div class="plots">{"".join(plots)}</div>'


def _split(chart: Chart, runs: int) -> list[tuple[str, tuple[str, ...]]]:
    """One figure with all columns for one run; for several runs one figure per column, with a line per run."""
    if runs == 1 or len(chart.columns) == 1:
        return [(chart.title, chart.columns)]
    return [(f"{chart.title}: {name}", (name,)) for name in chart.columns]


def _figure(runs: Sequence[RunView], columns: Sequence[str], unit: str) -> str | None:
    """One chart; None where nothing of it was measured."""
    traces, told = [], []
    for i, run in enumerate(runs):
        for j, column in enumerate(columns):
            xs, ys = _known(run, column)
            if not xs:
                continue
            name = column if len(runs) == 1 else run.name
            traces.append(theme.line(xs, ys, name=name, series=max(i, j)))
            told.append(
                f"{name} is {ys[0]:.3g} at step {xs[0]} and {ys[-1]:.3g} at step {xs[-1]}, "
                f"between {min(ys):.3g} and {max(ys):.3g}"
            )
    if not traces:
        return None
    what = "" if len(runs) == 1 else f"{columns[0]}: "
    return plot(traces, alt=f"By step, {what}{'; '.join(told)}.", x="step", y=unit)


def _known(run: RunView, column: str) -> tuple[list[int], list[float]]:
    """Steps and values where the column was measured, thinned."""
    every = -(-len(run.steps) // MOST_STEPS)
    pairs = list(zip(run.steps, run.columns.get(column, ()), strict=False))
    known = [(step, float(f"{value:.5g}")) for step, value in pairs if math.isfinite(value)]
    kept = known[::every] if len(known) > MOST_STEPS else known
    return [step for step, _ in kept], [value for _, value in kept]


def plot(traces: Sequence[Any], *, alt: str, x: str, y: str, height: int = 300, **layout: Any) -> str:
    """A figure of the house style as HTML that the page's script draws."""
    figure = theme.figure(*traces, alt=alt, x=x, y=y, height=height, showlegend=True, **layout)
    spec = json.dumps(json.loads(figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")
    label = escape(alt)
    return (
        f'<figure class="plot"><script type="application/json">{spec}</script>'
        f'<div class="plot-box" role="img" aria-label="{label}"></div><figcaption>{label}</figcaption></figure>'
    )


# -- evaluations ------------------------------------------------------------------------------------------------------


def _ks(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    names = {name for row in rows for name in row if name.startswith("pass@") and not name.endswith("interval")}
    return sorted(int(name.removeprefix("pass@")) for name in names if name.removeprefix("pass@").isdigit())


def _evaluations(runs: Sequence[RunView]) -> str:
    rows = [(run, row) for run in runs for row in run.evaluations]
    if not rows:
        return "<h2>Evaluations</h2><p>None was made.</p>"
    ks = _ks([row for _, row in rows])
    shown = [*(f"pass@{k}" for k in ks), "distinct_correct", "answer_entropy", "token_entropy", "mean_tokens"]
    shown = [name for name in shown if any(row.get(name) is not None for _, row in rows)]
    lines = [
        [f"{run.name}, step {row['step']}" if len(runs) > 1 else f"step {row['step']}", *(_cell(row, n) for n in shown)]
        for run, row in rows
    ]
    shown_rows = table(["", *shown], lines, "Held-out evaluations, with 95 % intervals over problems")
    if any(row.get("held_out") is False for _, row in rows):
        shown_rows += "<p>Some were made on training problems.</p>"
    return f"<h2>Evaluations</h2>{shown_rows}{_pass_at_k(runs, ks)}"


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_interval")
    if not isinstance(value, int | float):
        return "-"
    if not name.startswith("pass@"):
        return f"{value:.3g}"
    if not isinstance(interval, Sequence) or len(interval) != 2 or None in interval:
        return f"{value:.1%}"
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _pass_at_k(runs: Sequence[RunView], ks: Sequence[int]) -> str:
    """First and last evaluation of one run, or the last one of several."""
    curves: list[tuple[str, Mapping[str, Any]]] = []
    for run in runs:
        ends = run.evaluations[-1:] if len(runs) > 1 else [*run.evaluations[:1], *run.evaluations[1:][-1:]]
        curves += [(f"{run.name}, after step {row['step']}", row) for row in ends]
    traces, told = [], []
    for i, (name, row) in enumerate(curves):
        points = [(k, float(row[f"pass@{k}"])) for k in ks if isinstance(row.get(f"pass@{k}"), int | float)]
        if len(points) < 2:
            continue
        xs, ys = [k for k, _ in points], [round(value, 5) for _, value in points]
        traces.append(theme.line(xs, ys, name=name, series=i))
        told.append(f"{name}: {ys[0]:.1%} at k = {xs[0]}, {ys[-1]:.1%} at k = {xs[-1]}")
    return plot(traces, alt=f"pass@k by k. {'; '.join(told)}.", x="k", y="pass@k") if traces else ""


# -- findings and transcripts -----------------------------------------------------------------------------------------


def _findings(runs: Sequence[RunView]) -> str:
    parts = []
    for run in runs:
        head = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f"{head}<p><b>{escape(run.verdict)}</b></p>{''.join(map(_finding, run.findings))}")
    return f"<h2>What the doctor finds</h2>{''.join(parts)}"


def _finding(finding: Mapping[str, Any]) -> str:
    severity = str(finding["severity"])
    evidence = "".join(f"<li>{escape(str(item))}</li>" for item in finding["evidence"])
    cause = finding.get("follows_from")
    first, last = finding["steps"]
    follows = f"<p>Follows from <b>{escape(str(cause))}</b>; mend that first.</p>" if cause else ""
    change = f"<p>Change: <code>{escape(str(finding['change']))}</code></p>" if severity != "note" else ""
    return (
        f'<section class="finding {escape(severity)}"><h3>{escape(str(finding["title"]))}</h3><p>{escape(severity)}, '
        f"likelihood {finding['likelihood']:.2f}, steps {first} to {last}</p>{follows}"
        f"<p>{escape(str(finding['cause']))}</p><ul>{evidence}</ul>{change}</section>"
    )


def _transcripts(runs: Sequence[RunView]) -> str:
    rows = [
        {**row, "problem": f"{run.name}: {row.get('problem', '')}"} if len(runs) > 1 else row
        for run in runs
        for row in run.samples
    ]
    return f"<h2>Transcripts</h2>{transcripts(rows)}"
