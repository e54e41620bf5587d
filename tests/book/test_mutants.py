"""Each chapter must notice a planted bug in what it teaches.

``tests/mutants/<slug>/sitecustomize.py`` breaks the library on purpose. Python imports a module of that name at
start-up, in the notebook's kernel too, when its folder is on PYTHONPATH. The chapter with that slug must then fail,
and it must fail by a wrong value, not because the bug makes it crash: a crash is noticed by any notebook. That each
chapter is green without a mutant is what `make chapters` checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import normalise
import pytest

from rlvr_lab.methods import ELSEWHERE

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = ROOT / "tests" / "mutants"
CHAPTERS = {path.stem: path for path in normalise.chapters()}
# A chapter on several works of other fields has a mutant for each of them; all others have one of their own name.
WORKS = {slug: entry.chapter.split("/")[-1] for slug, entry in ELSEWHERE.items() if entry.chapter}
TARGETS = {slug: CHAPTERS[slug] for slug in CHAPTERS if slug not in WORKS.values()}
TARGETS |= {slug: CHAPTERS[chapter] for slug, chapter in WORKS.items() if chapter in CHAPTERS}
NOTICED = ("Cell outputs differ", "AssertionError")


def nbval(chapter: Path, *, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run one chapter under nbval; ``pythonpath`` must be absolute, the kernel starts in the notebook's folder."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if pythonpath is not None:
        assert pythonpath.is_absolute()
        environment["PYTHONPATH"] = str(pythonpath)
    sanitize = ROOT / "tests" / "book" / "nbval_sanitize.cfg"
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", str(sanitize), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", *options, str(chapter)]  # one cell that differs is enough
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_one_mutant_for_each_chapter_and_each_work() -> None:
    mutants = {path.parent.name for path in MUTANTS.glob("*/sitecustomize.py")}
    assert mutants == set(TARGETS)
    assert set(WORKS.values()) <= set(CHAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("slug", TARGETS)
def test_chapter_notices_its_mutant(slug: str) -> None:
    mutant = MUTANTS / slug
    assert (mutant / "sitecustomize.py").is_file(), "no mutant for this chapter"
    result = nbval(TARGETS[slug], pythonpath=mutant)
    log = result.stdout[-3000:] + result.stderr[-1000:]
    assert result.returncode == 1, f"the chapter does not notice the bug\n{log}"
    assert any(text in result.stdout for text in NOTICED), f"it crashes instead of noticing\n{log}"
