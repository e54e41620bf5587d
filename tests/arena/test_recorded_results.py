"""The results that the book shows come from the code that it teaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlvr_lab.arena import CATALOGUE, REFERENCE, Results, changed_since, load_results

DATA = Path(__file__).parents[2] / "book" / "data"
CONTESTS = ("arena.json", "arena_signal.json")
"""Token-level control over 80 steps; rewards, advantages and data over 40."""
ELSEWHERE = {
    "bupo": "bupo",
    "pear": "pear",
    "cure": "cure",
    "ettrl": "ettrl",
    "spear": "spear",
    "ares": "ares",
}
"""Methods that `benchmarks/` records in files of their own: in episodes, or at equal generated tokens."""


@pytest.fixture(scope="module", params=CONTESTS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def results(name: str) -> Results:
    return load_results(DATA / name)


def test_no_method_changed_after_its_results_were_recorded(name: str, results: Results) -> None:
    changed = changed_since(results.contest["digests"])
    arms = [name for name, arm in results.arms.items() if any(arm.uses(slug) for slug in changed)]
    settings = " ".join(f'--set "{text}"' for text in results.contest["settings"])
    assert not changed, (
        f"the code of {', '.join(changed)} is not that of book/data/{name}; record these arms again with "
        f"`rlvr-lab arena --methods {','.join(arms)} --no-controls --seeds {len(results.contest['seeds'])} {settings} "
        "--out runs/arena` and merge them into the file (rlvr_lab.arena.merge)"
    )


def test_every_arm_is_recorded_with_its_provenance_and_its_method(results: Results) -> None:
    assert len(results.seeds(REFERENCE)) >= 3
    for name, arm in results.arms.items():
        assert arm.method in results.contest["digests"]
        assert not arm.control_of or arm.control_of in results.arms, f"{name} without its method"
        for seed in results.seeds(name):
            machine = results.contest["machines"][f"{name} seed {seed}"]
            assert {"processor", "torch", "rlvr_lab", "date"} <= set(machine)


def test_every_arm_has_every_seed(results: Results) -> None:
    short = {name for name in results.arms if results.seeds(name) != results.seeds(REFERENCE)}
    assert not short, "arms that lack seeds of GRPO's"


def test_every_method_of_the_catalogue_is_recorded() -> None:
    recorded = {
        arm.method for name in CONTESTS for arm in load_results(DATA / name).arms.values() if arm.role == "method"
    }
    assert {arm.method for arm in CATALOGUE.values() if arm.role == "method"} - recorded == set(ELSEWHERE)
    assert all((DATA / f"{name}.json").exists() for name in ELSEWHERE.values())
