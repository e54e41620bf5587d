"""The doctor on synthetic logs with one planted fault each, on healthy and on damaged logs, and on one real run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from builders import TINY_RUN
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sample_methods import WordBonus
from torch import Tensor
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method
from rlvr_lab.train.config import load_config, parse_config
from rlvr_lab.train.doctor import diagnose, examine, page, read_history, render
from rlvr_lab.train.doctor_record import Finding, History, trend
from rlvr_lab.train.doctor_rules import RULES, bonus_of, ledger_shares
from rlvr_lab.train.loop import Trainer

ROOT = Path(__file__).parents[2]
STEPS = 40
Values = NDArray[np.float64]
Log = dict[str, Values]

SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "model": {"dtype": "float32"},
    "data": {"task": "countdown", "pool": 3000},
    "rollout": {"prompts": 16, "group_size": 16},
    "methods": {"grpo": {"preset": "tiny"}},
    "optimizer": {"lr": 5e-4, "warmup": 8},
    "update": {"epochs": 1, "minibatches": 8, "recompute_old_logprob": True},
}


def ramp(start: float, end: float, steps: int = STEPS) -> Values:
    return np.linspace(start, end, steps)


def healthy_log(steps: int = STEPS, seed: int = 0) -> Log:
    """Shaped like GRPO on the lab's base S: entropy halves, accuracy rises, groups die slowly, all with step noise."""
    rng = np.random.default_rng(seed)

    def noisy(values: Values, relative: float) -> Values:
        return values * (1 + relative * rng.standard_normal(steps))

    entropy = noisy(0.175 * 0.4 ** ramp(0, 1, steps), 0.05)
    accuracy = np.clip(noisy(ramp(0.18, 0.5, steps), 0.15), 0, 1)
    constant = np.ones(steps)
    return {
        "reward": accuracy,
        "accuracy": accuracy,
        "token_entropy": entropy,
        "certain_tokens": noisy(ramp(0.79, 0.77, steps), 0.01),
        "mean_tokens": noisy(26 * constant, 0.03),
        "truncated": np.abs(noisy(0.005 * constant, 0.5)),
        "no_answer": np.abs(noisy(0.01 * constant, 0.5)),
        "dead_groups": np.clip(noisy(ramp(0.1, 0.4, steps), 0.2), 0, 1),
        "clip_low": noisy(ramp(0.002, 0.008, steps), 0.2),
        "clip_high": noisy(ramp(0.001, 0.004, steps), 0.2),
        "ratio_mean": 1 + 2e-4 * rng.standard_normal(steps),
        "ratio_max": noisy(2 * constant, 0.2),
        "kl_old_new": noisy(np.concatenate([ramp(2e-5, 1e-3, 8), ramp(1e-3, 8e-3, steps - 8)]), 0.2),
        "mismatch": noisy(2e-5 * constant, 0.3),
        "mismatch_mean": 1e-8 * rng.standard_normal(steps),
        "staleness": 0 * constant,
        "vocabulary": 128 * constant,
        "lr": 5e-4 * np.minimum(1, (np.arange(steps) + 1) / 8),
        "ledger_up_likely": -noisy(3e-3 * constant, 0.2),
        "ledger_up_unlikely": noisy(1e-3 * constant, 0.2),
        "ledger_down_likely": noisy(1e-3 * constant, 0.2),
        "ledger_down_unlikely": -noisy(1e-3 * constant, 0.2),
    }


def history(
    log: Log, settings: dict[str, Any] | None = None, evaluations: list[dict[str, Any]] | None = None
) -> History:
    return History(np.arange(len(next(iter(log.values())))), log, evaluations or [], settings or SETTINGS)


def serious(found: tuple[Finding, ...]) -> list[str]:
    return [finding.fault for finding in found if finding.severity != "note"]


def unpaid_collapse(log: Log) -> None:
    log["token_entropy"] = 0.175 * 0.08 ** ramp(0, 1)
    log["accuracy"] = log["reward"] = log["accuracy"] * 0 + 0.2


def spent_collapse(log: Log) -> None:
    log["dead_groups"] = ramp(0.2, 0.95)


