"""What the swapping widget is given is what the analysis says."""

from __future__ import annotations

import json

import contest_rows
import pytest

from rlvr_lab.arena import early_stopped, matched
from rlvr_lab.arena.swap import arm_curves


def test_every_arm_with_its_match_at_every_evaluation() -> None:
    results = contest_rows.results()
    reference, method, control = arm_curves(results, "pass@4")
    assert [arm["role"] for arm in (reference, method, control)] == ["reference", "method", "control"]
    assert control["of"] == "kl_cov"
    assert list(method["curves"]) == ["reward", "token entropy", "pass@4", "distinct correct"]
    assert method["curves"]["reward"]["x"] == [2.0, 7.0]
    first, last = method["evaluations"]
    found = matched(results, "kl_cov", "distinct_correct")
    assert (first["step"], first["gap"], first["beyond"]) == (0, pytest.approx(0.0), 0)
    assert (last["gap"], last["half"]) == (pytest.approx(found.mean), pytest.approx(found.half, rel=1e-3))
    assert (last["beyond"], last["seeds"]) == (1, 3)
    assert last["distinct correct"] == pytest.approx(1.8)
    assert method["frontier"]["x"] == pytest.approx([0.2, 0.4667])
    assert method["frontier"]["half"] == [None, None]
    assert reference["frontier"]["y"][0] == pytest.approx(early_stopped(results, "distinct_correct")[1][0], rel=1e-3)


def test_the_match_at_an_earlier_step() -> None:
    results = contest_rows.results()
    assert matched(results, "grpo", "distinct_correct", step=7).per_seed == (0.0, 0.0, 0.0)
    assert matched(results, "kl_cov", "distinct_correct", step=9).per_seed == (0.0, 0.0, 0.0)  # step 0
    assert matched(results, "kl_cov", "distinct_correct", step=10) == matched(results, "kl_cov", "distinct_correct")


def test_what_is_undefined_is_null() -> None:
    results = contest_rows.results()
    for row in results.evaluations:
        row["distinct_correct"] = None
    text = json.dumps(arm_curves(results, "pass@4"), allow_nan=False)
    assert '"gap": null' in text
