"""A headless Chromium that can reach the built book and nothing else.

``python -m tests.book.browser --shots DIR [--dark] [--file] [PAGE.html …]`` takes screenshots for a human eye.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
AXE = Path(__file__).resolve().parent / "vendor" / "axe.min.js"
CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")

# A page is settled when MathJax, plotly and every widget are done; all of them are asynchronous.
SETTLED = """
const done = (selector, inside) => [...document.querySelectorAll(selector)].every((e) => e.querySelector(inside));
return document.readyState === 'complete'
    && (!document.querySelector('.math') || !!window.MathJax?.startup?.document?.state?.())
    && done('figure.rlvr-plotly', '.rlvr-plotly-box svg.main-svg')
    && (!document.querySelector('script[type="application/vnd.jupyter.widget-view+json"]')
        || [...document.querySelectorAll('.widget-subarea')].every((e) => e.querySelector('.jupyter-widgets, .rlw')))
"""

# Messages of third-party code about things that do no harm here.
HARMLESS = (
    "allowUnionTypes",  # html-manager's JSON schema validator comments on its own schema
)


def missing() -> str | None:
    """Why the browser tests cannot run here, or None."""
    if not HTML.joinpath("intro.html").is_file():
        return "the book is not built: run python book/_tools/build_book.py"
    if CHROMIUM is None or CHROMEDRIVER is None:
        return "chromium or chromedriver is not installed (Debian: chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


def pages(html: Path = HTML) -> list[str]:
    """Every page a reader can read, as paths relative to the book."""
    found = (path.relative_to(html).as_posix() for path in html.rglob("*.html"))
    # index.html only redirects to intro.html
    return sorted(page for page in found if page != "index.html" and not page.startswith(("_static/", "_sources/")))


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No access log."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface; yields the address."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Visit:
    """What opening one page caused."""

    page: str
    external: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    settled: bool = True

    def complaints(self) -> list[str]:
        """Everything that should not have happened, in readable lines; empty is good."""
        lines = [f"{self.page}: request to another host: {url}" for url in self.external]
        lines += [f"{self.page}: failed request: {url}" for url in self.failed]
        lines += [f"{self.page}: console: {text}" for text in self.console]
        return lines + ([] if self.settled else [f"{self.page}: figures, formulas or widgets were not drawn in time"])


class Browser:
    """One Chromium session; ``base`` is a loopback address or a ``file://`` address of the book."""

    def __init__(self, base: str, *, height: int = 1600) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        self.base = base
        self._profile = tempfile.mkdtemp(prefix="rlvr-browser-")
        options = Options()
        options.binary_location = CHROMIUM or ""
        for flag in (
            "--headless=new",
            "--no-sandbox",  # containers have no user namespaces; the pages are our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={self._profile}",
            f"--window-size=1300,{height}",
            # A request to any other host fails and is seen as an error, even on a machine that has a network.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(service=Service(CHROMEDRIVER), options=options)
        self.driver.set_script_timeout(240)  # axe on a long page of a busy machine

    def close(self) -> None:
        """End the session and remove its profile."""
        self.driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def theme(self, name: str) -> None:
        """Choose "light" or "dark" for the pages opened from now on, as the theme switch would."""
        self.driver.get(f"{self.base}/intro.html")
        self.js("localStorage.setItem('mode', arguments[0]); localStorage.setItem('theme', arguments[0]);", name)

    def open(self, page: str, *, timeout: float = 20.0) -> Visit:
        """Open a page, wait until it is drawn, and report what it asked for and complained about."""
        for log in ("performance", "browser"):
            self.driver.get_log(log)  # reading empties it: what follows belongs to this page
        self.driver.get(f"{self.base}/{page}")
        deadline = time.monotonic() + timeout
        settled = False
        while not settled and time.monotonic() < deadline:
            settled = bool(self.js(SETTLED))
            time.sleep(0.1)
        time.sleep(0.3)  # late requests, e.g. for a font that only a drawn widget needs
        return self._visit(page, settled)

    def _visit(self, page: str, settled: bool) -> Visit:
        visit = Visit(page, settled=settled)
        # the last two are Chromium's own pages, such as the tab that it starts with and that may still be loading
        own = (self.base, "data:", "blob:", "about:", "chrome:", "chrome-untrusted:")
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            parameters = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith(own):
                    visit.external.append(url)
            elif message["method"] == "Network.responseReceived" and parameters["response"]["status"] >= 400:
                visit.failed.append(parameters["response"]["url"])
        for entry in self.driver.get_log("browser"):
            if entry["level"] in {"SEVERE", "WARNING"} and not any(text in entry["message"] for text in HARMLESS):
                visit.console.append(entry["message"][:300])
        return visit

    def axe(self, rules: Sequence[str] = ()) -> list[str]:
        """WCAG 2.1 A and AA violations on the open page, one line for each element; of all rules or those named."""
        self.js(f"if (!window.axe) {{ {AXE.read_text(encoding='utf-8')} }}")
        result = self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const which = arguments[0].length ? arguments[0] : ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'];
            axe.run(document, {runOnly: which, resultTypes: ['violations']})
               .then((r) => done(r.violations), (e) => done([{id: 'axe failed', nodes: [{target: [String(e)]}]}]));
            """,
            list(rules),
        )
        return [
            f"{rule['id']}: {' '.join(map(str, node['target']))} {node.get('failureSummary', '')[:160]}"
            for rule in result
            for node in rule["nodes"]
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, not only the window."""
        # The theme scrolls the document itself, so the page is as high as the document; 16384 is Chromium's limit.
        height = min(int(self.js("return document.documentElement.scrollHeight")), 16000)
        self.driver.set_window_size(1300, height + 150)
        time.sleep(0.5)
        self.driver.save_screenshot(str(path))
        self.driver.set_window_size(1300, 1600)


def main() -> int:
    """Command line: screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--file", action="store_true", help="over file:// instead of a local server")
    parser.add_argument("--html", type=Path, default=HTML)
    parser.add_argument("pages", nargs="*")
    options = parser.parse_args()
    options.shots.mkdir(parents=True, exist_ok=True)
    html: Path = options.html.resolve()
    status = 0
    with contextlib.ExitStack() as stack:
        base = html.as_uri() if options.file else stack.enter_context(serve(html))
        browser = Browser(base)
        stack.callback(browser.close)
        theme = "dark" if options.dark else "light"
        browser.theme(theme)
        for page in options.pages or pages(html):
            visit = browser.open(page)
            for complaint in visit.complaints():
                print(complaint)
                status = 1
            target = options.shots / f"{page.removesuffix('.html').replace('/', '_')}_{theme}.png"
            browser.screenshot(target)
            print(target)
    return status


if __name__ == "__main__":
    sys.exit(main())