def unopposed_collapse(log: Log) -> None:
    log["token_entropy"] = 0.175 * 0.3 ** ramp(0, 1)
    for name in ("ledger_up_unlikely", "ledger_down_likely", "ledger_down_unlikely"):
        log[name] = log[name] * 0


def bonus(log: Log) -> None:
    log["token_entropy"] = 0.17 * 28 ** np.clip(ramp(-0.5, 1.2), 0, 1)
    log["accuracy"] = log["reward"] = ramp(0.2, 0.0)
    log["regularise_entropy_bonus"] = -0.2 * log["token_entropy"] * 1.1
    log["regularise_grad_entropy_bonus"] = log["token_entropy"] * 0 + 0.01


def narrow_clip(log: Log) -> None:
    log["clip_low"] = log["clip_low"] * 0 + 0.06
    log["clip_high"] = log["clip_high"] * 0 + 0.04


def noisy_sampler(log: Log) -> None:
    log["mismatch"] = log["mismatch"] * 0 + 0.4
    log["mismatch_mean"] = log["mismatch_mean"] + 1e-4


def truncating_sampler(log: Log) -> None:
    log["mismatch"] = log["mismatch"] * 0 + 0.22
    log["mismatch_mean"] = log["mismatch_mean"] * 0 + 0.03
    log["ratio_mean"] = log["ratio_mean"] - 0.03


def never_solved(log: Log) -> None:
    log["accuracy"] = log["reward"] = log["accuracy"] * 0
    log["dead_groups"] = log["dead_groups"] * 0 + 1
    log["token_entropy"] = log["token_entropy"] * 0 + 0.175


def always_or_never(log: Log) -> None:
    log["dead_groups"] = log["dead_groups"] * 0 + 0.9
    log["token_entropy"] = log["token_entropy"] * 0 + 0.175


def paid_per_token(log: Log) -> None:
    log["mean_tokens"] = ramp(35, 90)
    log["truncated"] = ramp(0, 0.8)
    log["reward"] = ramp(2, 5)
    log["accuracy"] = ramp(0.45, 0.05)
    log["token_entropy"] = log["token_entropy"] * 0 + 0.2


def solved_from_the_start(log: Log) -> None:
    log["accuracy"] = log["reward"] = log["accuracy"] * 0 + 0.98
    log["dead_groups"] = log["dead_groups"] * 0 + 0.9


def huge_steps(log: Log) -> None:
    log["kl_old_new"] = np.concatenate([ramp(1e-4, 0.1, 8), ramp(0.1, 0.9, STEPS - 8)])
    log["accuracy"] = log["reward"] = np.concatenate([ramp(0.2, 0.3, 10), ramp(0.25, 0.0, STEPS - 10)])
    log["certain_tokens"] = ramp(0.79, 0.5)
    log["clip_low"] = log["clip_low"] * 0 + 0.1


def old_rollouts(log: Log) -> None:
    log["staleness"] = np.minimum(np.arange(STEPS), 8.0)
    log["mismatch"] = ramp(0.1, 3)
    log["mismatch_mean"] = ramp(0.001, 0.05)
    log["clip_low"] = log["clip_low"] * 0 + 0.08


def detached_term(log: Log) -> None:
    log["regularise_dead_bonus"] = -0.01 * log["token_entropy"]
    log["regularise_grad_dead_bonus"] = log["token_entropy"] * 0


FAULTS: dict[str, tuple[Callable[[Log], None], str, str]] = {
    "unpaid": (unpaid_collapse, "collapse", "methods.kl_cov.preset"),
    "spent": (spent_collapse, "collapse", "methods.kl_cov.preset"),
    "unopposed": (unopposed_collapse, "collapse", "methods.kl_cov.preset"),
    "bonus": (bonus, "explosion", "methods.entropy_bonus.coefficient"),
    "clip": (narrow_clip, "clip_saturation", "update.minibatches"),
    "noise": (noisy_sampler, "mismatch", "methods.truncated_importance_sampling.preset"),
    "top-p": (truncating_sampler, "sampler_truncation", "update.recompute_old_logprob"),
    "never": (never_solved, "degenerate_groups", "rollout.group_size"),
    "mixed": (always_or_never, "degenerate_groups", "methods.dynamic_sampling.preset"),
    "length": (paid_per_token, "length_drift", "methods.overlong.preset"),
    "solved": (solved_from_the_start, "reward_saturation", "methods.dynamic_sampling.preset"),
    "lr": (huge_steps, "learning_rate", "optimizer.lr"),
    "stale": (old_rollouts, "stale_data", "methods.truncated_importance_sampling.preset"),
    "detached": (detached_term, "dead_regulariser", "methods.dead_bonus.coefficient"),
}


