"""The built book opened as files, without a server."""

from __future__ import annotations

import pytest

from . import browser as helper
from .test_browser import GENERATED, PAGES

_MISSING = helper.missing()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")]


def test_works_from_the_disk_without_a_server() -> None:
    session = helper.Browser(helper.HTML.as_uri())
    try:
        complaints = [line for page in PAGES if page not in GENERATED for line in session.open(page).complaints()]
    finally:
        session.close()
    assert complaints == []
