"""The arena's page: complete without network, figures and words as the results have them, arms switched by script."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contest_rows
import pytest
from run_folders import HOSTILE
from typer.testing import CliRunner

from rlvr_lab.arena import Arm, between_curves, load_results, matched, save_results
from rlvr_lab.arena.report import arena_page, write_arena_report
from rlvr_lab.cli import app
from rlvr_lab.errors import UserError


def figures(page: str) -> dict[str, dict[str, Any]]:
    """Figures by their heading."""
    found = re.findall(r'<h3>([^<]*)</h3><p>[^<]*</p><figure class="plot"><script[^>]*>(.*?)</script>', page, re.S)
    return {title: json.loads(spec) for title, spec in found}


def body(page: str) -> str:
    return page.split("</main>")[0]


def lines(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {t["name"]: t for t in spec["data"] if t["type"] == "bar" or not t.get("fill")}


def rows(page: str, caption: str) -> dict[str, list[str]]:
    """Cells of the table with a caption that begins so, by row."""
    table = re.search(rf'<caption class="muted">{re.escape(caption)}.*?</table>', page, re.S)
    assert table is not None
    text = table.group().replace("\N{NO-BREAK SPACE}", " ")
    found = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', text)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in found}


PAGE = arena_page(contest_rows.results())


def test_the_page_stands_alone() -> None:
    assert not re.search(r"""(src|href)=["'](https?:)?//""", body(PAGE))
    assert "NaN" not in "".join(re.findall(r"<script type=.application/json.[^>]*>(.*?)</script>", PAGE, re.S))


def test_every_figure_has_every_arm_in_numbers_and_in_words() -> None:
    drawn = figures(PAGE)
    assert list(drawn) == [
        "token entropy (nats) against pass@1", "distinct correct answers per problem against pass@1",
        "pass@4 against pass@1", "Reward", "Entropy path", "pass@1", "pass@k", "pass@4", "Distinct correct answers",
        "Length", "Step cost",
    ]  # fmt: skip
    for spec in drawn.values():
        assert set(lines(spec)) - {"before training"} == set(contest_rows.CURVES)
        assert set(spec["layout"]["meta"]["told"]) == set(contest_rows.CURVES)
        assert all(trace["meta"]["arm"] in contest_rows.CURVES for trace in spec["data"] if "meta" in trace)
    accuracy = lines(drawn["pass@1"])
    assert accuracy["grpo"]["x"] == [0, 5, 10]
    assert accuracy["grpo"]["y"] == pytest.approx([0.2, 1 / 3, 0.5], abs=1e-4)
    assert lines(drawn["pass@k"])["before training"]["y"] == pytest.approx([0.2, 0.4])
    assert lines(drawn["Step cost"])["kl_cov"]["y"][0] == pytest.approx((3 / 2 + 3.1 / 2.1 + 3.2 / 2.2) / 3, abs=1e-4)
    path = lines(drawn["distinct correct answers per problem against pass@1"])["kl_cov"]
    assert path["x"] == pytest.approx([0.2, (0.4 + 0.5 + 0.5) / 3], abs=1e-4)
    assert path["error_y"]["array"][0] == 0
    assert path["error_y"]["array"][1] == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert "kl_cov goes from 0.2 to 0.467" in drawn["pass@1"]["layout"]["meta"]["told"]["kl_cov"]