def planted(name: str, seed: int = 0) -> Log:
    log = healthy_log(seed=seed)
    FAULTS[name][0](log)
    return log


def write(run: Path, log: Log, settings: dict[str, Any] | None = SETTINGS) -> Path:
    """A run folder as the loop leaves it: nan is null."""
    run.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i} | {k: float(v[i]) for k, v in log.items()} for i in range(len(next(iter(log.values()))))]
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    if settings is not None:
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "summary.json").write_text("{}")
    return run


# -- one fault each ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_fault_is_the_only_finding_above_a_note(name: str, seed: int) -> None:
    report = examine(history(planted(name, seed)))
    _, fault, setting = FAULTS[name]
    assert serious(report.findings) == [fault]
    first = report.findings[0]
    assert first.setting == setting
    assert first.evidence
    assert all(item.strip() for item in first.evidence)
    assert 0 <= first.steps[0] <= first.steps[1] == STEPS - 1


def test_every_fault_of_the_doctor_is_planted_here() -> None:
    assert {fault for _, fault, _ in FAULTS.values()} == {rule.fault for rule in RULES}


def test_settings_exist_and_take_the_suggested_value() -> None:
    """Each suggestion is an override that the trainer accepts, planted method objects aside."""
    for name in FAULTS:
        finding = examine(history(planted(name))).findings[0]
        if "dead_bonus" not in finding.setting:
            load_config("grpo/tiny", [f"{finding.setting}={finding.suggestion}"])


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_log_is_clean(seed: int) -> None:
    report = examine(history(healthy_log(seed=seed)))
    assert report.clean
    assert [f.fault for f in report.findings] == ["collapse"]
    assert "sharpening" in report.findings[0].title
    assert report.not_measured == ()


@pytest.mark.parametrize("base", ["S", "R"])
def test_the_recorded_runs_of_the_lab_are_clean(base: str) -> None:
    """Three seeds of GRPO each, 80 steps, as shipped with the book; the log of S loses half of its entropy."""
    for seed in json.loads((ROOT / "book" / "data" / f"tiny_lab_{base}.json").read_text())["seeds"]:
        rows = seed["history"]
        log = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "step"}
        evaluations = [{"step": int(step), **values} for step, values in seed["evaluations"].items()]
        report = examine(history(log, evaluations=evaluations))
        assert report.clean, render(report)


def test_the_same_fall_is_a_collapse_or_sharpening_by_what_it_buys() -> None:
    log = healthy_log()
    log["token_entropy"] = 0.175 * 0.2 ** ramp(0, 1)
    levels = {}
    for gain in (0.0, 0.05, 0.4):
        log["accuracy"] = log["reward"] = ramp(0.2, 0.2 + gain)
        levels[gain] = next(f.severity for f in examine(history(log)).findings if f.fault == "collapse")
    assert levels[0.4] == "note"
    assert levels[0.0] != "note"
    assert levels[0.05] != "note"
    # held-out problems stay the same, so they decide where they were evaluated
    evaluations = [
        {"step": 0, "pass@1": 0.2, "token_entropy": 0.17},
        {"step": 40, "pass@1": 0.5, "token_entropy": 0.04},
    ]
    log["accuracy"] = log["reward"] = ramp(0.2, 0.2)
    assert examine(history(log, evaluations=evaluations)).clean


def test_each_reason_of_a_collapse_is_told() -> None:
    titles = {name: examine(history(planted(name))).findings[0].title for name in ("unpaid", "spent", "unopposed")}
    assert titles == {
        "unpaid": "Entropy collapse: accuracy rose too little in return",
        "spent": "Entropy collapse: hardly any group has an advantage left",
        "unopposed": "Entropy collapse: likely tokens only get likelier",
    }
    log = planted("unopposed")
    log["accuracy"] = log["reward"] = np.minimum(ramp(0.2, 1.4), 0.95)  # solved: nothing was lost
    assert examine(history(log)).clean


