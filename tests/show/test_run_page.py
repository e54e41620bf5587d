"""Pages about runs: they parse, load nothing, escape what a run says, and show what was measured and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import HOSTILE, metrics_row, sample_row

from rlvr_lab.show import run_page, theme, transcript
from rlvr_lab.show.run_page import page, samples_page, transcripts
from rlvr_lab.show.run_page_report import CHARTS, MOST_STEPS, RunView, report_page

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements with attributes and text; a tag that closes what is not open is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def said(self, *tags: str) -> str:
        return " ".join(" ".join(self.texts.get(tag, ())) for tag in tags)


def view(name: str = "first", steps: int = 12, **values: Any) -> RunView:
    rows = [metrics_row(step) for step in range(steps)]
    known = {k: [float("nan") if r[k] is None else float(r[k]) for r in rows] for k in rows[0] if k != "step"}
    finding = {
        "title": "Entropy collapses", "severity": "critical", "likelihood": 0.8, "cause": "because", "steps": (0, 11),
        "evidence": ("entropy 0.2 -> 0.01",), "follows_from": None, "change": "optimizer.lr=1e-4",
    }  # fmt: skip
    passes = {"pass@1": 0.2, "pass@1_interval": [0.1, 0.3], "pass@4": 0.5, "pass@4_interval": [0.4, 0.6]}
    made = RunView(
        name, list(range(steps)), known,
        evaluations=[{"step": s, "held_out": True, "distinct_correct": 1.5, **passes} for s in (0, steps)],
        settings={"optimizer.lr": "0.0001", "seed": "0"}, facts={"steps": "steps 0 to 11"}, verdict="1 finding",
        findings=[finding], remarks=["no summary.json"], samples=[sample_row(0), sample_row(1)],
    )  # fmt: skip
    return replace(made, **values)


def outside_plotly(text: str) -> str:
    """The page without plotly's own source, which names addresses that it does not load from here."""
    return re.sub(r"<script>/\*\*?\s*\n?\*? ?plotly\.js.*?</script>", "", text, flags=re.S)


@pytest.mark.parametrize(
    "text", [samples_page([sample_row(0)], "run"), report_page("t", [view()])], ids=["samples", "report"]
)
def test_pages_parse_and_name_nothing_outside(text: str) -> None:
    own = outside_plotly(text)
    assert len(own) < 200_000
    assert not re.search(r"https?://|//cdn|@import|url\(", own)
    parsed = Page(own)
    assert all(a.get("src") is None and a.get("href", "data:,") == "data:," for _, a in parsed.elements)
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_what_an_environment_said_has_no_entropy_and_says_so() -> None:
    row = sample_row(3, token_logprob=[0.0, None, -0.5], token_entropy=[0.0, None, 0.25],
                     token_told=[False, True, False])  # fmt: skip
    marked = [a for a in Page(samples_page([row], "run")).all("span") if "title" in a]
    assert [a["class"] for a in marked] == ["t", "t told", "t"]
    assert marked[1]["title"] == "+: said by the environment"


def test_a_token_tells_its_text_probability_and_entropy() -> None:
    parsed = Page(samples_page([sample_row(3)], "run"))
    titles = [a["title"] for a in parsed.all("span") if "title" in a]
    assert titles == [
        "2: probability 1, log-prob 0.000 nats, entropy 0.000 nats",
        "+: probability 0.25, log-prob -1.386 nats, entropy 1.500 nats",
        "↵: probability 0.607, log-prob -0.500 nats, entropy 0.250 nats",
    ]
    assert [a["class"] for a in parsed.all("span") if "title" in a] == ["t", "t high", "t"]
    assert [a["style"] for a in parsed.all("span") if "title" in a] == ["--h:0", "--h:1.5", "--h:0.25"]
    assert "step 3 · wrong · answer (2+3) · reward 1 · 3 tokens, mean entropy 0.583 nats" in parsed.said("h3")
    (tokens,) = parsed.all("div", role="group")
    assert tokens["tabindex"] == "0"


def test_what_is_missing_is_said_and_does_not_break_the_page() -> None:
    old = {"step": 0, "problem": "p", "response": "words", "correct": False, "answer": None, "token_entropy": [0.1]}
    odd = sample_row(1, token_logprob=[None, None, None], token_entropy=[None, 0.2, 0.4], finished=False, reward=None)
    parsed = Page(samples_page([old, odd], "run"))
    assert "no answer" in parsed.said("h3")
    assert "cut off" in parsed.said("h3")
    assert "words" in parsed.said("div")
    assert next(a["title"] for a in parsed.all("span") if "title" in a) == "2: entropy not measured"
    assert "No transcript" in samples_page([], "run")