def test_tables_at_matched_steps_and_at_matched_accuracy() -> None:
    last = rows(PAGE, "Last evaluation")
    assert list(last) == ["grpo", "kl_cov", "kl_cov_random (control)"]
    assert last["grpo"][0] == "0.500 ± 0.248"
    assert last["grpo"][-2:] == ["3", "none"]
    against = rows(PAGE, "Method minus control")
    assert against["kl_cov - kl_cov_random"][2] == "+0.100 ± 0.248"
    found = matched(contest_rows.results(), "kl_cov", "distinct_correct")
    level = rows(PAGE, "Arm minus early-stopped GRPO")
    assert level["kl_cov"][1] == f"+{found.mean:.3f} ± {found.half:.3f}"
    assert level["kl_cov"][3:5] == ["1 of 3", "not told apart from it"]
    assert level["grpo"][1] == "+0.000 ± 0.000"
    whole = between_curves(contest_rows.results(), "kl_cov", "distinct_correct")
    assert level["kl_cov"][5] == f"{whole.mean:+.3f} ± {whole.half:.3f}"
    reached = rows(PAGE, "All arms where their pass@1 first reaches 0.500")
    assert reached["kl_cov_random (control)"] == ["-", "-", "-", "0 of 3"]
    assert reached["grpo"][-1] == "2 of 3"


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    one = {arm: {0: curves[0]} for arm, curves in contest_rows.CURVES.items()}
    page = arena_page(contest_rows.results(one))
    assert rows(page, "Last evaluation")["grpo"][0] == "0.500 (1 seed)"
    assert rows(page, "Arm minus early-stopped GRPO")["kl_cov"][4] == "-"
    assert not [t for spec in figures(page).values() for t in spec["data"] if t.get("fill")]


def test_what_is_undefined_is_a_dash() -> None:
    found = contest_rows.results()
    for row in found.evaluations:
        row["token_entropy"] = None
    page = arena_page(found)
    assert rows(page, "Last evaluation")["grpo"][3] == "-"
    assert "undefined" in figures(page)["token entropy (nats) against pass@1"]["layout"]["meta"]["told"]["grpo"]


def test_runs_that_ended_early_are_named() -> None:
    page = arena_page(contest_rows.results(stopped={"kl_cov seed 1": "the loss is not finite at step 7"}))
    assert "kl_cov seed 1: the loss is not finite at step 7" in page
    assert rows(page, "Last evaluation")["kl_cov"][-1] == "1"


def test_arms_named_are_those_switched_on() -> None:
    page = arena_page(contest_rows.results(), ["kl_cov_random"])
    assert re.findall(r'value="([^"]*)"[^>]* checked>', page) == ["grpo", "kl_cov_random"]
    on = [trace["name"] for trace in figures(page)["pass@1"]["data"] if trace["visible"] and not trace.get("fill")]
    assert on == ["grpo", "kl_cov_random"]
    with pytest.raises(UserError, match=r"--arms.*'kl_cob'.*kl_cov"):
        arena_page(contest_rows.results(), ["kl_cob"])


def test_results_without_grpo_are_refused() -> None:
    with pytest.raises(UserError, match="no finished run of grpo"):
        arena_page(contest_rows.results({"kl_cov": contest_rows.CURVES["kl_cov"]}))


def test_names_and_failures_are_text() -> None:
    found = contest_rows.results({**contest_rows.CURVES, HOSTILE: contest_rows.CURVES["kl_cov"]})
    found.arms[HOSTILE] = Arm(HOSTILE, note=HOSTILE, control_of="kl_cov", role="control")
    found.stopped[f"{HOSTILE} seed 0"] = HOSTILE
    page = arena_page(found, [HOSTILE])
    assert "<img src=x" not in body(page)
    assert page.count("</main>") == 1


def test_the_command_writes_the_page_beside_the_results(tmp_path: Path) -> None:
    save_results(tmp_path / "results.json", contest_rows.results())
    runner = CliRunner()
    done = runner.invoke(app, ["arena", "report", str(tmp_path), "--arms", "kl_cov"])
    assert done.exit_code == 0, done.output
    read = load_results(tmp_path / "results.json")
    assert (tmp_path / "arena.html").read_text() == arena_page(read, ["kl_cov"])
    assert write_arena_report(tmp_path / "results.json", tmp_path / "x.html") == tmp_path / "x.html"
    for arguments in (["--arms", "nope"], ["--out", str(tmp_path / "no" / "p.html")]):
        wrong = runner.invoke(app, ["arena", "report", str(tmp_path), *arguments])
        assert wrong.exit_code == 2
        assert arguments[0] in wrong.output
    (tmp_path / "empty").mkdir()
    assert runner.invoke(app, ["arena", "report", str(tmp_path / "empty")]).exit_code == 2


