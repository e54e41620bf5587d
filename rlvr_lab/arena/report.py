"""The arena's page: curves, frontier and tables of a contest, with arms that the reader switches on and off.

All numbers and all sentences are made here; the page's script (`show/pages/arena.js`) chooses among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from ..show import theme
from ..show.run_page import table
from ..show.run_page_report import figures_page, plot
from .analysis import (
    ACCURACY,
    all_at_accuracy,
    between_curves,
    blocks,
    difference,
    early_stopped,
    matched,
    step_cost,
    token_cost,
)
from .arms import REFERENCE, Arm
from .contest import collect
from .results import Results, Vector, load_results

POINTS = 16
"""Points of a training curve: each is the mean of as many steps as that takes."""
LEVELS = 5
"""Accuracies at which all arms are tabled."""
SHOWN = 4
"""Methods that are drawn at first where none is named."""
_NOTHING = 1e-9  # what rounding leaves of seeds that agree
_NBSP = "\N{NO-BREAK SPACE}"
Series = tuple[Vector, Vector, Vector]


def write_arena_report(source: Path, out: Path | None = None, arms: Sequence[str] = ()) -> Path:
    """Write the page of a contest's folder or results file; `arms` are those switched on at first. Returns its path.

    Raises UserError for results that cannot be read or have no run of GRPO, an arm they lack, and a file that cannot be
    written.
    """
    if (source / "contest.json").exists():
        results, path = collect(source), source / "results.json"  # also of a contest that is still going on
    else:
        path = source / "results.json" if source.is_dir() else source
        results = load_results(path)
    target = out or path.with_name("arena.html")
    try:
        target.write_text(arena_page(results, arms), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another --out") from error
    return target


def arena_page(results: Results, arms: Sequence[str] = ()) -> str:
    """Self-contained HTML. Raises UserError for an arm that the results lack, and for results without a run of GRPO."""
    for name in arms:
        if name not in results.arms:
            raise UserError(f"--arms: these results have no arm '{name}'; {nearest(name, results.arms)}")
    if REFERENCE not in results.arms or not results.seeds(REFERENCE):
        raise UserError(f"these results have no finished run of {REFERENCE}, with which all arms are compared")
    methods = [name for name, arm in results.arms.items() if arm.role == "method"]
    drawn = {REFERENCE, *(arms or methods[:SHOWN])}
    parts = [_summary(results), _chooser(results, drawn), _frontiers(results, drawn), _curves(results, drawn),
             _tables(results), _conditions(results), _styles()]  # fmt: skip
    script = Path(theme.__file__).with_name("pages") / "arena.js"
    return figures_page("Arena", parts, scripts=[script.read_text(encoding="utf-8")])


# -- what was run, and what is shown ----------------------------------------------------------------------------------


def _summary(results: Results) -> str:
    contest, counts = results.contest, sorted({len(results.seeds(name)) for name in results.arms})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    length = f"{contest['steps']} steps" if contest["budget_tokens"] is None else f"{contest['budget_tokens']} tokens"
    evaluation = contest["evaluation"]
    ended = "".join(f"<li>{escape(f'{run}: {why}')}</li>" for run, why in results.stopped.items())
    return (
        f"<p>{len(results.arms)} arms, {seeds} seeds each, {length} of <code>{escape(contest['recipe'])}</code>: "
        "the same problems and draws, the same budget, the same held-out evaluation "
        f"({evaluation['problems']} problems, {evaluation['samples']} samples each at temperature "
        f"{evaluation['temperature']:g}). Intervals are 95 % Student-t intervals over seeds; a dash is an undefined "
        "figure.</p><p>Most interventions slow down one trade of diversity against accuracy, and end where GRPO "
        "stood earlier. So an arm is compared twice: at the same step, and with GRPO stopped early at the same pass@1. "
        "Only what lies above GRPO's own curve is a gain, and a method is credited with it only where its control does "
        "not have it too.</p>"
        + (f"<p>Runs that ended early, with their last evaluation in all figures:</p><ul>{ended}</ul>" if ended else "")
    )


def _chooser(results: Results, drawn: set[str]) -> str:
    boxes = "".join(_box(arm, arm.name in drawn) for arm in _ordered(results))
    families = "".join(
        f'<option value="{escape(name)}">{escape(name)}</option>' for name in results.arms if results.controls(name)
    )
    return (
        f'<fieldset><legend>Arms in the figures</legend><div class="controls"><label>A method with its controls '
        f'<select id="family"><option value="">choose</option>{families}</select></label>'
        f'<button id="none" type="button">{REFERENCE} alone</button><output id="shown"></output></div>'
        f'<div class="arms">{boxes}</div></fieldset>'
    )


def _box(arm: Arm, on: bool) -> str:
    note = arm.note or " ".join(arm.settings)
    kind = ' class="control"' if arm.role == "control" and arm.control_of else ""
    return (
        f'<label{kind} title="{escape(note)}"><input type="checkbox" name="arm" value="{escape(arm.name)}" '
        f'data-of="{escape(arm.control_of)}"{" checked" if on else ""}> {escape(arm.name)}</label>'
    )


def _ordered(results: Results) -> list[Arm]:
    """Arms with their controls behind them."""
    firsts = [arm for arm in results.arms.values() if arm.control_of not in results.arms]
    return [arm for first in firsts for arm in (first, *(results.arms[n] for n in results.controls(first.name)))]


def _styles() -> str:
    keys = ("colour", "dash", "symbol", "pattern")
    looks = [{key: getattr(style, key) for key in keys} for style in (*theme.SERIES, theme.BASELINE)]
    record = json.dumps({"series": looks[:-1], "baseline": looks[-1], "reference": REFERENCE})
    return f'<script type="application/json" id="styles">{record}</script>'


# -- figures ----------------------------------------------------------------------------------------------------------


def _curves(results: Results, drawn: set[str]) -> str:
    width = max(1, max(row["step"] + 1 for row in results.steps) // POINTS)
    per_block = f"each point is the mean of {width} steps" if width > 1 else "per step"

    def training(metric: str) -> Callable[[str], Series]:
        return lambda arm: blocks(results, arm, metric, width)

    def held_out(metric: str) -> Callable[[str], Series]:
        return lambda arm: results.series(arm, metric, "evaluations")

    last = f"pass@{_ks(results)[-1]}"
    curves = [
        ("Reward", training("reward"), "reward in training", f"What is trained for; {per_block}."),
        ("Entropy path", training("token_entropy"), "token entropy (nats)", f"Of the policy in training; {per_block}."),
        ("pass@1", held_out(ACCURACY), "pass@1", "Held-out accuracy."),
        (last, held_out(last), last, "Held-out: solved by at least one of so many samples."),
        ("Distinct correct answers", held_out("distinct_correct"), "per held-out problem", "What pass@k lives on."),
        ("Length", training("mean_tokens"), "tokens per response", f"In training; {per_block}."),
    ]
    plots = [(title, look, _by_step(results, drawn, read, unit)) for title, read, unit, look in curves]
    plots.insert(
        3, ("pass@k", "The policy before training and each arm at its last evaluation.", _pass_at_k(results, drawn))
    )
    plots.append(
        (
            "Step cost",
            "Median seconds of a step over GRPO's with the same seed, where both ran on the same kind of machine. "
            "Rough: it also holds whatever else the machine did. `benchmarks/step_cost.py` measures cost.",
            _cost(results, drawn),
        )
    )
    return f"<h2>At matched steps</h2>{_grid(plots)}"


def _grid(plots: Sequence[tuple[str, str, str]]) -> str:
    inner = "".join(
        f"<div><h3>{escape(title)}</h3><p>{escape(look)}</p>{figure}</div>" for title, look, figure in plots
    )
    return f'<div class="plots">{inner}</div>'


def _by_step(results: Results, drawn: set[str], read: Callable[[str], Series], unit: str) -> str:
    traces, told = [], {}
    for arm in results.arms:
        xs, means, halves = read(arm)
        if not len(xs):
            continue
        traces += _curve(arm, xs, means, halves, arm in drawn)
        told[arm] = f"{arm} goes from {_number(means[0])} to {_number(means[-1])}{_within(halves[-1])}"
    return _figure(traces, told, f"{unit} by step:", x="step", y=unit)


def _pass_at_k(results: Results, drawn: set[str]) -> str:
    ks = _ks(results)
    base = [_round(results.base(f"pass@{k}")) for k in ks]
    before = theme.line(ks, base, name="before training", series="baseline")
    before.line.dash = "longdashdot"  # dotted is GRPO
    traces, told = [before], {}
    for arm in results.arms:
        found = [results.interval(arm, f"pass@{k}") for k in ks]
        means, halves = (np.array(column) for column in zip(*found, strict=True))
        traces += _curve(arm, np.array(ks), means, halves, arm in drawn)
        told[arm] = f"{arm} {_number(means[0])} at k = {ks[0]} and {_number(means[-1])} at k = {ks[-1]}"
    lead = f"pass@k by k, {_number(base[0])} to {_number(base[-1])} before training, and after it:"
    axis = {"type": "log", "tickmode": "array", "tickvals": ks, "ticktext": [str(k) for k in ks]}
    return _figure(traces, told, lead, x="samples k", y="pass@k", xaxis=axis)


def _cost(results: Results, drawn: set[str]) -> str:
    traces, told = [], {}
    for arm in results.arms:
        mean, half = step_cost(results, arm)
        bar = theme.bars([arm], [_round(mean)], name=arm, series=0)
        bar.update(meta={"arm": arm}, visible=arm in drawn, showlegend=False)
        bar.error_y = {"type": "data", "array": [_round(half)], "visible": math.isfinite(half)}
        traces.append(bar)
        told[arm] = f"{arm} {_number(mean)}{_within(half)}"
    return _figure(traces, told, "Seconds per step over GRPO's:", x="arm", y="times GRPO's step", hovermode="closest")


def _frontiers(results: Results, drawn: set[str]) -> str:
    metrics = (("token_entropy", "token entropy (nats)"), ("distinct_correct", "distinct correct answers per problem"),
               (f"pass@{_ks(results)[-1]}", f"pass@{_ks(results)[-1]}"))  # fmt: skip
    plots = [
        (f"{unit} against pass@1", _look(metric), _frontier(results, drawn, metric, unit)) for metric, unit in metrics
    ]
    intro = (
        "<p>Each path is an arm along training, from the policy before it to its last evaluation, whose bars are 95 % "
        "intervals. The band is GRPO's own curve: all that stopping it early would give. A path inside the band walks "
        "GRPO's road at another speed; one above it leaves that road. Paths are straight between evaluations, and GRPO "
        "is evaluated more often: what it does between two evaluations of the others is not seen of them.</p>"
    )
    return f"<h2>The frontier: what accuracy costs</h2>{intro}{_grid(plots)}"


def _look(metric: str) -> str:
    if metric == "token_entropy":
        return "Entropy is a means, not the end: above the band it has not yet bought anything."
    return "Held-out. This is where a gain of diversity has to show."


def _frontier(results: Results, drawn: set[str], metric: str, unit: str) -> str:
    traces, told = [], {}
    for arm in results.arms:
        if arm == REFERENCE:
            xs, means, halves = early_stopped(results, metric)
            traces += _curve(arm, xs, means, halves, arm in drawn)
        else:
            xs, means = (results.series(arm, name, "evaluations")[1] for name in (ACCURACY, metric))
            path = _path(arm, xs, means, arm in drawn)
            for axis, name in (("error_x", ACCURACY), ("error_y", metric)):
                half = results.interval(arm, name)[1]
                if math.isfinite(half):
                    path[axis] = {"type": "data", "array": [0.0] * (len(xs) - 1) + [_round(half)], "width": 5}
            traces.append(path)
        if len(xs):
            told[arm] = (f"{arm} goes from {_number(means[0])} at pass@1 {_number(xs[0])} to {_number(means[-1])} at "
                         f"{_number(xs[-1])}")  # fmt: skip
    return _figure(traces, told, f"{unit} against pass@1:", x="pass@1", y=unit, hovermode="closest")


def _curve(arm: str, xs: Vector, means: Vector, halves: Vector, on: bool) -> list[Any]:
    """A line, and its band where every point has an interval."""
    traces = [_path(arm, xs, means, on)] if len(xs) else []
    known = np.isfinite(means) & np.isfinite(halves)
    if known.any():
        low, high = (means - halves)[known], (means + halves)[known]
        band = theme.band(_short(xs[known]), _short(low), _short(high), name=f"{arm}: 95 % interval", series=0)
        traces.insert(0, band.update(meta={"arm": arm}, visible=on, showlegend=False, legendgroup=arm))
    return traces


def _path(arm: str, xs: Vector, ys: Vector, on: bool) -> Any:
    line = theme.line(_short(xs), _short(ys), name=arm, series="baseline" if arm == REFERENCE else 0)
    return line.update(meta={"arm": arm}, visible=on, legendgroup=arm)


def _figure(traces: Sequence[Any], told: Mapping[str, str], lead: str, *, x: str, y: str, **layout: Any) -> str:
    """A figure whose description is put together by the page from the sentences of the arms that are drawn."""
    drawn = {trace.meta["arm"] for trace in traces if trace.meta and trace.visible}
    alt = f"{lead} {'; '.join(text for arm, text in told.items() if arm in drawn) or 'no arm is chosen'}."
    return plot(traces, alt=alt, x=x, y=y, height=340, meta={"alt": alt, "told": dict(told), "lead": lead}, **layout)


# -- tables -----------------------------------------------------------------------------------------------------------


def _tables(results: Results) -> str:
    return f"<h2>Tables</h2>{_at_steps(results)}{_against_controls(results)}{_at_accuracy(results)}{_levels(results)}"


def _metrics(results: Results) -> tuple[str, ...]:
    return ACCURACY, f"pass@{_ks(results)[-1]}", "distinct_correct", "token_entropy"


def _at_steps(results: Results) -> str:
    metrics = (*_metrics(results), "mean_tokens")
    rows, keys = [], []
    for arm in _ordered(results):
        name, count = arm.name, len(results.seeds(arm.name))
        cells = [_cell(*results.interval(name, metric)) for metric in metrics]
        cells += [_cell(*step_cost(results, name)), _cell(*token_cost(results, name))]
        early = [run.rpartition(" ")[2] for run in results.stopped if run.rpartition(" seed ")[0] == name]
        rows.append([_label(arm), *cells, str(count), ", ".join(early) or "none"])
        keys.append(name)
    head = ["arm", *metrics, "seconds / GRPO", "tokens / GRPO", "seeds", "seeds that ended early"]
    return "<h3>At the last evaluation</h3>" + table(
        head, rows, "Last evaluation, mean ± 95 % over seeds; cost of a step over GRPO's", keys=keys
    )


def _against_controls(results: Results) -> str:
    pairs = [(arm.name, control) for arm in _ordered(results) for control in results.controls(arm.name)]
    if not pairs:
        return ""
    metrics = _metrics(results)
    rows = [[f"{a} - {b}", *(_cell(*difference(results, a, b, m), signed=True) for m in metrics)] for a, b in pairs]
    note = (
        "<p>What a method does and its control does not. A control has everything of its method but the idea: as many "
        "tokens at random, the same weights elsewhere, the bounds without the search.</p>"
    )
    caption = "Method minus control at the last evaluation, paired over seeds, mean ± 95 %"
    return "<h3>Beside the controls</h3>" + note + table(["", *metrics], rows, caption, keys=[a for a, _ in pairs])


def _at_accuracy(results: Results) -> str:
    metrics = _metrics(results)[1:]
    rows, keys = [], []
    for arm in _ordered(results):
        found = {metric: matched(results, arm.name, metric) for metric in metrics}
        match = found["distinct_correct"]
        beyond = f"{match.beyond} of {len(match.per_seed)}"
        whole = between_curves(results, arm.name, "distinct_correct")
        cells = [_cell(m.mean, m.half, signed=True) for m in found.values()]
        cells += [beyond, _verdict(match.mean, match.half), _cell(whole.mean, whole.half, signed=True)]
        rows.append([_label(arm), *cells])
        keys.append(arm.name)
    note = (
        "<p>Each arm's last evaluation minus GRPO of the same seed, read off GRPO's own curve where it first reaches "
        "the same pass@1. Where GRPO never does, nothing can be compared; such seeds are counted. GRPO's row says what "
        "training to the end instead of stopping costs GRPO. The last column lets both be stopped anywhere: the mean "
        "distance between the two curves over the accuracies that both reach, at equally many evaluations.</p>"
    )
    head = ["arm", *metrics, "seeds beyond GRPO", "distinct correct answers", "both stopped: distinct"]
    caption = "Arm minus early-stopped GRPO at equal pass@1, mean ± 95 % over seeds"
    return "<h3>At matched accuracy</h3>" + note + table(head, rows, caption, keys=keys)


def _verdict(mean: float, half: float) -> str:
    if math.isnan(half):
        return "-"
    if mean - half > 0:
        return "above GRPO's curve"
    return "below GRPO's curve" if mean + half < 0 else "not told apart from it"


def _levels(results: Results) -> str:
    """All arms at one pass@1 that the reader chooses."""
    curves = [results.rows(REFERENCE, seed, "evaluations") for seed in results.seeds(REFERENCE)]
    low, high = results.base(ACCURACY), float(np.mean([max(row[ACCURACY] for row in curve) for curve in curves]))
    if not low < high:
        return ""
    levels = [round(float(level), 3) for level in np.linspace(low, high, LEVELS + 1)[1:]]
    options = "".join(f'<option value="{level}">{level:.3f}</option>' for level in levels)
    parts = "".join(f'<div data-level="{level}">{_level(results, level)}</div>' for level in levels)
    choice = f'<label>All arms where they reach pass@1 of <select id="accuracy">{options}</select></label>'
    return f'<div class="controls">{choice}</div>{parts}'


def _level(results: Results, level: float) -> str:
    found = {metric: all_at_accuracy(results, level, metric) for metric in _metrics(results)[1:]}
    rows, keys = [], []
    for arm in _ordered(results):
        cells = [_cell(*by_arm[arm.name][:2]) for by_arm in found.values()]
        count = found["distinct_correct"][arm.name][2]
        rows.append([_label(arm), *cells, f"{count} of {len(results.seeds(arm.name))}"])
        keys.append(arm.name)
    caption = f"All arms where their pass@1 first reaches {level:.3f}, over the seeds that do"
    return table(["arm", *found, "seeds that reach it"], rows, caption, keys=keys)


def _conditions(results: Results) -> str:
    contest = results.contest
    machines = list(dict.fromkeys(json.dumps(m, sort_keys=True) for m in contest["machines"].values()))
    rows = [["recipe", contest["recipe"]], ["settings", " ".join(contest["settings"]) or "as in the recipe"],
            ["seeds", ", ".join(map(str, contest["seeds"]))]]  # fmt: skip
    rows += [["machine", ", ".join(f"{k} {v}" for k, v in json.loads(m).items() if v)] for m in machines]
    rows += [[f"code of {slug}", digest] for slug, digest in contest["digests"].items()]
    arms = [[arm.name, arm.role, arm.control_of or "-", arm.note or "-", " ".join(arm.settings) or "-"]
            for arm in _ordered(results)]  # fmt: skip
    return (
        "<h2>What was run</h2>"
        + table(["arm", "role", "control of", "what it is", "settings"], arms, "Arms", keys=[row[0] for row in arms])
        + f"<details><summary>Conditions</summary>{table(['', ''], rows, 'Conditions, machines and code')}</details>"
    )


def _label(arm: Arm) -> str:
    """Controls stand behind the method that they belong to."""
    return f"{arm.name} (control)" if arm.control_of else arm.name


# -- numbers ----------------------------------------------------------------------------------------------------------


def _ks(results: Results) -> list[int]:
    names = {name for row in results.evaluations[:1] for name in row if name.startswith("pass@")}
    return sorted(int(name.removeprefix("pass@")) for name in names)


def _cell(mean: float, half: float, *, signed: bool = False) -> str:
    """A mean with its half-width; a dash where either is undefined, but a single seed's figure with its reason."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return f"{text}{_NBSP}(1 seed)" if math.isnan(half) else f"{text}{_NBSP}±{_NBSP}{half:.3f}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "undefined"


def _within(half: float) -> str:
    return f" ± {half if half > _NOTHING else 0:.2g}" if math.isfinite(half) else ""


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _short(values: Vector) -> list[float]:
    return [_round(float(value)) for value in values]
