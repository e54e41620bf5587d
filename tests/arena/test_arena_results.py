"""Results files: what is written comes back, what is broken is refused, and tables say what their rows say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import contest_rows
import pytest

from rlvr_lab.arena import Results, load_results, merge, save_results
from rlvr_lab.errors import UserError

T2, T3 = 12.706, 4.303  # two-sided 95 % Student t of two and of three seeds


def half_of(values: list[float]) -> float:
    """The 95 % half-width of a mean, written out."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return {2: T2, 3: T3}[len(values)] * deviation / math.sqrt(len(values))


def test_a_file_brings_back_what_was_saved(tmp_path: Path) -> None:
    made = contest_rows.results(stopped={"kl_cov seed 1": "the loss is not finite"})
    made.steps[0]["reward"] = math.nan
    made.steps[0]["own_metric"] = 0.123456789
    save_results(tmp_path / "deep" / "results.json", made)
    back = load_results(tmp_path / "deep" / "results.json")
    assert back.contest == made.contest
    assert back.arms == made.arms
    assert back.stopped == made.stopped
    assert back.steps[0]["reward"] is None
    assert back.steps[0]["own_metric"] == 0.12346
    assert back.steps[1]["own_metric"] is None
    assert [{k: v for k, v in row.items() if k in made.evaluations[0]} for row in back.evaluations] == [
        {k: pytest.approx(v) for k, v in row.items()} for row in made.evaluations
    ]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "results.json"
    save_results(path, contest_rows.results())
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(UserError, match="cut off"):
        load_results(path)


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"cannot read .*results\.json.*writes one"):
        load_results(path)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 1"):
        load_results(path)
    for change in ("contest", "arms", "steps", "evaluations", "stopped"):
        save_results(path, contest_rows.results())
        record = json.loads(path.read_text())
        del record[change]
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="damaged"):
            load_results(path)
    save_results(path, contest_rows.results())
    record = json.loads(path.read_text())
    record["steps"]["reward"].pop()
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged"):
        load_results(path)


def test_series_final_and_interval_are_means_over_seeds() -> None:
    found = contest_rows.results()
    steps, mean, half = found.series("grpo", "pass@1", "evaluations")
    assert steps.tolist() == [0, 5, 10]
    assert mean == pytest.approx([0.2, 1 / 3, 0.5])
    assert half == pytest.approx([0.0, half_of([0.3, 0.4, 0.3]), half_of([0.5, 0.6, 0.4])], rel=1e-3, abs=1e-12)
    assert found.series("grpo", "pass@1", "evaluations", x="tokens")[0].tolist() == [0, 500, 1000]
    assert found.final("kl_cov", "distinct_correct") == [1.9, 1.7, 1.8]
    assert found.interval("kl_cov", "distinct_correct") == pytest.approx((1.8, half_of([1.9, 1.7, 1.8])), rel=1e-3)
    assert found.base("distinct_correct") == pytest.approx(2.1)
    assert found.controls("kl_cov") == ["kl_cov_random"]
    assert found.seeds("kl_cov") == [0, 1, 2]


def test_a_series_has_the_steps_that_every_seed_has() -> None:
    found = contest_rows.results()
    shorter = replace(found, evaluations=[r for r in found.evaluations if (r["seed"], r["step"]) != (1, 10)])
    assert shorter.series("grpo", "pass@1", "evaluations")[0].tolist() == [0, 5]
    assert shorter.final("grpo", "pass@1") == [0.5, 0.4, 0.4]  # of seed 1 the last that it has


def test_what_is_undefined_stays_so() -> None:
    found = contest_rows.results({"grpo": {0: contest_rows.CURVES["grpo"][0]}})
    mean, half = found.interval("grpo", "pass@1")
    assert mean == 0.5
    assert math.isnan(half)
    found.evaluations[-1]["distinct_correct"] = None
    assert math.isnan(found.final("grpo", "distinct_correct")[0])


