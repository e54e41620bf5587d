"""The results that the book shows come from the code that it teaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlvr_lab.arena import CATALOGUE, REFERENCE, Results, changed_since, load_results

RECORDED = Path(__file__).parents[2] / "book" / "data" / "arena.json"
AWAITED_SEEDS = {"clip_higher", "adaptive_entropy", "clip_cov", "kl_cov", "kl_cov_random"}
"""Arms of which some seeds are still to be recorded; tables give them no interval, or a wide one."""
AWAITED_METHODS = {"arbitrary_entropy"}
"""Methods whose arms are still to be recorded; their chapters say so."""
pytestmark = pytest.mark.skipif(not RECORDED.exists(), reason="book/data/arena.json is not recorded yet")


@pytest.fixture(scope="module")
def results() -> Results:
    return load_results(RECORDED)


def test_no_method_changed_after_its_results_were_recorded(results: Results) -> None:
    changed = changed_since(results.contest["digests"])
    arms = [name for name, arm in results.arms.items() if any(arm.uses(slug) for slug in changed)]
    assert not changed, (
        f"the code of {', '.join(changed)} is not that of book/data/arena.json; record these arms again with "
        f"`rlvr-lab arena --methods {','.join(arms)} --no-controls --seeds {len(results.contest['seeds'])} "
        "--out runs/arena` and merge them into the file (rlvr_lab.arena.merge)"
    )


def test_every_method_and_control_is_recorded_with_its_provenance(results: Results) -> None:
    assert len(results.seeds(REFERENCE)) >= 3
    short = {name for name in results.arms if results.seeds(name) != results.seeds(REFERENCE)}
    assert short == AWAITED_SEEDS, "arms that lack seeds; take those that have them all from AWAITED_SEEDS"
    for name, arm in results.arms.items():
        assert arm.method in results.contest["digests"]
        assert not arm.control_of or arm.control_of in results.arms, f"{name} without its method"
        for seed in results.seeds(name):
            machine = results.contest["machines"][f"{name} seed {seed}"]
            assert {"processor", "torch", "rlvr_lab", "date"} <= set(machine)
    own = {arm.method for arm in results.arms.values() if arm.role == "method"}
    assert {arm.method for arm in CATALOGUE.values() if arm.role == "method"} - own == AWAITED_METHODS
