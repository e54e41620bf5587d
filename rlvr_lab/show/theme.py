"""House style of every figure: one template, one palette, and no figure without a description in words.

The palette was chosen by computation: the smallest CIEDE2000 distance between any two colours is at least 16 under
normal, protan, deutan and tritan vision, and each has contrast >= 3.2:1 against page and cell backgrounds. That is
enough for lines and fills, not for text, so text is always drawn in the theme's ink. Colour is never the only cue:
each series also has its own dash, marker and bar pattern. Figures carry the light palette; the book's
``plotly-boot.js`` swaps it for the dark one when the reader's theme is dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import plotly.graph_objects as go
import plotly.io as pio

__all__ = [
    "BASELINE",
    "DARK",
    "PALETTE",
    "SERIES",
    "Style",
    "band",
    "bars",
    "direct_labels",
    "figure",
    "line",
    "rgba",
    "style_of",
]

Numbers: TypeAlias = Sequence[float] | Any
"""A list of numbers or a one-dimensional numpy array or tensor."""

Series: TypeAlias = int | Literal["baseline"]
"""Which style a trace gets: the position of a compared method (0-3), or the baseline."""

PALETTE = {"blue": "#0961EB", "amber": "#B57B16", "green": "#1F6848", "magenta": "#B00277", "ink": "#222832"}
DARK = {"blue": "#0F81FA", "amber": "#D69624", "green": "#2EF99B", "magenta": "#E92D97", "ink": "#E6EAEE"}


@dataclass(frozen=True)
class Style:
    """How one series looks; any one of the four attributes identifies it."""

    colour: str
    dash: str
    symbol: str
    pattern: str


SERIES = (
    Style(PALETTE["blue"], "solid", "circle", ""),
    Style(PALETTE["amber"], "dash", "square", "/"),
    Style(PALETTE["green"], "dashdot", "diamond", "x"),
    Style(PALETTE["magenta"], "longdash", "triangle-up", "\\"),
)
BASELINE = Style(PALETTE["ink"], "dot", "x", ".")

_MIN_ALT = 30  # characters; shorter texts turned out to be titles ("Entropy by step"), not descriptions
_MARKERS_SHOWN = 9  # enough to tell series apart without turning a 500-step curve into beads


def _template() -> go.layout.Template:
    axis = {"showline": True, "ticks": "outside", "zeroline": False, "automargin": True, "title": {"standoff": 10}}
    return go.layout.Template(
        layout={
            "colorway": [style.colour for style in SERIES] + [BASELINE.colour],
            "font": {"family": "system-ui, sans-serif", "size": 14, "color": PALETTE["ink"]},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 64, "r": 16, "t": 40, "b": 56},
            "height": 380,
            "hovermode": "x unified",
            "xaxis": axis | {"showgrid": False},
            "yaxis": axis | {"showgrid": True},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        }
    )


pio.templates["rlvr"] = _template()


def style_of(series: Series) -> Style:
    """The style of a series; more than four compared methods do not fit in one readable figure."""
    if series == "baseline":
        return BASELINE
    if not 0 <= series < len(SERIES):
        raise ValueError(f"series must be 'baseline' or 0..{len(SERIES) - 1}, got {series}: split the figure")
    return SERIES[series]


def rgba(colour: str, alpha: float) -> str:
    """A palette colour with opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha:g})"  # plotly-boot.js recognises exactly this spelling


def line(x: Numbers, y: Numbers, *, name: str, series: Series) -> go.Scatter:
    """A line with the colour, dash and markers of its series."""
    style = style_of(series)
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"color": style.colour, "symbol": style.symbol, "size": 8, "maxdisplayed": _MARKERS_SHOWN},
    )


def band(x: Numbers, low: Numbers, high: Numbers, *, name: str, series: Series) -> go.Scatter:
    """An interval around a line of the same series; say in ``name`` what it is, e.g. "95% interval, 5 seeds".

    One closed outline (forward along ``low``, back along ``high``) instead of two filled traces: it stays one entry
    in the legend and one element for hover.
    """
    xs, lows, highs = list(x), list(low), list(high)
    if not len(xs) == len(lows) == len(highs):
        raise ValueError("x, low and high must have equal length")
    if any(bottom > top for bottom, top in zip(lows, highs, strict=True)):
        raise ValueError("low lies above high")
    return go.Scatter(
        x=xs + xs[::-1],
        y=lows + highs[::-1],
        name=name,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=rgba(style_of(series).colour, 0.18),
        hoverinfo="skip",
    )


def bars(x: Sequence[Any], y: Numbers, *, name: str, series: Series) -> go.Bar:
    """Bars with the colour and the hatching of their series."""
    style = style_of(series)
    return go.Bar(x=x, y=y, name=name, marker={"color": style.colour, "pattern": {"shape": style.pattern}})


def figure(*traces: Any, alt: str, x: str, y: str, **layout: Any) -> go.Figure:
    """A figure in the house style.

    ``alt`` says in one or two sentences what the figure shows: it is read aloud, and printed where no script runs.
    ``x`` and ``y`` are axis titles with units ("entropy (nats)"). A ``title`` stands in a row of its
    own above the legend; the rest of ``layout`` goes to plotly unchanged.
    """
    if len(alt.strip()) < _MIN_ALT or not alt.strip().endswith("."):
        raise ValueError("alt must be a sentence that says what the figure shows, and end with a full stop")
    for axis, title in (("x", x), ("y", y)):
        if not title.strip():
            raise ValueError(f"the {axis} axis needs a title with its unit")
    result = go.Figure(list(traces), layout={"template": "rlvr", "meta": {"alt": alt.strip()}})
    heading = layout.pop("title", None)
    result.update_layout(xaxis_title_text=x, yaxis_title_text=y, **layout)
    if heading:
        # a row of its own above the legend, left of the toolbar: plotly's default lies on both
        place = {"x": 0, "xref": "container", "xanchor": "left", "y": 0.98, "yref": "container", "yanchor": "top"}
        result.update_layout(title={"text": heading, "font": {"size": 15}, **place}, margin_t=96, height=420)
    return result


def direct_labels(fig: go.Figure, *, min_gap: float = 0.07) -> go.Figure:
    """Name each line at its right end instead of in a legend, so that no eye has to travel; returns ``fig``.

    Labels closer than ``min_gap`` of the vertical range are pushed apart from below. For linear axes. Bands (traces
    without markers) need no label: they sit around a labelled line.
    """
    lines = [t for t in fig.data if t.type == "scatter" and t.name and "markers" in (t.mode or "")]
    ends = sorted(((float(t.y[-1]), t.x[-1], t.name) for t in lines), key=lambda end: end[0])
    values = [float(v) for t in fig.data if t.type == "scatter" for v in t.y]
    gap = min_gap * ((max(values) - min(values)) or 1.0) if values else 0.0
    lowest_free = float("-inf")
    for height, right, name in ends:
        placed = max(height, lowest_free)
        lowest_free = placed + gap
        fig.add_annotation(x=right, y=placed, text=name, showarrow=False, xanchor="left", xshift=10)
    fig.update_layout(showlegend=False)
    return fig