def test_a_collapse_names_the_tokens_it_comes_from() -> None:
    log = planted("unpaid")
    assert "likely tokens of positive advantage" in " ".join(examine(history(log)).findings[0].evidence)
    log["ledger_down_unlikely"], log["ledger_up_likely"] = log["ledger_up_likely"] * 5, log["ledger_up_likely"] * 0
    other = examine(history(log)).findings[0]
    assert other.cause.startswith("Mostly unlikely tokens of negative advantage")
    assert other.likelihood < examine(history(planted("unpaid"))).findings[0].likelihood
    for name in list(log):
        if name.startswith("ledger"):
            del log[name]
    assert "not measured" in " ".join(examine(history(log)).findings[0].evidence)
    assert ledger_shares(history(log), -1) == {}


def test_a_bonus_is_recognised_by_its_numbers_or_by_its_setting() -> None:
    log = planted("bonus")
    assert bonus_of(history(log)) == ("entropy_bonus", pytest.approx(0.22))
    assert bonus_of(history(healthy_log())) is None
    for name in ("regularise_entropy_bonus", "regularise_grad_entropy_bonus"):
        del log[name]
    settings = SETTINGS | {"methods": {"grpo": {}, "entropy_bonus": {"coefficient": 0.2}}}
    found = examine(history(log, settings)).findings[0]
    assert (found.fault, found.setting, found.suggestion) == ("explosion", "methods.entropy_bonus.coefficient", "0.02")
    # without any bonus the rise has another cause, and damage points to the step size
    assert examine(history(log)).findings[0].setting == "optimizer.lr"


def test_an_explosion_that_has_just_begun_is_found() -> None:
    log = planted("bonus")
    log["token_entropy"] = np.concatenate([np.full(STEPS - 3, 0.17), [0.2, 0.28, 0.38]])
    log["regularise_entropy_bonus"] = -0.2 * log["token_entropy"]
    log["accuracy"] = log["reward"] = ramp(0.3, 0.2)
    assert serious(examine(history(log)).findings) == ["explosion"]
    log["token_entropy"][-2:] = [0.2, 0.19]
    assert "explosion" not in serious(examine(history(log)).findings)


def test_a_few_huge_steps_with_damage_point_to_the_learning_rate() -> None:
    log = planted("lr")
    log["kl_old_new"] = np.full(STEPS, 0.01)
    log["kl_old_new"][25::5] = 0.12
    found = examine(history(log)).findings[0]
    assert (found.fault, found.severity) == ("learning_rate", "critical")
    calm = healthy_log()
    calm["kl_old_new"] = log["kl_old_new"]  # without damage large steps are no fault
    assert examine(history(calm)).clean


def test_a_consequence_names_its_cause_and_is_no_finding_of_its_own() -> None:
    found = {f.fault: f for f in examine(history(planted("lr"))).findings}
    assert found["clip_saturation"].follows_from == "learning_rate"
    assert found["clip_saturation"].severity == "note"
    stale = {f.fault: f for f in examine(history(planted("stale"))).findings}
    assert stale["mismatch"].follows_from == "stale_data"


def test_what_was_not_recomputed_is_inferred_from_the_first_small_steps() -> None:
    for name, fault in (("noise", "mismatch"), ("top-p", "sampler_truncation")):
        log = healthy_log()
        log["mismatch"] = log["mismatch_mean"] = np.full(STEPS, math.nan)
        assert examine(history(log)).clean
        log["kl_old_new"] = log["kl_old_new"] + 0.005
        log["ratio_mean"] = log["ratio_mean"] + (0.005 if name == "noise" else -0.03)
        report = examine(history(log))
        assert serious(report.findings) == [fault]
        assert any("recompute_old_logprob" in item for item in report.not_measured)
        log["lr"] = log["lr"] * 0 + 5e-4  # without warm-up the policy moves at once: nothing can be inferred
        assert examine(history(log)).clean


def test_number_formats_have_their_own_tolerance() -> None:
    log = planted("noise")
    assert serious(examine(history(log)).findings) == ["mismatch"]
    assert examine(history(log, SETTINGS | {"model": {"dtype": "bfloat16"}})).clean


