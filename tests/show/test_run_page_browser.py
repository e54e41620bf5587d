"""Pages about runs in Chromium: drawn, silent, without a request, operable by keyboard, WCAG 2.1 AA in both themes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import HOSTILE, run_folder, sample_row, write_lines

from rlvr_lab.show.run_page import samples_page
from rlvr_lab.train.report import write_report


def _helper() -> Any:
    path = Path(__file__).parents[1] / "book" / "browser.py"
    spec = importlib.util.spec_from_file_location("run_page_browser_helper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


helper = _helper()
_ABLE = helper.CHROMIUM and helper.CHROMEDRIVER and importlib.util.find_spec("selenium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not _ABLE, reason="needs chromium, chromium-driver, selenium")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [run_folder(folder / name, steps=20, planned=20) for name in ("first", "second")]
    hostile = [sample_row(0, problem=HOSTILE, tokens=[HOSTILE, " +", "\n"]), sample_row(2), sample_row(5)]
    write_lines(runs[0] / "samples.jsonl", hostile)
    (folder / "samples.html").write_text(samples_page(hostile, HOSTILE))
    write_report(runs[:1], folder / "report.html", [0, 2, 5])
    write_report(runs, folder / "both.html")
    with helper.serve(folder) as base:
        session = helper.Browser(base)
        yield session
        session.close()


@pytest.mark.parametrize("page", ["samples.html", "report.html", "both.html"])
def test_a_page_stands_alone_and_is_accessible_in_both_themes(browser: Any, page: str) -> None:
    assert browser.open(page).complaints() == []
    drawn = browser.js(
        "return [...document.querySelectorAll('figure.plot')].map((f) => !!f.querySelector('svg.main-svg'))"
    )
    assert all(drawn)
    assert bool(drawn) == (page != "samples.html")
    themes = []
    for _ in range(2):
        themes.append(browser.js("return document.documentElement.dataset.theme"))
        assert browser.axe() == []
        browser.js("document.getElementById('theme').click()")
    assert sorted(themes) == ["dark", "light"]
    assert "owned" not in browser.js("return document.title").partition("Transcripts of ")[0]


def test_the_theme_changes_page_and_curves(browser: Any) -> None:
    browser.open("report.html")
    ask = """return [getComputedStyle(document.body).backgroundColor,
                     document.querySelector('figure.plot .scatterlayer path.js-line').style.stroke]"""
    before = browser.js(ask)
    browser.js("document.getElementById('theme').click()")
    after = browser.js(ask)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_tokens_are_read_with_the_keyboard(browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open("samples.html")
    box = browser.driver.find_elements(By.CSS_SELECTOR, ".tokens")[1]
    status = browser.driver.find_elements(By.CSS_SELECTOR, ".status")[1]
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert status.text == "Token 2 of 3: +: probability 0.25, log-prob -1.386 nats, entropy 1.500 nats"
    box.send_keys(Keys.END)
    assert status.text.startswith("Token 3 of 3: ↵")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.HOME, Keys.ARROW_LEFT)
    assert status.text.startswith("Token 1 of 3: 2")


def test_choices_filter_and_rescale(browser: Any) -> None:
    browser.open("samples.html")
    change = """const s = document.querySelector(arguments[0]); s.value = arguments[1];
                s.dispatchEvent(new Event('change'));"""
    browser.js(change, "select[data-filter=correct]", "false")
    shown = "return [...document.querySelectorAll('.response')].filter((r) => r.offsetParent).length"
    assert browser.js(shown) == 1
    assert browser.js("return document.getElementById('shown').textContent") == "1 shown"
    browser.js(change, "select[data-filter=step]", "0")
    assert browser.js(shown) == 0
    colour = "return getComputedStyle(document.querySelectorAll('.t')[2]).backgroundColor"
    before = browser.js(colour)
    browser.js(change, "#scale", "0.5")
    alphas = [float(text.rpartition(",")[2].rstrip(")")) for text in (before, browser.js(colour))]
    assert alphas == pytest.approx([0.45 * 0.25 / 2, 0.45 * 0.25 / 0.5], abs=0.01)
