"""The built book in a browser: nothing from outside, nothing broken, everything operable by keyboard, WCAG 2.1 AA.

One browser session for all tests: starting Chromium costs more than opening every page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlvr_lab.show.tree import COLUMNS

from . import browser as helper

_MISSING = helper.missing()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")]

PAGES = helper.pages() if _MISSING is None else []
CHAPTERS = [page for page in PAGES if "/" in page]
GENERATED = {"genindex.html", "search.html"}  # by the theme, without content of ours


@pytest.fixture(scope="module")
def browser() -> Iterator[helper.Browser]:
    with helper.serve(helper.HTML) as base:
        session = helper.Browser(base)
        session.theme("light")
        yield session
        session.close()


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_alone_and_without_complaint(browser: helper.Browser, page: str) -> None:
    visit = browser.open(page)
    assert visit.complaints() == []


@pytest.mark.parametrize("page", CHAPTERS)
def test_every_figure_is_drawn_and_has_its_table(browser: helper.Browser, page: str) -> None:
    browser.open(page)
    figures = browser.js(
        """return [...document.querySelectorAll('figure.rlvr-plotly')].map((figure) => {
             figure.querySelector('details')?.setAttribute('open', '');
             return [figure.querySelectorAll('svg.main-svg').length > 0,
                     figure.querySelector('.rlvr-plotly-box').getAttribute('aria-label').length];
           });"""
    )
    assert figures
    assert all(drawn and described >= 30 for drawn, described in figures)
    time.sleep(0.2)  # the toggle event is asynchronous
    tables = browser.js(
        """return [...document.querySelectorAll('figure.rlvr-plotly details')]
             .map((details) => details.querySelectorAll('td').length);"""
    )
    assert all(cells >= 3 for cells in tables), tables


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


@pytest.mark.parametrize("page", CHAPTERS)
def test_every_widget_reacts_to_the_keyboard(browser: helper.Browser, page: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    widgets = browser.driver.find_elements(By.CSS_SELECTOR, ".rlw")
    assert widgets, "no widget was drawn"
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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_in_both_themes(browser: helper.Browser, theme: str) -> None:
    browser.theme(theme)
    violations: list[str] = []
    for page in PAGES:
        if page in GENERATED:
            continue
        browser.open(page)
        assert browser.js("return document.documentElement.dataset.theme") == theme
        browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")  # solutions, tables
        time.sleep(0.2)
        violations += [f"{page}: {line}" for line in browser.axe()]
    browser.theme("light")
    assert violations == []


def test_figures_follow_the_theme(browser: helper.Browser) -> None:
    """Colours are those of the theme that is chosen now, also when it is switched on the open page."""
    if not CHAPTERS:
        pytest.skip("no chapter yet")
    browser.open(CHAPTERS[0])
    colour = "return getComputedStyle(document.querySelector('.rlvr-plotly .xtick text')).fill"
    light = browser.js(colour)
    browser.js("document.documentElement.dataset.theme = 'dark'")
    _wait(lambda: browser.js(colour) != light, "the figure keeps the light theme's ink")


def test_works_from_the_disk_without_a_server() -> None:
    session = helper.Browser(helper.HTML.as_uri())
    try:
        complaints = [line for page in PAGES if page not in GENERATED for line in session.open(page).complaints()]
    finally:
        session.close()
    assert complaints == []
