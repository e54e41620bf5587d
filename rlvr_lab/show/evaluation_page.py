"""The page of an evaluation: a table over benchmarks, and for each of them pass@k and maj@k with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from . import theme
from .run_page import table
from .run_page_report import figures_page, plot

__all__ = ["evaluation_page"]


def evaluation_page(model: str, summaries: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Self-contained HTML. `summaries`: by name, as `evaluate.evaluation.summarise` gives them. Raises ValueError for
    none."""
    if not summaries:
        raise ValueError("an evaluation page needs at least one summary")
    body = [
        table(["", *summaries], _figures(summaries), "Means over problems; 95 % bootstrap intervals over problems"),
        "<h2>pass@k and maj@k</h2><p>pass@k is the chance that one of k samples is correct, maj@k that the most "
        "frequent answer of k is. Where pass@k rises and maj@k does not, the right answers are there but rare.</p>",
        '<div class="plots">',
        *(f"<div><h3>{escape(name)}</h3>{_curves(name, summary)}</div>" for name, summary in summaries.items()),
        "</div><h2>Settings</h2>",
        table(["setting", "value"], [[k, str(v)] for k, v in settings.items()], "What was asked for"),
    ]
    return figures_page(f"Evaluation of {model}", body)


def _figures(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(n for s in summaries.values() for n in s if not n.endswith("_interval")))
    return [[name, *(shown(summary, name) for summary in summaries.values())] for name in names]


def shown(summary: Mapping[str, Any], name: str) -> str:
    """A figure of a summary as text, with its interval where it has one; a dash where it is undefined."""
    value, interval = summary.get(name), summary.get(f"{name}_interval")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if name.startswith(("pass@", "maj@", "avg@", "finished", "truncated")):
        return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")
    return f"{value:.3f}"


def _curves(name: str, summary: Mapping[str, Any]) -> str:
    traces, told = [], []
    for series, kind in enumerate(("pass", "maj")):
        ks = sorted(int(key.split("@")[1]) for key in summary if key.startswith(f"{kind}@") and key[-1].isdigit())
        values = [summary[f"{kind}@{k}"] for k in ks]
        low, high = zip(*(summary[f"{kind}@{k}_interval"] for k in ks), strict=True)
        traces += [
            theme.band(ks, low, high, name=f"95% interval, {summary['problems']} problems", series=series),
            theme.line(ks, values, name=f"{kind}@k", series=series),
        ]
        told.append(f"{kind}@{ks[0]} is {values[0]:.1%} and {kind}@{ks[-1]} {values[-1]:.1%}")
    axis = {"type": "log", "tickmode": "array", "tickvals": ks, "ticktext": [str(k) for k in ks]}
    return plot(traces, alt=f"{name}: {'; '.join(told)}.", x="samples k", y="share of problems", xaxis=axis)
