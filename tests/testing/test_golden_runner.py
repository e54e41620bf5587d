"""The shipped golden files replay; whatever a replay gets wrong gives exit status 1."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GOLDEN

from rlvr_lab.errors import UserError
from rlvr_lab.testing import golden
from rlvr_lab.testing.golden import Case, Replay, Rule, main, read_cases, replay, replay_file

FILES = sorted(GOLDEN.glob("*.json"))
BASELINES = json.loads((GOLDEN / "baselines.json").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_is_reproduced(path: Path) -> None:
    results = replay_file(path)
    assert results
    assert [f"{r.case}: {r.problem}" for r in results if r.problem] == []


def case_of(name: str) -> dict[str, Any]:
    return copy.deepcopy(next(case for case in BASELINES["cases"] if case["name"] == name))


def written(tmp_path: Path, *cases: dict[str, Any], name: str = "baselines.json", **top: Any) -> Path:
    path = tmp_path / name
    path.write_text(json.dumps({"source": "planted", "function": "", "notes": "", **top, "cases": list(cases)}))
    return path


def wrong_value(case: dict[str, Any]) -> None:
    case["outputs"]["token-mean"]["loss"] += 1e-4


def wrong_gradient(case: dict[str, Any]) -> None:
    case["grad"]["value"]["token-mean"][0][1] += 1e-4


def wrong_flag(case: dict[str, Any]) -> None:
    case["outputs"]["token-mean"]["pg_clipfrac"] = None


def missing_key(case: dict[str, Any]) -> None:
    case["outputs"]["token-mean"]["something_new"] = 1.0


def missing_gradient_key(case: dict[str, Any]) -> None:
    case["grad"]["value"]["token-sum"] = case["grad"]["value"]["token-mean"]


def another_length(case: dict[str, Any]) -> None:
    case["outputs"]["token-mean"]["loss"] = [1.0]


def an_exception(case: dict[str, Any]) -> None:
    case["inputs"]["advantages"][0].pop()


PLANTED = {
    wrong_value: "token-mean.loss is",
    wrong_gradient: "grad.token-mean[0][1] is",
    wrong_flag: "token-mean.pg_clipfrac is",
    missing_key: "token-mean.something_new is missing",
    missing_gradient_key: "grad.token-sum is missing",
    another_length: "where a list was recorded",
    an_exception: "ValueError: input 'advantages' is no tensor",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_failure_is_seen(
    plant: Callable[[dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of("dapo_clip_higher")
    assert main([str(written(tmp_path, case))]) == 0
    capsys.readouterr()
    plant(case)
    assert main([str(written(tmp_path, case, case_of("overlong_dapo")))]) == 1
    wrong, right = capsys.readouterr().out.splitlines()[1:3]
    assert "FAIL" in wrong
    assert PLANTED[plant] in wrong
    assert right.endswith(" ok")


def test_gradient_that_no_adapter_gives_is_missing(tmp_path: Path) -> None:
    case = case_of("overlong_dapo") | {"grad": {"wrt": "response_lengths", "value": [0.0] * 5}}
    (result,) = replay_file(written(tmp_path, case))
    assert result.problem == "grad is missing"


def test_case_that_no_rule_knows_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"name": "new", "params": {}, "inputs": {"strange": [1]}, "outputs": {"stranger": [1]}}
    assert main([str(written(tmp_path, case))]) == 1
    assert "FAIL unknown case: no rule for strange -> stranger" in capsys.readouterr().out


def test_case_with_nothing_to_compare_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "rules_of", lambda slug: [Rule(slug, {"x"}, set(), lambda case: Replay({}))])
    (result,) = replay_file(written(tmp_path, {"inputs": {"x": 1}, "outputs": {"label": "text"}}))
    assert result.problem == "nothing was compared"


def test_adapter_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case) -> Replay:
        raise KeyError("a key")

    monkeypatch.setattr(golden, "rules_of", lambda slug: [Rule(slug, {"x"}, {"y"}, run)])
    (result,) = replay_file(written(tmp_path, {"inputs": {"x": 1}, "outputs": {"y": 1}}))
    assert result.problem == "KeyError: 'a key'"


UNREADABLE = {
    "broken JSON": '{"cases": [',
    "no mapping": "[1, 2]",
    "no cases": '{"source": "x"}',
    "empty cases": '{"cases": []}',
    "a case that is no mapping": '{"cases": [1]}',
    "a case without outputs": '{"cases": [{"inputs": {}}]}',
    "params that are no mapping": '{"cases": [{"inputs": {}, "outputs": {}, "params": [1]}]}',
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_file_is_one_line_and_others_still_run(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert main([str(tmp_path / "bad.json"), str(tmp_path / "absent.json"), str(GOLDEN / "baselines.json")]) == 1
    out, err = capsys.readouterr()
    bad, absent = err.splitlines()
    assert str(tmp_path / "bad.json") in bad
    assert str(tmp_path / "absent.json") in absent
    assert out.splitlines()[-1] == f"{len(BASELINES['cases'])} cases, 0 failed, 2 files unreadable"


def test_text_in_another_encoding_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"cases": ["\xe9"]}')
    with pytest.raises(UserError, match=r"latin\.json: cannot be read"):
        read_cases(tmp_path / "latin.json")


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    bad = case_of("dapo_clip_higher")
    wrong_value(bad)
    command = [sys.executable, "-m", "rlvr_lab.testing.golden", str(GOLDEN / "baselines.json"), "--verbose"]
    done = subprocess.run([*command, str(written(tmp_path, bad))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "token-mean.ppo_kl" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{len(BASELINES['cases']) + 1} cases, 1 failed"


# Cases as the files have them: without name, with kind, dtype in several places, gradients in several forms.


def read_one(tmp_path: Path, case: dict[str, Any], **top: Any) -> Case:
    return read_cases(written(tmp_path, {"inputs": {"x": [1.0, None]}, "outputs": {"y": 1.0}} | case, **top))[0]


@pytest.mark.parametrize(
    ("case", "top", "dtype"),
    [
        ({}, {}, torch.float64),
        ({"params": {"dtype": "float32"}}, {"dtype": "float64"}, torch.float32),
        ({"dtype": "float32"}, {}, torch.float32),
        ({}, {"dtype": "float64 (torch default dtype set to float64 before calling)"}, torch.float64),
        ({}, {"dtype": "float32"}, torch.float32),
    ],
)
def test_dtype_is_the_recorded_one(tmp_path: Path, case: Any, top: Any, dtype: torch.dtype) -> None:
    read = read_one(tmp_path, case, **top)
    assert read.tensor("x").dtype == dtype
    assert read.tensor("x").isnan().tolist() == [False, True]
    assert read.leaf("x").requires_grad
    assert not read.tensor("x").requires_grad


@pytest.mark.parametrize(
    ("grad", "expected"),
    [
        ({"wrt": "x", "value": [1.0]}, [1.0]),
        ({"wrt": "x", "value": {"token-mean": [1.0]}}, {"token-mean": [1.0]}),
        ({"x": [1.0]}, {"x": [1.0]}),
        ({"of": "-loss", "x": [1.0], "z": [2.0]}, {"x": [1.0], "z": [2.0]}),
        ([1.0], [1.0]),
        (None, None),
    ],
)
def test_gradient_is_read_in_every_form(tmp_path: Path, grad: Any, expected: Any) -> None:
    assert read_one(tmp_path, {"grad": grad}).grad == expected


def test_case_is_named_by_what_it_has(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"name": "n", "note": "o"}).name == "n"
    assert read_one(tmp_path, {"note": "o", "kind": "k"}).kind == "k"
    assert read_one(tmp_path, {"params": {"desc": "d", "kind": "k"}}).name == "d"
    assert read_one(tmp_path, {}).name == ""
    assert read_one(tmp_path, {}, function="f").function == "f"
    assert read_one(tmp_path, {"function": "g"}, function="f").function == "g"


def test_numbers_beside_the_outputs_must_be_reproduced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "rules_of", lambda slug: [Rule(slug, {"x"}, {"y"}, lambda case: Replay({"y": 1.0}))])
    case = {"inputs": {"x": 1}, "outputs": {"y": 1.0}}
    assert replay(read_one(tmp_path, case | {"remark": "text"})).problem is None
    assert replay(read_one(tmp_path, case | {"other_form": {"z": 1.0}})).problem == "other_form is missing"


def test_single_gradient_may_come_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Replay({"y": 1.0}, torch.tensor([2.0]))
    monkeypatch.setattr(golden, "rules_of", lambda slug: [Rule(slug, {"x"}, {"y"}, lambda case: done)])
    assert replay(read_one(tmp_path, {"grad": {"x": [2.0]}})).problem is None
    assert replay(read_one(tmp_path, {"grad": {"x": [3.0]}})).problem is not None


def test_most_specific_rule_of_the_own_card_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(slug: str, value: float, **more: Any) -> Rule:
        return Rule(slug, {"x"}, set(), lambda case: Replay({"y": value}), **more)

    rules = {
        "baselines": [rule("baselines", 1.0), rule("baselines", 2.0, params={"p"})],
        "other": [
            rule("other", 3.0, params={"p", "q"}),
            rule("other", 4.0, params={"p", "q"}, when=lambda case: False),
        ],
    }
    monkeypatch.setattr(golden, "adapter_names", lambda: list(rules))
    monkeypatch.setattr(golden, "rules_of", lambda slug: rules.get(slug, []))
    for params, name, value in (
        ({}, "baselines", 1.0),
        ({"p": 1, "q": 1}, "baselines", 2.0),
        ({"p": 1, "q": 1}, "x", 3.0),
    ):
        case = {"inputs": {"x": 1}, "outputs": {"y": value}, "params": params}
        (result,) = replay_file(written(tmp_path, case, name=f"{name}.json"))
        assert result.problem is None
