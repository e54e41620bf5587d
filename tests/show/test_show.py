"""Figures, the plotly plug-in of the book, and token transcripts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlvr_lab.show import theme
from rlvr_lab.show.mime import MIME, PlotlyMime, figure_html
from rlvr_lab.show.transcript import transcript_html

ALT = "The mean token entropy falls from 1.0 to 0.1 nats."


@pytest.mark.parametrize(
    ("alt", "x", "y"),
    [("", "step", "nats"), ("Entropy by step", "step", "nats"), (ALT, " ", "nats"), (ALT, "step", "")],
)
def test_figure_without_description_or_axis_title_is_refused(alt: str, x: str, y: str) -> None:
    with pytest.raises(ValueError, match=r"alt must be|needs a title"):
        theme.figure(alt=alt, x=x, y=y)


def test_series_differ_in_more_than_colour() -> None:
    styles = [*theme.SERIES, theme.BASELINE]
    for attribute in ("colour", "dash", "symbol", "pattern"):
        assert len({getattr(style, attribute) for style in styles}) == len(styles), attribute
    assert theme.BASELINE.colour == theme.PALETTE["ink"]
    with pytest.raises(ValueError, match="split the figure"):
        theme.style_of(4)


def test_palette_has_contrast_on_both_pages() -> None:
    """3:1 is what WCAG 1.4.11 demands of lines; the backgrounds are those of the book's theme."""
    for palette, page in ((theme.PALETTE, "#FFFFFF"), (theme.DARK, "#14181E")):
        for name, colour in palette.items():
            assert contrast(colour, page) >= 3, (name, colour)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_band_is_a_closed_outline_and_checks_its_order() -> None:
    trace = theme.band([0, 1], np.array([1.0, 2.0]), [3.0, 4.0], name="interval", series="baseline")
    assert list(trace.x) == [0, 1, 1, 0]
    assert list(trace.y) == [1, 2, 4, 3]
    with pytest.raises(ValueError, match="low lies above high"):
        theme.band([0], [2.0], [1.0], name="interval", series=0)


def test_direct_labels_do_not_overlap() -> None:
    lines = [theme.line([0, 1], [0.0, end], name=f"m{i}", series=i) for i, end in enumerate((1.0, 1.0, 0.99, 0.2))]
    fig = theme.direct_labels(theme.figure(*lines, alt=ALT, x="step", y="nats"))
    heights = sorted(note.y for note in fig.layout.annotations)
    assert len(heights) == 4
    assert min(np.diff(heights)) >= 0.07 - 1e-9


def test_description_survives_serialisation() -> None:
    spec = json.loads(theme.figure(theme.line([0], [1], name="a", series=0), alt=ALT, x="step", y="nats").to_json())
    assert spec["layout"]["meta"]["alt"] == ALT


class FakeRenderer:
    """As much of MyST-NB's renderer as the plug-in uses."""

    def __init__(self, builder: str) -> None:
        self.warnings: list[str] = []
        self.scripts: list[str] = []
        self.renderer = SimpleNamespace(
            sphinx_env=SimpleNamespace(app=SimpleNamespace(builder=SimpleNamespace(name=builder)))
        )
        self.logger = SimpleNamespace(warning=lambda text, **_: self.warnings.append(text))

    def add_js_file(self, key: str, path: str, attributes: dict[str, str]) -> None:
        self.scripts.append(path)


def render(spec: dict[str, Any], builder: str = "html") -> tuple[FakeRenderer, Any]:
    renderer = FakeRenderer(builder)
    return renderer, PlotlyMime.handle_mime(renderer, SimpleNamespace(mime_type=MIME, content=spec, line=1), False)


def test_plugin_embeds_figure_with_local_scripts() -> None:
    renderer, (node,) = render(
        {"data": [], "layout": {"meta": {"alt": ALT}, "height": 500}, "config": {"u": "https://x"}}
    )
    assert renderer.warnings == []
    assert renderer.scripts == ["vendor/plotly.min.js", "plotly-boot.js"]
    assert "https" not in node.astext()
    assert "min-height:500px" in node.astext()


def test_plugin_warns_without_description_and_falls_back_to_words_on_paper() -> None:
    assert render({"data": [], "layout": {}})[0].warnings
    _, (paragraph,) = render({"data": [], "layout": {"meta": {"alt": ALT}}}, builder="latex")
    assert ALT in paragraph.astext()


def test_figure_cannot_end_its_own_script_element() -> None:
    html = figure_html({"data": [{"name": "</script><b>"}], "layout": {}}, 'a "quoted" <alt>')
    assert html.count("</script>") == 1
    assert "<alt>" not in html


def test_transcript_text_is_stable_and_counts() -> None:
    tokens, values = ["a", " 4", "\n"], [1.0, -1e-8, 0.5]
    shown = transcript_html(tokens, values, kinds=["fork", "computed", "other"])
    assert repr(shown) == (
        "TokenTranscript(3 tokens; mean entropy 0.500 nats; 1 at or above 0.693 nats; "
        "fork: 1.000 nats over 1; computed: 0.000 nats over 1; other: 0.500 nats over 1)"
    )
    html = shown._repr_html_()
    assert html == transcript_html(tokens, values, kinds=["fork", "computed", "other"])._repr_html_()
    assert html.count('class="rlt-high"') == 1
    assert "http" not in html


def test_transcript_escapes_what_a_model_writes() -> None:
    html = transcript_html(["<script>"], [3.0], kinds=['"x"'], title="<b>")._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html


@pytest.mark.parametrize(("tokens", "entropy"), [(["a"], []), (["a"], [math.nan]), (["a"], [-0.1])])
def test_transcript_refuses_impossible_input(tokens: list[str], entropy: list[float]) -> None:
    with pytest.raises(ValueError, match=r"equal length|finite"):
        transcript_html(tokens, entropy)


def test_figures_do_not_need_anywidget() -> None:
    """Training machines have no widgets; only the widgets package may import anywidget."""
    code = "import sys, rlvr_lab.show.theme, rlvr_lab.show.transcript; sys.exit('anywidget' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