def test_what_a_run_says_is_text() -> None:
    row = sample_row(0, problem=HOSTILE, answer=HOSTILE, tokens=[HOSTILE, "<b>", "&amp;"]) | {"step": HOSTILE}
    bare = sample_row(1, tokens=None, response=HOSTILE)
    hostile = view(HOSTILE, samples=[row, bare], settings={HOSTILE: HOSTILE}, verdict=HOSTILE, remarks=[HOSTILE],
                   facts={HOSTILE: HOSTILE}, findings=[{**view().findings[0], "cause": HOSTILE, "title": HOSTILE,
                                                        "evidence": [HOSTILE], "severity": HOSTILE}])  # fmt: skip
    both = report_page(HOSTILE, [hostile, replace(hostile, name=HOSTILE + "2")])
    for text in (samples_page([row, bare], HOSTILE), report_page(HOSTILE, [hostile]), both):
        parsed = Page(outside_plotly(text))
        assert parsed.all("img") == []
        assert "owned" not in " ".join(t for t in parsed.texts["script"] if "owned" in t and not t.startswith("{"))
        assert not any("onerror" in a for _, a in parsed.elements)


def test_a_large_run_is_limited_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "MOST", 7)
    monkeypatch.setattr(run_page, "LONGEST", 2)
    parsed = Page(page("t", transcripts([sample_row(i) for i in range(9)])))
    assert len(parsed.all("article")) == 3
    said = parsed.said("p")
    assert "6 more are in samples.jsonl" in said
    assert said.count("1 more tokens are left out") == 3
    assert len([a for a in parsed.all("span") if "title" in a]) == 6


def test_a_long_run_is_thinned_evenly_and_keeps_its_ends() -> None:
    steps = 3 * MOST_STEPS
    text = report_page("t", [view(steps=steps)])
    specs = [json.loads(s) for s in re.findall(r'<script type="application/json">(\{"data".*?)</script>', text)]
    assert specs
    assert max(len(trace["x"]) for spec in specs for trace in spec["data"]) <= MOST_STEPS + 1
    assert "thinned" in Page(outside_plotly(text)).said("p")


def test_curves_show_what_was_measured() -> None:
    text = outside_plotly(report_page("t", [view()]))
    parsed = Page(text)
    titles = parsed.said("h3")
    assert "Clipped tokens" in titles
    assert "Age of the data" not in titles  # no column of it
    labels = " ".join(a["aria-label"] for a in parsed.all("div", role="img"))
    assert "ledger_forecast is -0.003 at step 1 and -0.003 at step 11" in labels
    assert "clip_high is 0 at step 0 and 0.002 at step 11, between 0 and 0.002" in labels
    empty = outside_plotly(report_page("t", [view(steps=1, columns={}, evaluations=(), samples=())]))
    said = Page(empty).said("p")
    assert "No step is logged yet" in said
    assert "None was made" in said


def test_several_runs_share_figures_and_their_differences_come_first() -> None:
    second = view("second", settings={"optimizer.lr": "0.001", "seed": "0"})
    parsed = Page(outside_plotly(report_page("t", [view(), second])))
    captions = parsed.said("caption")
    assert "Settings that differ" in captions
    assert "Reward and accuracy: accuracy" in parsed.said("h3")
    labels = [a["aria-label"] for a in parsed.all("div", role="img")]
    assert any(label.startswith("By step, accuracy: first is") and "; second is" in label for label in labels)
    same = Page(outside_plotly(report_page("t", [view(), view("second")])))
    assert "All settings are equal" in same.said("p")
    with pytest.raises(ValueError, match="1 to 4 runs"):
        report_page("t", [view(str(i)) for i in range(5)])


def test_findings_and_evaluations_are_told() -> None:
    parsed = Page(outside_plotly(report_page("t", [view()])))
    assert "entropy 0.2 -> 0.01" in parsed.said("li")
    assert "optimizer.lr=1e-4" in parsed.said("code")
    assert "20.0% (10.0% to 30.0%)" in parsed.said("td")
    note = {**view().findings[0], "severity": "note", "follows_from": "learning_rate"}
    parsed = Page(outside_plotly(report_page("t", [view(findings=[note])])))
    assert parsed.said("code") == ""
    assert "learning_rate" in parsed.said("b")


def test_every_chart_fits_the_palette_and_has_its_sentence() -> None:
    assert all(1 <= len(chart.columns) <= len(theme.SERIES) and chart.look.endswith(".") for chart in CHARTS)
    assert len({chart.title for chart in CHARTS}) == len(CHARTS)


def test_the_style_sheet_has_the_hues_of_the_house() -> None:
    css = (Path(run_page.__file__).parent / "pages" / "page.css").read_text()
    light, dark = css.split(':root[data-theme="dark"]')
    for name, hue in (("accent", "blue"), ("warning", "amber"), ("critical", "magenta"), ("ink", "ink")):
        assert f"--{name}: {theme.PALETTE[hue]};" in light
        assert f"--{name}: {theme.DARK[hue]};" in dark.partition("}")[0]
    assert f"--amber: {transcript._AMBER};" in light
    assert f"calc({str(transcript._STRONGEST).lstrip('0')} *" in css
