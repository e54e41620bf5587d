"""The page of an evaluation: complete without network, undefined figures as dashes, text escaped, curves as given."""

from __future__ import annotations

import json
import re

import pytest

from rlvr_lab.evaluate.evaluation import ProblemResult, summarise
from rlvr_lab.show.evaluation_page import evaluation_page, shown

PROBLEMS = [ProblemResult(f"p{i}", 4, i, min(i, 1), 0.5, 10.0, 0.75, None, ((4, i > 2),)) for i in range(5)]
SUMMARY = {"source": "a<b>.jsonl"} | summarise(PROBLEMS, 1.0)


def test_the_page_shows_what_the_summary_says() -> None:
    page = evaluation_page("tiny/<S>", {"aime24": SUMMARY, "amc23": SUMMARY}, {"seed": 0})
    assert "tiny/&lt;S&gt;" in page
    assert "a&lt;b&gt;.jsonl" in page
    assert "<b>" not in page.split("</main>")[0]
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page.split("<script>")[0])
    curves = [json.loads(spec) for spec in re.findall(r'<figure class="plot"><script[^>]*>(.*?)</script>', page)]
    assert len(curves) == 2
    drawn = {trace["name"]: trace for trace in curves[0]["data"]}
    assert drawn["pass@k"]["x"] == [1, 2, 4]
    assert drawn["pass@k"]["y"] == [SUMMARY[f"pass@{k}"] for k in (1, 2, 4)]
    assert drawn["maj@k"]["y"] == [SUMMARY[f"maj@{k}"] for k in (1, 2, 4)]


def test_figures_as_text() -> None:
    low, high = SUMMARY["pass@1_interval"]
    assert shown(SUMMARY, "pass@1") == f"50.0% ({low:.1%} to {high:.1%})"
    assert shown(SUMMARY, "token_entropy") == shown(SUMMARY, "absent") == shown({"x": float("nan")}, "x") == "-"
    assert shown(SUMMARY, "truncated") == "25.0%"
    assert shown(SUMMARY, "problems") == "5"
    assert shown(SUMMARY, "mean_tokens") == "10.000"


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one summary"):
        evaluation_page("m", {}, {})