def test_the_clip_advice_depends_on_what_is_unusual() -> None:
    def advice(**changes: Any) -> tuple[str, str]:
        found = examine(history(planted("clip"), SETTINGS | changes)).findings[0]
        return found.setting, found.suggestion

    assert advice(methods={"grpo": {"clip_low": 0.001, "clip_high": 0.2}}) == ("methods.grpo.clip_low", "0.2")
    assert advice(update={"epochs": 4, "minibatches": 8}) == ("update.epochs", "1")
    assert advice(update={"epochs": 1, "minibatches": 16}) == ("update.minibatches", "4")
    assert examine(history(planted("clip"), SETTINGS | {"methods": {"gspo": {}}})).clean


def test_longer_responses_that_are_right_more_often_are_healthy() -> None:
    log = healthy_log()
    log["mean_tokens"] = ramp(35, 55)
    log["truncated"] = ramp(0, 0.12)
    report = examine(history(log))
    assert report.clean
    assert "length_drift" in [f.fault for f in report.findings]


def test_a_run_that_earned_its_reward_is_no_fault() -> None:
    log = healthy_log()
    log["accuracy"] = log["reward"] = np.minimum(ramp(0.3, 1.6), 0.97)
    log["dead_groups"] = np.minimum(ramp(0.2, 1.2), 0.8)
    assert examine(history(log)).clean


def test_a_term_that_never_acted_is_only_noted() -> None:
    log = planted("detached")
    log["regularise_dead_bonus"] = log["regularise_dead_bonus"] * 0
    report = examine(history(log))
    assert report.clean
    assert "dead_regulariser" in [f.fault for f in report.findings]
    log["regularise_grad_dead_bonus"][7] = 1e-9
    assert "dead_regulariser" not in [f.fault for f in examine(history(log)).findings]


# -- properties -------------------------------------------------------------------------------------------------------

USED = sorted(healthy_log())


@given(st.permutations(range(4)), st.integers(0, 2**32 - 1), st.sampled_from([*FAULTS, None]))
def test_unrelated_columns_and_their_order_change_nothing(order: list[int], seed: int, name: str | None) -> None:
    log = planted(name) if name else healthy_log()
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal(STEPS) * 10.0**k for k in range(4)]
    more = {f"unrelated_{i}": noise[i] for i in order} | dict(sorted(log.items(), reverse=bool(seed % 2)))
    assert examine(history(more)).findings == examine(history(log)).findings


TRENDS = ("collapse", "explosion", "length_drift", "learning_rate")


@given(st.fixed_dictionaries({name: st.floats(0, 1) for name in USED}), st.integers(6, 60))
def test_no_trend_is_found_in_constant_series(levels: dict[str, float], steps: int) -> None:
    log = {name: np.full(steps, level) for name, level in levels.items()}
    log["kl_old_new"] = np.full(steps, min(levels["kl_old_new"], 0.19))  # beyond that the level alone is a finding
    found = [f.fault for f in examine(history(log)).findings]
    assert not set(found) & set(TRENDS)


def test_no_fault_is_found_in_constant_healthy_series() -> None:
    log = {name: np.full(STEPS, float(np.median(values))) for name, values in healthy_log().items()}
    assert examine(history(log)).findings == ()


@given(st.lists(st.sampled_from(USED), unique=True), st.sampled_from([*FAULTS, None]))
def test_missing_columns_are_never_zeros(missing: list[str], name: str | None) -> None:
    """Whatever is missing, nothing new is found above a note, except what the missing column would have explained."""
    whole = planted(name) if name else healthy_log()
    log = {k: v for k, v in whole.items() if k not in missing}
    report = examine(history(log))
    expected = {f.fault for f in examine(history(whole)).findings}
    inferred = {"mismatch", "sampler_truncation"} if {"mismatch", "mismatch_mean"} & set(missing) else set()
    assert set(serious(report.findings)) <= expected | inferred
    assert not re.search(r"\bnan\b", render(report))
    for rule in RULES:
        told = any(item.startswith(rule.title) for item in report.not_measured)
        assert told == bool(set(rule.needs) & set(missing))