# -- in a browser -----------------------------------------------------------------------------------------------------


def _helper() -> Any:
    path = Path(__file__).parents[1] / "book" / "browser.py"
    spec = importlib.util.spec_from_file_location("arena_browser_helper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


helper = _helper()
_ABLE = helper.CHROMIUM and helper.CHROMEDRIVER and importlib.util.find_spec("selenium")
needs_browser = pytest.mark.skipif(not _ABLE, reason="needs chromium, chromium-driver, selenium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "arena.html").write_text(PAGE, encoding="utf-8")
    with helper.serve(folder) as base:
        session = helper.Browser(base)
        yield session
        session.close()


DRAWN = """return [...document.querySelectorAll('figure.plot')].map((figure) =>
  figure.querySelector('.plot-box').data.filter((t) => t.visible && t.meta?.arm && !t.fill).map((t) => t.name));"""
COLOURS = """const box = [...document.querySelectorAll('figure.plot .plot-box')][3];
  const lines = box.data.filter((t) => t.line && !t.fill);
  return Object.fromEntries(lines.map((t) => [t.name, t.line.color + t.line.dash]));"""


@pytest.mark.browser
@needs_browser
def test_the_page_is_silent_and_accessible_in_both_themes(browser: Any) -> None:
    assert browser.open("arena.html").complaints() == []
    for _ in range(2):
        assert browser.axe() == []
        browser.js("document.getElementById('theme').click()")


@pytest.mark.browser
@needs_browser
def test_arms_are_switched_with_the_keyboard_and_the_words_follow(browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open("arena.html")
    everything = ["grpo", "kl_cov"]
    assert browser.js(DRAWN) == [everything] * 11
    before = browser.js(COLOURS)
    box = browser.driver.find_element(By.CSS_SELECTOR, "input[value=kl_cov_random]")
    browser.js("arguments[0].focus()", box)
    box.send_keys(Keys.SPACE)
    assert browser.js(DRAWN) == [["grpo", "kl_cov", "kl_cov_random"]] * 11
    after = browser.js(COLOURS)
    assert len(set(after.values())) == 3  # each its own style
    assert after["grpo"] == before["grpo"]
    captions = browser.js("return [...document.querySelectorAll('figure.plot figcaption')].map((c) => c.textContent)")
    labels = browser.js("return [...document.querySelectorAll('.plot-box')].map((c) => c.getAttribute('aria-label'))")
    assert captions == labels
    assert all("kl_cov_random" in caption for caption in captions)
    assert "3 of 3" in browser.js("return document.getElementById('shown').textContent")
    browser.js("document.getElementById('none').click()")
    assert browser.js(DRAWN) == [["grpo"]] * 11
    browser.js("const f = document.getElementById('family'); f.value = 'kl_cov'; f.dispatchEvent(new Event('change'));")
    assert browser.js(DRAWN)[0] == ["grpo", "kl_cov", "kl_cov_random"]
    assert browser.js("return document.querySelectorAll('tr.chosen').length") > 0


@pytest.mark.browser
@needs_browser
def test_one_accuracy_at_a_time_is_tabled(browser: Any) -> None:
    browser.open("arena.html")
    shown = "return [...document.querySelectorAll('[data-level]')].filter((p) => !p.hidden).map((p) => p.dataset.level)"
    first = browser.js(shown)
    assert len(first) == 1
    browser.js(
        "const s = document.getElementById('accuracy'); s.selectedIndex = 2; s.dispatchEvent(new Event('change'))"
    )
    second = browser.js(shown)
    assert len(second) == 1
    assert first != second


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_parses() -> None:
    script = Path(sys.modules["rlvr_lab.show"].__file__ or "").parent / "pages" / "arena.js"
    subprocess.run(["node", "--check", str(script)], check=True, timeout=60)
