"""An adaptive cold start keeps responses whose length fits the prompt's difficulty, brackets in equal parts."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.train.adaptive_start import adaptive_rows, length_ends, length_target
from rlvr_lab.train.cold_start import ColdStart, cold_start, rates_of
from rlvr_lab.train.config import load_config
from rlvr_lab.train.sft import SFTSettings

ENDS = (100.0, 20.0)


def row(problem: int, length: int, correct: bool = True, first: int = 0) -> dict[str, Any]:
    return {"problem": problem, "ids": [first, *range(1, length)], "correct": correct}


def kept(rows: list[Any], rates: list[float], **changes: Any) -> list[Any]:
    settings = {"tolerance": 0.25, "per_prompt": 2, "least_tokens": 0, "generator": np.random.default_rng(0)}
    return adaptive_rows(rows, rates, ENDS, **(settings | changes))


def test_the_target_goes_from_long_for_never_to_short_for_always() -> None:
    assert [length_target(p, *ENDS) for p in (0.0, 0.25, 1.0)] == [100.0, 80.0, 20.0]
    assert math.isnan(length_target(0.5, math.nan, 20.0))
    with pytest.raises(ValueError, match="lies in"):
        length_target(1.5, *ENDS)


def test_the_ends_are_medians_over_all_responses_to_such_prompts() -> None:
    rows = [row(0, 9, False), row(0, 30, False), row(0, 10, False), row(1, 4), row(1, 6), row(2, 50), row(2, 70, False)]
    assert length_ends(rows, [0.0, 1.0, 0.5]) == (10.0, 5.0)
    never, always = length_ends(rows, [0.1, 1.0, 0.5])
    assert math.isnan(never)
    assert always == 5.0


def test_kept_is_what_is_right_near_its_target_and_said_once() -> None:
    near, far = row(0, 62), row(0, 90)  # the target is 60 tokens
    rows = [near, dict(near), far, row(0, 58, False), row(0, 60, first=5), row(0, 70, first=6), row(1, 60)]
    found = kept(rows, [0.5, 1.0])
    assert found == [near, rows[4]]  # the two nearest; 60 tokens are too many for a prompt that is always solved
    assert kept(rows, [0.5, 1.0], tolerance=0.6, per_prompt=9) == [near, far, rows[4], rows[5]]
    assert kept(rows, [0.5, 1.0], least_tokens=61) == [near, rows[5]]
    assert kept([row(0, 10)], [0.5]) == []


def test_a_large_bracket_is_thinned_to_the_median_one() -> None:
    rates = [0.25] * 2 + [0.5] * 4 + [1.0] * 30
    rows = [row(i, round(length_target(rate, *ENDS)), first=i) for i, rate in enumerate(rates)]
    found = kept(rows, rates)
    assert Counter(rates[r["problem"]] for r in found) == {0.25: 2, 0.5: 4, 1.0: 4}
    assert found == sorted(found, key=rows.index)
    assert found == kept(rows, rates)
    assert found != kept(rows, rates, generator=np.random.default_rng(1))


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(UserError, match="unknown --lengths 'adaptiv'; did you mean 'adaptive'"):
        ColdStart(lengths="adaptiv")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--tolerance must be above 0, not 0"):
        ColdStart(tolerance=0)


def config(*changes: str) -> Any:
    return load_config("ares/tiny", ["data.pool=40", "rollout.max_tokens=48", "logging.view=quiet", *changes])


@pytest.mark.slow
def test_the_command_keeps_longer_responses_to_harder_prompts(tmp_path: Path) -> None:
    out = tmp_path / "warm"
    words = ["cold-start", "ares/tiny", "data.pool=40", "rollout.max_tokens=48", "logging.view=quiet", "--samples", "4",
             "--epochs", "1", "--lr", "1e-4", "--objective", "plain", "--lengths", "adaptive", "--out",
             str(out)]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    rates = rates_of(rows, 40, 4)
    ends = length_ends(rows, rates)
    assert summary["lengths"] == {"never_solved": ends[0], "always_solved": ends[1]}
    assert ends[0] > ends[1]  # base R tries again where it fails
    assert summary["settings"]["lengths"] == "adaptive"
    assert 2 <= summary["kept"] <= sum(row["correct"] for row in rows)


@pytest.mark.slow
def test_what_cannot_be_kept_says_what_would_help(tmp_path: Path) -> None:
    sft, nothing = SFTSettings(objective="plain", epochs=1), ColdStart(samples=4, lengths="adaptive", least_tokens=49)
    with pytest.raises(UserError, match=r"no prompt is always solved.*use easier data, raise data\.pool, or set --len"):
        cold_start(config("rollout.max_tokens=2"), tmp_path / "a", ColdStart(samples=2, lengths="adaptive"), sft)
    with pytest.raises(UserError, match=r"^0 right responses are near their target length .* raise --tolerance"):
        cold_start(config("data.pool=24"), tmp_path / "b", nothing, sft)