@given(st.integers(0, STEPS), st.sampled_from([*FAULTS, None]))
def test_any_prefix_of_a_log_is_readable(length: int, name: str | None) -> None:
    log = {k: v[:length] for k, v in (planted(name) if name else healthy_log()).items()}
    report = examine(history(log))
    text = render(report)
    if length < 6:
        assert "no verdict" in text
        assert report.findings == ()
    if name is None:
        assert report.clean, text


# -- reading damaged logs ---------------------------------------------------------------------------------------------


def test_a_broken_last_line_changes_nothing(tmp_path: Path) -> None:
    whole = diagnose(write(tmp_path / "run", planted("lr")))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "reward": 0.')
    report = diagnose(tmp_path / "run")
    assert report.findings == whole.findings
    assert report.remarks == ("metrics.jsonl: 1 unreadable line left out",)


def test_lines_of_every_wrong_kind_are_counted(tmp_path: Path) -> None:
    run = write(tmp_path / "run", healthy_log())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    bad = ["", "[1, 2]", "null", '"text"', "{}", '{"step": null}', '{"step": "3"}', "\ufffd\x00"]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:20], *bad, *lines[20:]]))
    report = diagnose(run)
    assert report.clean
    assert report.remarks == (f"metrics.jsonl: {len(bad) - 1} unreadable lines left out",)


def test_values_that_are_no_numbers_are_not_measured(tmp_path: Path) -> None:
    log = healthy_log()
    log["staleness"] = np.full(STEPS, math.nan)
    run = write(tmp_path / "run", log)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"vocabulary": 128\.0', '"vocabulary": "many"', text))
    read, _ = read_history(run)
    assert np.isnan(read.column("vocabulary")).all()
    assert any(item.startswith("stale") for item in diagnose(run).not_measured)


def test_a_resumed_log_with_repeated_steps_counts_the_later_line(tmp_path: Path) -> None:
    run = write(tmp_path / "run", healthy_log())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [json.dumps(json.loads(line) | {"reward": -1.0}) for line in lines[10:13]]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:13], *again, *lines[13:20], *lines[25:]]) + "\n")
    read, remarks = read_history(run)
    assert read.steps.tolist() == [*range(20), *range(25, STEPS)]
    assert read.column("reward")[10:13].tolist() == [-1.0] * 3
    assert remarks == ("3 steps are logged twice; the later line counts", "5 steps are missing between 0 and 39")


def test_an_unfinished_run_without_settings_is_examined(tmp_path: Path) -> None:
    run = write(tmp_path / "run", planted("lr"), settings=None)
    (run / "summary.json").unlink()
    report = diagnose(run)
    assert serious(report.findings) == ["learning_rate"]
    assert report.findings[0].suggestion == "a third of the present value"
    assert len(report.remarks) == 2
    (run / "config.yaml").write_text("{unbalanced")
    assert "config.yaml: unreadable" in diagnose(run).remarks[0]
    (run / "config.yaml").write_text("- a list")
    assert "holds no settings" in diagnose(run).remarks[0]


