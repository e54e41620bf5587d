"""The built book in a browser: nothing from outside, nothing broken, everything operable by keyboard, WCAG 2.1 AA.

One browser session for all tests, and one visit for all tests of a page: opening it costs more than most of them. What
depends on the theme is its colours, so the dark theme is chosen on the open page and looked at for these alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from rlvr_lab.show.tree import COLUMNS

from . import browser as helper

_MISSING = helper.missing()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")]

PAGES = helper.pages() if _MISSING is None else []
CHAPTERS = [page for page in PAGES if "/" in page]
GENERATED = {"genindex.html", "search.html"}  # by the theme, without content of ours
OPEN_AND_SHORTEN = """
document.querySelectorAll('details').forEach((d) => { d.open = true; });  // solutions, tables
// rows of a table of data are alike, and thousands of them take a minute
document.querySelectorAll('figure.rlvr-plotly details table').forEach((table) =>
  [...table.rows].slice(12).forEach((row) => row.remove()));
"""
COLOUR_RULES = ("color-contrast", "link-in-text-block")
"""What axe decides by colours, the only thing that a theme changes."""


@dataclass(frozen=True)
class Open:
    """A page as it was opened in the light theme, for the tests that follow each other on it."""

    page: str
    browser: helper.Browser
    complaints: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[helper.Browser]:
    with helper.serve(helper.HTML) as base:
        session = helper.Browser(base)
        session.theme("light")
        yield session
        session.close()


@pytest.fixture(scope="module", params=PAGES)
def opened(browser: helper.Browser, request: pytest.FixtureRequest) -> Open:
    """Every page in turn; pytest runs all tests of one page before it goes on to the next."""
    return Open(request.param, browser, browser.open(request.param).complaints())


def test_page_loads_alone_and_without_complaint(opened: Open) -> None:
    assert opened.complaints == []


def test_every_figure_is_drawn_and_has_its_table(opened: Open) -> None:
    browser = opened.browser
    figures = browser.js(
        """return [...document.querySelectorAll('figure.rlvr-plotly')].map((figure) => {
             figure.querySelector('details')?.setAttribute('open', '');
             return [figure.querySelectorAll('svg.main-svg').length > 0,
                     figure.querySelector('.rlvr-plotly-box').getAttribute('aria-label').length];
           });"""
    )
    assert figures or opened.page not in CHAPTERS
    assert all(drawn and described >= 30 for drawn, described in figures)
    time.sleep(0.2)  # the toggle event is asynchronous
    tables = browser.js(
        """return [...document.querySelectorAll('figure.rlvr-plotly details')]
             .map((details) => details.querySelectorAll('td').length);"""
    )
    assert all(cells >= 3 for cells in tables), tables


def test_accessible_in_both_themes(opened: Open) -> None:
    browser = opened.browser
    if opened.page in GENERATED:
        pytest.skip("made by the theme, without content of ours")
    assert browser.js("return document.documentElement.dataset.theme") == "light"
    browser.js(OPEN_AND_SHORTEN)
    time.sleep(0.2)
    violations = [f"light: {line}" for line in browser.axe()]
    try:
        browser.js("document.documentElement.dataset.theme = 'dark'")
        time.sleep(0.3)  # figures redraw
        violations += [f"dark: {line}" for line in browser.axe(COLOUR_RULES)]
    finally:
        browser.js("document.documentElement.dataset.theme = 'light'")
    assert violations == []


def test_every_widget_reacts_to_the_keyboard(opened: Open) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = opened.browser
    widgets = browser.driver.find_elements(By.CSS_SELECTOR, ".rlw")
    assert widgets or opened.page not in CHAPTERS, "no widget was drawn"
    for widget in widgets:
        output = widget.find_element(By.CSS_SELECTOR, "output[aria-live]")
        controls = widget.find_elements(By.CSS_SELECTOR, "input[type=range], button")
        before = output.text
        assert before
        _focus(browser, controls[0])
        key = Keys.ARROW_RIGHT if controls[0].tag_name == "input" else Keys.ENTER
        controls[0].send_keys(key)
        _wait(lambda output=output, before=before: output.text != before, "the first control changes nothing")
        for button in widget.find_elements(By.CSS_SELECTOR, "button"):
            _focus(browser, button)
            button.send_keys(Keys.SPACE)


def _focus(browser: helper.Browser, element: Any) -> None:
    browser.js("arguments[0].focus()", element)
    assert browser.js("return document.activeElement === arguments[0]", element), "the control cannot take focus"


def _wait(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


@pytest.mark.skipif("6_rollouts/trees_and_budgets.html" not in CHAPTERS, reason="the chapter is not built")
def test_the_table_of_a_tree_names_every_token(browser: helper.Browser) -> None:
    browser.open("6_rollouts/trees_and_budgets.html")
    browser.js("document.querySelectorAll('figure.rlvr-plotly details').forEach((d) => { d.open = true; })")
    time.sleep(0.2)
    heads = browser.js(
        """return [...document.querySelectorAll('figure.rlvr-plotly details table')]
             .map((table) => [...table.querySelectorAll('th')].map((cell) => cell.textContent));"""
    )
    assert [list(COLUMNS)] == [head for head in heads if "word" in head]


def test_figures_follow_the_theme(browser: helper.Browser) -> None:
    """Colours are those of the theme that is chosen now, also when it is switched on the open page."""
    if not CHAPTERS:
        pytest.skip("no chapter yet")
    browser.open(CHAPTERS[0])
    colour = "return getComputedStyle(document.querySelector('.rlvr-plotly .xtick text')).fill"
    light = browser.js(colour)
    browser.js("document.documentElement.dataset.theme = 'dark'")
    _wait(lambda: browser.js(colour) != light, "the figure keeps the light theme's ink")
