"""No response makes a verifier raise, wait, or forget to say why. `benchmarks/verifiers.py` tries many more."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tasks.hostile import PIECES, RESPONSES, VERIFIERS, broken_promise

CHILD = ("math, algebra", "olympiadbench", "reasoning_gym")
"""Those that ask another process: fewer inputs, and slow tests."""

NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in CHILD else name for name in VERIFIERS]


@pytest.mark.parametrize("name", NAMES)
def test_no_response_breaks_a_promise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    graded = VERIFIERS[name]()
    tried: set[str] = set()
    slowest = 0.0

    @settings(max_examples=40 if name in CHILD else 250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RESPONSES, st.booleans())
    def fuzz(response: str, finished: bool) -> None:
        nonlocal slowest
        start = time.process_time()
        assert broken_promise(graded, response, finished) is None
        # of this process: a loaded machine may stop it for seconds, and the child's time has its own limit
        slowest = max(slowest, time.process_time() - start)
        tried.add(response)

    fuzz()
    with capsys.disabled():
        print(f"\n{name}: {len(tried)} different inputs, the slowest took {slowest:.3f} s")
    assert len(tried) > 20
    assert slowest < 2


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name not in CHILD])
def test_a_megabyte_of_one_thing(name: str) -> None:
    graded = VERIFIERS[name]()
    for piece in PIECES:
        start = time.process_time()
        assert broken_promise(graded, piece * (1_000_000 // len(piece)), True) is None, piece
        assert time.process_time() - start < 2, piece