def test_a_run_that_has_only_begun_has_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    report = diagnose(tmp_path)
    assert report.steps is None
    assert "no step is logged" in render(report)
    assert "no verdict" in render(report)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        diagnose(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor config\.yaml"):
        diagnose(tmp_path)


def test_trends_need_six_steps_and_more_than_noise() -> None:
    assert math.isnan(trend(np.arange(5.0)).early)
    rng = np.random.default_rng(0)
    clear = [trend(rng.standard_normal(40)).clear for _ in range(200)]
    assert np.mean(clear) < 0.12
    assert trend(np.arange(40.0)).rose(30)
    assert not trend(np.arange(40.0)).rose(33)
    assert trend(-np.arange(40.0)).fell(30)


# -- what people see --------------------------------------------------------------------------------------------------


def lab(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def test_the_command_prints_findings_in_order(tmp_path: Path) -> None:
    run = write(tmp_path / "run", planted("lr"))
    result = lab("doctor", run)
    assert result.exit_code == 0, result.output
    assert "1. CRITICAL: Learning rate too high" in result.output
    assert "change: optimizer.lr=" in result.output
    assert "evidence (steps 0 to 39)" in result.output
    order = [float(x) for x in re.findall(r"likelihood (\d\.\d+)\)", result.output)]
    serious_ones = len(serious(diagnose(run).findings))
    assert order[:serious_ones] == sorted(order[:serious_ones], reverse=True)
    assert "clean" in lab("doctor", write(tmp_path / "fine", healthy_log())).output


def test_json_holds_everything_and_is_valid(tmp_path: Path) -> None:
    run = write(tmp_path / "run", planted("bonus"))
    tree = json.loads(lab("doctor", run, "--json").output, parse_constant=pytest.fail)
    assert tree["clean"] is False
    assert tree["findings"][0]["fault"] == "explosion"
    assert set(tree["findings"][0]) >= {"severity", "likelihood", "cause", "evidence", "steps", "setting", "suggestion"}


def test_the_page_is_self_contained_and_described(tmp_path: Path) -> None:
    run = write(tmp_path / "run", planted("stale"))
    out = tmp_path / "doctor.html"
    result = lab("doctor", run, "--html", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    findings = diagnose(run).findings
    assert text.count("<section") == len(findings) >= 2
    assert text.count("<figure") >= len(findings)
    assert text.count("plotly.js v") == 1
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href|url)\s*[=(]", outside)
    assert not re.findall(r"<script[^>]*\ssrc", text)
    for alt in re.findall(r'aria-label="([^"]*)"', text):
        assert len(alt) > 30
    assert "staleness is 0 at step 0 and 8 at step 39" in text


def test_text_from_a_log_cannot_become_markup(tmp_path: Path) -> None:
    log = planted("detached")
    log["regularise_<b>x"] = log.pop("regularise_dead_bonus")
    log["regularise_grad_<b>x"] = log.pop("regularise_grad_dead_bonus")
    text = page(examine(history(log)), history(log))
    assert "<b>x" not in text.split("</script>", 1)[1].split("<figure")[0]


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    result = lab("doctor", tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.output.startswith("error: ")


def test_the_packaged_recipes_are_read_for_their_settings() -> None:
    tree = load_config("grpo/tiny").model_dump(mode="json")
    found = examine(history(planted("lr"), tree)).findings[0]
    lr = float(found.suggestion)
    assert 0 < lr < tree["optimizer"]["lr"] / 2
    parse_config(tree | {"optimizer": tree["optimizer"] | {"lr": lr}})


# -- real runs --------------------------------------------------------------------------------------------------------


class DetachedBonus(Method):
    """An entropy bonus without a gradient."""

    slug = "detached_bonus"
    needs_entropy = True

    def regularise(self, inputs: LossInputs) -> Tensor:
        assert inputs.entropy is not None
        return -0.01 * inputs.entropy.detach()


def real_run(out: Path, *methods: Method, settings: tuple[str, ...] = ()) -> Path:
    """Six steps with more methods than the recipe has; the word bonus keeps every group alive."""
    trainer = Trainer(load_config("grpo/tiny", [*TINY_RUN, "steps=6", *settings]), out)
    own = [build(slug, values) for slug, values in trainer.config.methods.items()]
    trainer.use(compose([*own, WordBonus(), *methods]))
    trainer.run()
    return out


@pytest.mark.slow
def test_a_dead_term_of_a_real_run_is_found_and_a_live_one_is_not(tmp_path: Path) -> None:
    found = diagnose(real_run(tmp_path / "planted", DetachedBonus())).findings
    dead = [f for f in found if f.fault == "dead_regulariser"]
    assert [f.severity for f in dead] == ["warning"]
    assert "detached_bonus" in dead[0].title
    live = diagnose(real_run(tmp_path / "live", settings=("methods.entropy_bonus.coefficient=0.01",))).findings
    assert "dead_regulariser" not in [f.fault for f in live]


@pytest.mark.slow
def test_a_real_run_measures_every_column_that_the_rules_read(tmp_path: Path) -> None:
    """A column that is renamed in the loop would otherwise be "not measured" for ever."""
    read, remarks = read_history(real_run(tmp_path / "run", settings=("update.recompute_old_logprob=true",)))
    assert remarks == ()
    assert examine(read).not_measured == ()
    assert all(read.has(name) for name in USED)