def test_unknown_names_are_met_with_the_nearest() -> None:
    found = contest_rows.results()
    with pytest.raises(UserError, match=r"no arm 'kl_cob'.*kl_cov"):
        found.series("kl_cob", "reward")
    with pytest.raises(UserError, match=r"no 'rewards'.*reward"):
        found.series("grpo", "rewards")
    with pytest.raises(UserError, match=r"no 'pass@2'"):
        found.interval("grpo", "pass@2")


def without(found: Results, *arms: str) -> Results:
    """The contest without some arms."""
    kept = {name: arm for name, arm in found.arms.items() if name not in arms}
    steps, evaluations = ([r for r in rows if r["arm"] in kept] for rows in (found.steps, found.evaluations))
    return replace(found, arms=kept, steps=steps, evaluations=evaluations)


def test_merging_joins_arms_seeds_and_provenance() -> None:
    whole = contest_rows.results(machines={"a": 1}, digests={"grpo": "aa"})
    first = without(replace(whole, contest=whole.contest | {"seeds": [0]}), "kl_cov")
    second = without(
        replace(whole, contest=whole.contest | {"digests": {"kl_cov": "bb"}, "machines": {"b": 2}}), "grpo"
    )
    joined = merge([first, second])
    assert set(joined.arms) == set(whole.arms)
    assert len(joined.evaluations) == len(whole.evaluations)
    assert len(joined.steps) == len(whole.steps)
    assert joined.contest["seeds"] == [0, 1, 2]
    assert joined.contest["digests"] == {"grpo": "aa", "kl_cov": "bb"}
    assert joined.contest["machines"] == {"a": 1, "b": 2}
    assert first.contest["seeds"] == [0]  # the parts are left alone


def test_a_later_run_replaces_the_earlier_one_with_its_failure() -> None:
    first = contest_rows.results(stopped={"kl_cov seed 0": "not finite", "grpo seed 0": "no group is left"})
    again = contest_rows.results({"kl_cov": {0: [(0, 0.2, 2.0), (10, 0.9, 0.5)]}})
    joined = merge([first, again])
    assert joined.final("kl_cov", "pass@1") == [0.9, 0.5, 0.5]
    assert len(joined.evaluations) == len(first.evaluations)
    assert joined.stopped == {"grpo seed 0": "no group is left"}


@pytest.mark.parametrize(
    ("key", "other"),
    [("recipe", "grpo/tiny"), ("settings", ["steps=20"]), ("budget_tokens", 5), ("steps", 20),
     ("evaluation", {"problems": 9, "samples": 4, "temperature": 1.0})],
)  # fmt: skip
def test_contests_under_other_conditions_are_not_merged(key: str, other: Any) -> None:
    with pytest.raises(UserError, match=f"differ in {key}"):
        merge([contest_rows.results(), contest_rows.results(**{key: other})])


def test_arms_of_one_name_with_other_settings_are_not_merged() -> None:
    first, second = contest_rows.results(), contest_rows.results()
    second.arms["kl_cov"] = replace(second.arms["kl_cov"], settings=("methods.kl_cov={preset: paper}",))
    with pytest.raises(UserError, match="settings of arm 'kl_cov'"):
        merge([first, second])


def test_runs_of_changed_code_are_not_mixed() -> None:
    first = contest_rows.results()
    changed = contest_rows.results(digests={"grpo": "aa", "kl_cov": "cc"})
    with pytest.raises(UserError, match=r"'kl_cov' changed .*run again: kl_cov_random"):
        merge([first, without(changed, "grpo", "kl_cov_random")])
    assert merge([first, without(changed, "grpo")]).contest["digests"]["kl_cov"] == "cc"
    base = contest_rows.results(digests={"grpo": "zz", "kl_cov": "bb"})
    with pytest.raises(UserError, match=r"'grpo' changed .*run again: grpo"):
        merge([first, without(base, "grpo")])
